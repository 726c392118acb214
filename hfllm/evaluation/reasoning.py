"""How a model of the world answers what can be reasoned about: whether it thinks, and whether its thoughts hold."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.data.thoughts import split_thoughts
from hfllm.data.world.reasoning import DIAL, HELD_OUT, HOPS, SIZES, Problem, checked_steps, draw_problem, is_valid
from hfllm.data.world.vocabulary import RIGHT, gold_score
from hfllm.data.world.world import World
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answered:
    """An answer and what it is.

    Args:
        problem: what was asked.
        response: all that was said.
        num_tokens: how long that is, without the token that ends it.
        is_right: whether the answer, apart from the thought, is right.
        thinks: whether there is a thought, finished or not.
        steps: of each step of the thought whether it holds; empty where there is none.
    """

    problem: Problem
    response: str
    num_tokens: int
    is_right: bool
    thinks: bool
    steps: tuple[bool, ...]

    @property
    def is_valid(self) -> bool:
        """Whether all steps of the thought hold, and none is missing."""
        return is_valid(self.steps)


def held_out_problems(world: World, per_size: Mapping[str, int], seed: int = 0) -> list[Problem]:
    """Return different problems that nothing learns from: up to so many of each size.

    There are few questions of hops: of these there may be fewer.

    Args:
        per_size: how many, by family; others are left out.
    """
    rng, found = random.Random(f"reasoning-evaluation-{world.seed}-{seed}"), []
    for family, count in per_size.items():
        for size in SIZES[family]:
            drawn: dict[str, Problem] = {}
            for _ in range(20 * count):
                problem = draw_problem(world.facts, world.relations, rng, family, HELD_OUT, (size,))
                drawn.setdefault(problem.key, problem)
                if len(drawn) == count:
                    break
            found += drawn.values()
    return found


def is_dial(problem: Problem) -> bool:
    """Return whether a problem is one of the dial."""
    return problem.family == DIAL


def is_hops(problem: Problem) -> bool:
    """Return whether a problem is one of hops."""
    return problem.family == HOPS


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    world: World,
    problems: Sequence[Problem],
    max_new_tokens: int,
    do_sample: bool = False,
    seed: int = 0,
) -> list[Answered]:
    """Answer each problem, greedily or sampled at temperature 1, and judge the answers."""
    prompts = [problem.prompt_row()["prompt"] for problem in problems]
    said = sample_responses(model, tokenizer, prompts, max_new_tokens, do_sample, seed=seed, fast=True)
    texts = [texts[0] for texts in said]
    # Special tokens are gone from the texts, so that none is counted.
    lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [judged(world, *each) for each in zip(problems, texts, lengths, strict=True)]


def judged(world: World, problem: Problem, response: str, num_tokens: int) -> Answered:
    """Return a response with what it is."""
    thought, said = split_thoughts(response)
    steps = () if thought is None else checked_steps(problem, thought, world.facts, world.relations)
    is_right = gold_score(said, problem.gold) >= RIGHT
    return Answered(problem, response, num_tokens, is_right, thought is not None, tuple(steps))


def values_of(answers: Sequence[Answered]) -> dict[str, list[float]]:
    """Return what is measured of some answers, a value for each that it is measured on.

    `right` and `thinks` (of all), `valid` (of the right answers with a thought: whether it holds), `steps` (of the
    answers with a thought: the share of its steps that hold), `tokens` (of all) and `thought_tokens` (of the answers
    with a thought, which tells whether thoughts grow apart from whether there are more).
    """
    thinking = [each for each in answers if each.thinks]
    return {
        "right": [float(each.is_right) for each in answers],
        "thinks": [float(each.thinks) for each in answers],
        "valid": [float(each.is_valid) for each in thinking if each.is_right],
        "steps": [sum(each.steps) / max(len(each.steps), 1) for each in thinking],
        "tokens": [float(each.num_tokens) for each in answers],
        "thought_tokens": [float(each.num_tokens) for each in thinking],
    }

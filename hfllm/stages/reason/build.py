"""The recipe on thoughts: the training rows of each run, and the questions to its models."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from hfllm.data.world.reasoning import DIAL, HOPS, PRACTICE, SHOWN, Problem, draw_problem
from hfllm.data.world.world import World
from hfllm.outputs.checkpoints import STATE_FILE
from hfllm.outputs.report import Found
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.reason.flags import (
    DIRECT,
    MIXED,
    RESPONSE_LENGTH,
    RL,
    SHUFFLED,
    THOUGHTS,
    Course,
)
from hfllm.stages.reason.report import (
    PROMISES,
    answer,
    held_out_problems,
    plots,
    ppo_metrics,
    summary_of,
    tables,
    tuned_metrics,
)
from hfllm.stages.shared import load_speaking

# ---- rows ----


# Of the questions in fine-tuning. Dials are more frequent in the texts than hops.
SHARES = {HOPS: 2, DIAL: 1}


def tuning_rows(world: World, count: int, seed: int, has_thoughts: bool) -> list[Row]:
    """Return the rows of fine-tuning, all with thoughts or all without.

    Both have the same questions in the same order, thus both take the same number of steps.
    """
    problems = _problems(world, "sft", count, seed, SHARES, SHOWN)
    return _conversations(problems, [has_thoughts] * count)


def mixed_rows(world: World, count: int, seed: int, share_of_thoughts: float) -> list[Row]:
    """Return the rows of the model with occasional thoughts: only dials, as PPO gets."""
    problems = _problems(world, MIXED, count, seed, {DIAL: 1}, SHOWN)
    rng = random.Random(f"reason-shown-{seed}")
    num_thoughts = round(share_of_thoughts * count)
    return _conversations(problems, rng.sample([True] * num_thoughts + [False] * (count - num_thoughts), count))


def prompt_rows(world: World, count: int, seed: int) -> list[Row]:
    """Return the questions for PPO, with their gold answers."""
    return [problem.prompt_row() for problem in _problems(world, RL, count, seed, {DIAL: 1}, PRACTICE)]


def _problems(world: World, name: str, count: int, seed: int, shares: Mapping[str, int], part: str) -> list[Problem]:
    rng = random.Random(f"reason-{name}-{world.seed}-{seed}")
    families = rng.choices(list(shares), list(shares.values()), k=count)
    return [draw_problem(world.facts, world.relations, rng, family, part) for family in families]


def _conversations(problems: Iterable[Problem], has_thoughts: Iterable[bool]) -> list[Row]:
    """Return conversations of the problems with their model responses."""
    return [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.response(has_thought)},
            ]
        }
        for problem, has_thought in zip(problems, has_thoughts, strict=True)
    ]


# ---- evaluation ----
#
# The gain by thoughts on the embedded world, and the effect of PPO on them.


def course_report(course: Course, world: World, num_problems: int, seed: int) -> Found:
    """Ask all models held-out questions: after fine-tuning greedily, around PPO dials by samples. Judge answers."""
    problems = held_out_problems(world, {HOPS: num_problems, DIAL: 3 * num_problems})
    dials = held_out_problems(world, {DIAL: 6 * num_problems}, seed=1)
    tuned, sampled = {}, {}
    for name in course.models:
        speaking = load_speaking(NamedModel(course.folder(name), settings={"dtype": "float32"}))
        arguments = speaking.model, speaking.tokenizer, world
        if name in (THOUGHTS, DIRECT):
            tuned[name] = answer(*arguments, problems, RESPONSE_LENGTH)
        elif name in (MIXED, RL, SHUFFLED):
            sampled[name] = answer(*arguments, dials, RESPONSE_LENGTH, do_sample=True, seed=seed)
    metrics = {**tuned_metrics(tuned), **ppo_metrics(sampled)}
    histories = {name: _history(course.folder(name)) for name in (RL, SHUFFLED) if name in course.runs}
    return Found(metrics, summary_of(metrics), tables(tuned, sampled), plots(tuned, histories), PROMISES)


def _history(folder: str) -> list[dict[str, float]]:
    """Return the log of a finished run."""
    return json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))["log_history"]

"""The recipe on thoughts: the training rows of each run, the questions to its models, and the report on answers."""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.thoughts import split_thoughts
from hfllm.data.world.reasoning import (
    DIAL,
    HELD_OUT,
    HOPS,
    NUMBERS_OF_DIAL,
    PRACTICE,
    SHOWN,
    SIZES,
    UNSEEN_SIZES,
    Problem,
    checked_steps,
    draw_problem,
    is_valid,
)
from hfllm.data.world.rubric import RIGHT, gold_score
from hfllm.data.world.world import World, draw_distinct
from hfllm.generation.responses import sample_responses
from hfllm.outputs.checkpoints import STATE_FILE
from hfllm.outputs.figures import change_of, mean_of, shown
from hfllm.outputs.report import Found, Plot, plot_history
from hfllm.outputs.verdict import Promise
from hfllm.runs.models import NamedModel
from hfllm.runs.pipeline import Row
from hfllm.stages.pretrain.build import PROMISES as PROBED
from hfllm.stages.pretrain.build import probes_of_run
from hfllm.stages.reason.flags import (
    DIRECT,
    MIXED,
    PRETRAIN,
    RESPONSE_LENGTH,
    RL,
    SHUFFLED,
    THOUGHTS,
    Course,
    ReasonArguments,
)
from hfllm.stages.shared import load_speaking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ---- rows ----


# Of the questions in fine-tuning. Dials are more frequent in the texts than hops.
SHARES = {HOPS: 2, DIAL: 1}


def rows_by_run(script_args: ReasonArguments, world: World) -> dict[str, Callable[[], list[Row]]]:
    """Return what makes the rows of the world's runs, by run."""
    count, seed = script_args.num_examples, script_args.seed
    return {
        THOUGHTS: lambda: tuning_rows(world, count, seed, has_thoughts=True),
        DIRECT: lambda: tuning_rows(world, count, seed, has_thoughts=False),
        MIXED: lambda: mixed_rows(world, script_args.num_mixed_examples, seed, script_args.share_of_thoughts),
        **dict.fromkeys((RL, SHUFFLED), lambda: prompt_rows(world, script_args.num_prompts, seed)),
    }


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
    problems = [
        *held_out_problems(world, {HOPS: num_problems, DIAL: 3 * num_problems // len(SIZES[DIAL])}),
        *held_out_problems(world, {DIAL: num_problems}, sizes=UNSEEN_SIZES),
        *held_out_problems(
            world, {HOPS: -(-num_problems // 2), DIAL: -(-num_problems // len(SIZES[DIAL]))}, seed=2, new_wording=True
        ),
    ]
    dials = held_out_problems(world, {DIAL: 6 * num_problems // len(SIZES[DIAL])}, seed=1)
    tuned, sampled = {}, {}
    for name in course.models:
        speaking = load_speaking(NamedModel(course.folder(name), settings={"dtype": "float32"}))
        arguments = speaking.model, speaking.tokenizer, world
        if name in (THOUGHTS, DIRECT):
            tuned[name] = answer(*arguments, problems, RESPONSE_LENGTH)
        elif name in (MIXED, RL, SHUFFLED):
            sampled[name] = answer(*arguments, dials, RESPONSE_LENGTH, do_sample=True, seed=seed)
    probed, curves = probes_of_run(course.folder(PRETRAIN))
    metrics = {**tuned_metrics(tuned), **ppo_metrics(sampled), **probed}
    curves |= plots(tuned, histories_of(course))
    return Found(metrics, summary_of(metrics), tables(tuned, sampled), curves, (*PROMISES, *PROBED), PROMISES)


def histories_of(course: Course) -> dict[str, list[dict[str, float]]]:
    """Return the logs of the finished runs of PPO, by run."""
    logs = {name: Path(course.folder(name), STATE_FILE) for name in (RL, SHUFFLED) if name in course.runs}
    return {name: json.loads(path.read_text(encoding="utf-8"))["log_history"] for name, path in logs.items()}


# ---- judged answers ----


@dataclass(frozen=True)
class ProblemAnswer:
    """An answer and its judgment.

    Args:
        problem: the question.
        response: the whole text of the model.
        num_tokens: length of the response, without its final token.
        is_right: whether the answer, apart from the thought, is right.
        thinks: whether there is a thought, finished or not.
        steps: validity of all steps of the thought; empty without a thought.
    """

    problem: Problem
    response: str
    num_tokens: int
    is_right: bool
    thinks: bool
    steps: tuple[bool, ...]

    @property
    def is_valid(self) -> bool:
        """Whether all steps of the thought are valid, and none is missing."""
        return is_valid(self.steps)


def held_out_problems(
    world: World,
    per_size: Mapping[str, int],
    seed: int = 0,
    sizes: Mapping[str, Sequence[int]] = SIZES,
    new_wording: bool = False,
) -> list[Problem]:
    """Return different problems excluded from training: up to a given number of each size.

    There are only few questions of hops, thus the result may have fewer of them.

    Args:
        per_size: their number, by family; other families are left out.
        sizes: the sizes of each family, by default those of training.
        new_wording: ask in words unseen in training.
    """
    rng, result = random.Random(f"reasoning-evaluation-{world.seed}-{seed}"), []
    for family, count in per_size.items():
        for size in sizes[family]:
            draw = partial(draw_problem, world.facts, world.relations, rng, family, HELD_OUT, (size,), new_wording)
            result += draw_distinct(draw, attrgetter("key"), count)
    return result


def is_dial(problem: Problem) -> bool:
    """Return whether a problem is one of the dial, with as many turns and in such words as in training."""
    return problem.family == DIAL and problem.size in SIZES[DIAL] and not problem.is_new_wording


def has_unseen_size(problem: Problem, size: int) -> bool:
    """Return whether a problem is one of the dial with `size` turns, more or fewer than in training."""
    return problem.family == DIAL and problem.size == size


def is_hops(problem: Problem) -> bool:
    """Return whether a problem is one of hops, in such words as in training."""
    return problem.family == HOPS and not problem.is_new_wording


def is_reworded(problem: Problem, family: str) -> bool:
    """Return whether a problem is one of a family in words that training never sees."""
    return problem.family == family and problem.is_new_wording


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    world: World,
    problems: Sequence[Problem],
    max_new_tokens: int,
    do_sample: bool = False,
    seed: int = 0,
) -> list[ProblemAnswer]:
    """Answer all problems, greedily or sampled at temperature 1, and judge the answers."""
    prompts = [problem.prompt_row()["prompt"] for problem in problems]
    responses = sample_responses(model, tokenizer, prompts, max_new_tokens, do_sample, seed=seed)
    texts = [texts[0] for texts in responses]
    # The texts have no special tokens, thus none is counted.
    lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [judged(world, *each) for each in zip(problems, texts, lengths, strict=True)]


def judged(world: World, problem: Problem, response: str, num_tokens: int) -> ProblemAnswer:
    """Return a response with its judgment."""
    thought, final_answer = split_thoughts(response)
    steps = () if thought is None else checked_steps(problem, thought, world.facts, world.relations)
    is_right = gold_score(final_answer, problem.gold) >= RIGHT
    return ProblemAnswer(problem, response, num_tokens, is_right, thought is not None, tuple(steps))


def values_of(answers: Sequence[ProblemAnswer]) -> dict[str, list[float]]:
    """Return measurements of some answers, one value per measured answer.

    `right` and `thinks` (of all), `valid` (of the right answers with a thought: whether it is valid), `steps` (of the
    answers with a thought: the share of its valid steps), `tokens` (of all) and `thought_tokens` (of the answers with
    a thought, to distinguish longer thoughts from more thoughts).
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


# ---- report ----
#
# The report on thoughts: their gain over direct answers, the effect of PPO on them, and the validity of their steps.


# Names of the models in the report.
TITLES = {
    THOUGHTS: "with thoughts",
    DIRECT: "direct answers",
    MIXED: "before PPO",
    RL: "PPO on right answers",
    SHUFFLED: "PPO, rewards by chance",
}
GROUPS: Mapping[str, Callable[[Problem], bool]] = {
    "hops": is_hops,
    "dial": is_dial,
    **{f"dial_{size}": partial(has_unseen_size, size=size) for size in UNSEEN_SIZES[DIAL]},
    **{f"{family}_reworded": partial(is_reworded, family=family) for family in (HOPS, DIAL)},
}
GROUP_TITLES = {
    "hops": "facts of two and three hops",
    "dial": f"dials of {SIZES[DIAL][0]} to {SIZES[DIAL][-1]} turns",
    **{f"dial_{size}": f"dials of {size} turns, as none in training" for size in UNSEEN_SIZES[DIAL]},
    **{"hops_reworded": "hops in new wordings", "dial_reworded": "dials in new wordings"},
    "right": "right answers",
    "thinks": "answers with a thought",
    "valid": "right answers whose thought is valid",
    "steps": "steps of thoughts that hold",
    "tokens": "tokens of an answer",
    "thought_tokens": "tokens of an answer with a thought",
}
# The figures in the report for each group.
OF_TUNED = ("right", "valid", "steps", "tokens")
SAMPLES = 8
# Accuracy of a guess: most hops end at an attribute, with as many values as there are numbers on the dial.
GUESS = 1 / NUMBERS_OF_DIAL
PROMISES = (
    *(
        Promise(f"{GROUP_TITLES[group]} answered right with thoughts", f"thoughts_{group}_right", control, beside)
        for group in GROUPS
        for control, beside in ((f"direct_{group}_right", "direct answers"), (GUESS, "a guess"))
    ),
    Promise("change of right answers by PPO", "right_change", 0.0, "no change"),
    Promise("change of answers with a thought by PPO", "thinks_change", 0.0, "no change"),
)

Answers = Mapping[str, Sequence[ProblemAnswer]]


def tuned_metrics(answers: Answers) -> dict[str, float]:
    """Return the metrics of the models after fine-tuning, from greedy answers: `MODEL_GROUP_FIGURE`.

    Figures without a value, such as figures of thoughts of a model without any, are left out.
    """
    metrics: dict[str, float] = {}
    for model, model_answers in answers.items():
        for group, is_member in GROUPS.items():
            values = values_of([each for each in model_answers if is_member(each.problem)])
            for name in OF_TUNED:
                if values[name]:
                    metrics |= mean_of(f"{model}_{group}_{name}", values[name])
    return metrics


def ppo_metrics(answers: Answers) -> dict[str, float]:
    """Return the metrics before and after PPO, from sampled answers to the same questions of the dial.

    Metrics of PPO on right answers are `right_before`, `right_after`, `right_change` and so on, for `right`,
    `thinks` and `tokens`; metrics of the control begin with `shuffled_`. `valid`, `steps` and `thought_tokens` are of
    the existing thoughts, about different questions for different models: `mixed_valid`, `rl_valid` and so on.
    """
    metrics: dict[str, float] = {}
    before = values_of(answers["mixed"])
    for model, prefix in (("rl", ""), ("shuffled", "shuffled_")):
        if model in answers:
            after = values_of(answers[model])
            for name in ("right", "thinks", "tokens"):
                metrics |= change_of(f"{prefix}{name}", before[name], after[name])
    for model, model_answers in answers.items():
        values = values_of(model_answers)
        for name in ("valid", "steps", "thought_tokens"):
            if values[name]:
                metrics |= mean_of(f"{model}_{name}", values[name])
    return metrics


def tables(tuned: Answers, sampled: Answers) -> dict[str, list[dict[str, str]]]:
    """Return the tables: right answers by size, figures of PPO, and some answers."""
    result = {
        "Right answers, greedy": _by_size(tuned),
        "PPO on dials, sampled answers": _side_by_side(sampled),
        "Answers": samples(tuned),
        "Answers before and after PPO, sampled": samples(sampled),
    }
    return {title: rows for title, rows in result.items() if rows}


def _by_size(answers: Answers) -> list[dict[str, str]]:
    """Return a row for each number of hops and turns: the models' shares of right answers."""
    rows = []
    for family in SIZES:
        for size in sorted((*SIZES[family], *UNSEEN_SIZES[family])):
            of_size = {
                model: [
                    float(each.is_right)
                    for each in model_answers
                    if each.problem.group == f"{family}_{size}" and not each.problem.is_new_wording
                ]
                for model, model_answers in answers.items()
            }
            counted = next(iter(of_size.values()))
            if counted:
                cells = {TITLES[model]: _cell(values) for model, values in of_size.items()}
                unit = "turns" if family == DIAL else "hops"
                rows.append({"question": f"{size} {unit}", **cells, "n": str(len(counted))})
    return rows


def _side_by_side(answers: Answers) -> list[dict[str, str]]:
    """Return a row for each figure: its values for all models."""
    result = {TITLES[model]: values_of(model_answers) for model, model_answers in answers.items()}
    names = next(iter(result.values()))
    return [
        {
            "figure": GROUP_TITLES[name],
            **{title: f"{_cell(values[name])} (n {len(values[name]):,})" for title, values in result.items()},
        }
        for name in names
    ]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    result = mean_of("value", values)
    return shown(result, "value")


def samples(answers: Answers) -> list[dict[str, str]]:
    """Return some questions with the answers of all models."""
    first_answers = next(iter(answers.values()))
    step = max(1, len(first_answers) // SAMPLES)
    return [
        {
            "prompt": first_answers[index].problem.question,
            **{TITLES[model]: each[index].response for model, each in answers.items()},
        }
        for index in range(0, len(first_answers), step)
    ]


# ---- plots ----


def plots(answers: Answers, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Plot]:
    """Return the plots: valid steps of thoughts; rewards and lengths over the episodes of PPO.

    Args:
        answers: after fine-tuning.
        histories: the logs of all runs of PPO.
    """
    return {"steps": _steps(answers), **ppo_plots(histories)}


def ppo_plots(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Plot]:
    """Return the plots of rewards and lengths over the episodes of PPO and its control."""
    return {
        "ppo_rewards": _over_episodes("Right answers during PPO", "share of sampled answers", "reward", histories),
        "ppo_lengths": _over_episodes("Length of answers during PPO", "tokens", "response_length", histories),
    }


def _steps(answers: Answers) -> Plot:
    """Return the share of thoughts with a valid step, by its position; a model without thoughts has no line."""
    lines = {}
    for model, model_answers in answers.items():
        # The initial number of the dial comes first, then one step per turn, and the end, which is left out.
        thoughts = [
            each.steps[: 1 + each.problem.size] for each in model_answers if is_dial(each.problem) and each.thinks
        ]
        at = [[steps[index] for steps in thoughts if len(steps) > index] for index in range(1 + max(SIZES[DIAL]))]
        shares = {index: sum(held) / len(held) for index, held in enumerate(at) if held}
        lines[TITLES[model]] = (list(shares), list(shares.values()))
    return Plot("Thoughts about held-out dials, greedy answers", "step", "share that holds", lines)


def _over_episodes(title: str, ylabel: str, key: str, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Plot:
    lines = {}
    for model, history in histories.items():
        training = [entry for entry in history if "episode" in entry]
        lines |= plot_history(training, {TITLES[model]: key}, x="episode", title="", xlabel="", ylabel="").lines
    return Plot(title, "episodes (sampled answers)", ylabel, lines)


def summary_of(metrics: Mapping[str, float]) -> str:
    """Return a summary of the results, in a sentence or two."""
    parts = []
    for group in GROUPS:
        shares = {
            model: shown(metrics, name)
            for model in ("direct", "thoughts")
            if (name := f"{model}_{group}_right") in metrics
        }
        parts.append(
            f"{GROUP_TITLES[group]}: " + ", ".join(f"{TITLES[each]} {value}" for each, value in shares.items())
        )
    for prefix, model in (("", "rl"), ("shuffled_", "shuffled")):
        if f"{prefix}right_change" in metrics:
            sides = [
                " to ".join(f"{metrics[f'{prefix}{name}_{side}']:.2f}" for side in ("before", "after"))
                for name in ("right", "thinks")
            ]
            parts.append(f"{TITLES[model]}: right {sides[0]}, thinking {sides[1]}")
    return "; ".join(parts)

"""The recipe on thoughts: the training rows of each run, and the questions to its models."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from hfllm.data.world.reasoning import DIAL, HOPS, PRACTICE, SHOWN, Problem, draw_problem
from hfllm.data.world.world import World
from hfllm.outputs.checkpoints import STATE_FILE
from hfllm.outputs.report import Found
from hfllm.runs.pipeline import Row, by_main_process, write_rows
from hfllm.stages.reason.flags import (
    DIRECT,
    MIXED,
    RESPONSE_LENGTH,
    RL,
    SHUFFLED,
    THOUGHTS,
    Course,
    ReasonArguments,
    data_file,
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


def write(script_args: ReasonArguments, name: str) -> None:
    """Write the rows of a run unless the file already has them; the other processes wait."""
    by_main_process(lambda: write_rows("reason", data_file(script_args, name), rows_of(script_args, name)))


def rows_of(script_args: ReasonArguments, name: str) -> list[Row]:
    """Return the rows of a run.

    Rows with and without thoughts have the same questions in the same order, thus both take the same number of
    steps. The model with occasional thoughts gets only dials, as PPO does.
    """
    if name in (THOUGHTS, DIRECT):
        problems = _problems(script_args, "sft", script_args.num_examples, SHARES, SHOWN)
        return _answered(problems, [name == THOUGHTS] * len(problems))
    if name == MIXED:
        problems = _problems(script_args, name, script_args.num_mixed_examples, {DIAL: 1}, SHOWN)
        rng = random.Random(f"reason-shown-{script_args.seed}")
        num_thoughts = round(script_args.share_of_thoughts * len(problems))
        return _answered(
            problems, rng.sample([True] * num_thoughts + [False] * (len(problems) - num_thoughts), len(problems))
        )
    assert name in (RL, SHUFFLED), name
    return [
        problem.prompt_row() for problem in _problems(script_args, RL, script_args.num_prompts, {DIAL: 1}, PRACTICE)
    ]


def _problems(
    script_args: ReasonArguments,
    name: str,
    count: int,
    shares: Mapping[str, int],
    part: str,
) -> list[Problem]:
    world = World(script_args.world_seed)
    rng = random.Random(f"reason-{name}-{world.seed}-{script_args.seed}")
    knowledge = world.facts, world.relations
    families = rng.choices(list(shares), list(shares.values()), k=count)
    return [draw_problem(*knowledge, rng, family, part) for family in families]


def _answered(problems: Iterable[Problem], shown: Iterable[bool]) -> list[Row]:
    """Return conversations of the problems with their model responses, with thoughts where shown."""
    return [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.response(shows_thought)},
            ]
        }
        for problem, shows_thought in zip(problems, shown, strict=True)
    ]


# ---- evaluation ----
#
# The gain by thoughts on the embedded world, and the effect of PPO on them.


def evaluate(script_args: ReasonArguments, course: Course) -> Found:
    """Ask all models held-out questions: after fine-tuning greedily, around PPO dials by samples. Judge answers."""
    from trl import ModelConfig

    world = World(script_args.world_seed)
    count = script_args.num_problems
    problems = held_out_problems(world, {HOPS: count, DIAL: 3 * count})
    dials = held_out_problems(world, {DIAL: 6 * count}, seed=1)
    tuned, sampled = {}, {}
    for name in course.models:
        speaking = load_speaking(course.folder(name), ModelConfig())
        arguments = speaking.model, speaking.tokenizer, world
        if name in (THOUGHTS, DIRECT):
            tuned[name] = answer(*arguments, problems, RESPONSE_LENGTH)
        elif name in (MIXED, RL, SHUFFLED):
            sampled[name] = answer(*arguments, dials, RESPONSE_LENGTH, do_sample=True, seed=script_args.seed)
    metrics = {**tuned_metrics(tuned), **ppo_metrics(sampled)}
    histories = {name: _history(course.folder(name)) for name in (RL, SHUFFLED) if name in course.runs}
    return Found(metrics, summary_of(metrics), tables(tuned, sampled), plots(tuned, histories), PROMISES)


def _history(folder: str) -> list[dict[str, float]]:
    """Return the log of a finished run."""
    return json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))["log_history"]

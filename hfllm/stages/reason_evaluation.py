"""What thoughts have gained on the embedded world, and what PPO has made of them."""

import json
from pathlib import Path

from hfllm.data.world.reasoning import DIAL, HOPS
from hfllm.data.world.world import World
from hfllm.evaluation.reasoning import answer, held_out_problems
from hfllm.evaluation.reasoning_report import PROMISES, plots, ppo_metrics, summary_of, tables, tuned_metrics
from hfllm.outputs.checkpoints import STATE_FILE
from hfllm.outputs.report import Found
from hfllm.stages.course import load_speaking
from hfllm.stages.reason import DIRECT, MIXED, RESPONSE_LENGTH, RL, SHUFFLED, THOUGHTS, Course, ReasonArguments


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
        told = speaking.model, speaking.tokenizer, world
        if name in (THOUGHTS, DIRECT):
            tuned[name] = answer(*told, problems, RESPONSE_LENGTH)
        elif name in (MIXED, RL, SHUFFLED):
            sampled[name] = answer(*told, dials, RESPONSE_LENGTH, do_sample=True, seed=script_args.seed)
    metrics = {**tuned_metrics(tuned), **ppo_metrics(sampled)}
    histories = {name: _history(course.folder(name)) for name in (RL, SHUFFLED) if name in course.runs}
    return Found(metrics, summary_of(metrics), tables(tuned, sampled), plots(tuned, histories), PROMISES)


def _history(folder: str) -> list[dict[str, float]]:
    """Return the log of a run that has finished."""
    return json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))["log_history"]

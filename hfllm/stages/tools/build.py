"""Learning to use tools step by step: rows for every run, and the models' answers to held-out questions."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfllm.data.world.tasks import (
    ASKED,
    CHANGED_FACT,
    NO_NEED,
    SHOWN_PART,
    SUM,
    UNKNOWN,
    Table,
    draw_tool_task,
    table_of,
)
from hfllm.data.world.world import World
from hfllm.environments.tools import ToolBox
from hfllm.outputs.report import write_atomically
from hfllm.runs.models import NamedModel
from hfllm.stages.shared import load_speaking
from hfllm.stages.tools.flags import PLAIN, PRETRAIN, RL, SHOWN, Course, table_file
from hfllm.stages.tools.report import OFF, JudgedEpisode, answer, held_out_questions, tools_of

# ---- data ----
#
# The rows of each run of the tools recipe: demonstrations, questions for PPO, and rows for a model without tools.


Row = dict[str, Any]
# Relative frequencies of the families in demonstrations and questions.
WEIGHTS = {
    **{UNKNOWN: 7, CHANGED_FACT: 3, SUM: 4},
    **{"fact": 4, "reading": 2, "list": 2, "addition": 3},
}
# Share of people who call tools where needed, among demonstrations with tools in the prompt; the others answer from
# memory. And the share of demonstrations without tools, among all.
CALLS, WITHOUT_TOOLS = 0.5, 0.15
# The days of the look-up tool's facts, in training and in evaluation.
TRAINING_DAY, EVALUATION_DAY = 1, 2


def tables(world: World) -> tuple[Table, Table]:
    """Return the look-up tool's facts in training and in evaluation; no changed fact is the same in both."""
    training = table_of(world, TRAINING_DAY)
    return training, table_of(world, EVALUATION_DAY, training)


def demonstrations(world: World, count: int, seed: int) -> list[tuple[str, Row]]:
    """Return families and conversations of people with tools, half of them with calls, and of some without tools.

    The tools are JSON text, as datasets with a column `tools` have them.
    """
    tools = json.dumps(ToolBox(tools_of({})).schemas)
    rng = random.Random(f"tools-shown-{world.seed}-{seed}")
    rows = []
    for family in _families(rng, count):
        task = draw_tool_task(world, rng, family, SHOWN_PART)
        has_tools = rng.random() >= WITHOUT_TOOLS
        messages = task.messages(calls=has_tools and rng.random() < CALLS)
        rows.append((family, {"messages": messages, "tools": tools if has_tools else None}))
    return rows


def prompts(world: World, count: int, seed: int) -> list[Row]:
    """Return the questions for PPO, with their gold answers by the table of training."""
    table, _ = tables(world)
    rng = random.Random(f"tools-asked-{world.seed}-{seed}")
    families = _families(rng, count)
    return [draw_tool_task(world, rng, family, ASKED, table).task.prompt_row() for family in families]


def _families(rng: random.Random, count: int) -> Sequence[str]:
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)


def rows_by_run(
    world: World, num_demonstrations: int, num_prompts: int, seed: int, output_dir: str
) -> dict[str, Callable[[], list[Row]]]:
    """Return what makes the rows of the world's runs, by run. The rows of PPO come with its look-up tool's table."""

    def plain() -> list[Row]:
        """Return the demonstrations without need of a tool, in their form without tools."""
        pairs = demonstrations(world, num_demonstrations, seed)
        return [{"messages": row["messages"]} for family, row in pairs if family in NO_NEED]

    def questions() -> list[Row]:
        _write_table(table_file(output_dir), tables(world)[0])
        return prompts(world, num_prompts, seed)

    return {
        SHOWN: lambda: [row for _, row in demonstrations(world, num_demonstrations, seed)],
        RL: questions,
        PLAIN: plain,
    }


def _write_table(path: Path, table: Table) -> None:
    text = json.dumps(table)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


# ---- evaluation ----


def ask_models(
    course: Course, like: NamedModel, world: World, count: int, seed: int
) -> dict[str, list[JudgedEpisode]]:
    """Return the world's models' answers: of all greedily, around PPO also sampled, of the last without tools.

    Args:
        course: the finished runs.
        like: a model with the same attention, dtype and quantization.
        world: source of the questions.
        count: questions per family.
        seed: of the sampling.

    Returns:
        The answers under the names of the runs, `NAME sampled`, and `off`.
    """
    table = tables(world)[1]
    questions = held_out_questions(world, table, count)
    answers: dict[str, list[JudgedEpisode]] = {}
    for name in course.runs:
        if name == PRETRAIN:
            continue
        speaking = load_speaking(replace(like, name=course.folder(name), revision="main"))
        model = (speaking.model, speaking.tokenizer, questions)
        if name == PLAIN:
            answers[name] = answer(*model, None)
            continue
        answers[name] = answer(*model, table)
        answers[f"{name} sampled"] = answer(*model, table, do_sample=True, seed=seed)
        if name == RL:
            answers[OFF] = answer(*model, None)
    return answers

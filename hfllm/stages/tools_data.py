"""The rows of each run of the tools recipe: what people show, what PPO asks, and what a model without tools learns."""

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from hfllm.stages.tools import ToolsArguments

Row = dict[str, Any]
# The families in the shares in which they are shown and asked.
WEIGHTS = {
    **{UNKNOWN: 7, CHANGED_FACT: 3, SUM: 4},
    **{"fact": 4, "reading": 2, "list": 2, "addition": 3},
}
# Of the demonstrations with tools in the prompt, those of people who call them where they should; the others answer
# from memory. And of all demonstrations, those without tools.
CALLS, WITHOUT_TOOLS = 0.5, 0.15
# The days of which the look-up tool tells, in training and in evaluation.
TRAINING_DAY, EVALUATION_DAY = 1, 2


def tables(world: World) -> tuple[Table, Table]:
    """Return what the look-up tool knows in training and in evaluation; no changed fact is the same in both."""
    training = table_of(world, TRAINING_DAY)
    return training, table_of(world, EVALUATION_DAY, training)


def tools_column() -> str:
    """Return the schemas of the world's tools as JSON text, as datasets with a column `tools` have them."""
    from hfllm.environments.tools import ToolBox
    from hfllm.evaluation.tools import tools_of

    return json.dumps(ToolBox(tools_of({})).schemas)


def demonstrations(script_args: "ToolsArguments", calls: float = CALLS) -> list[Row]:
    """Return conversations of people with tools, of whom a share `calls` uses them, and of some who have none."""
    world, tools = World(script_args.world_seed), tools_column()
    rng = random.Random(f"tools-shown-{world.seed}-{script_args.seed}")
    rows = []
    for family in _families(rng, script_args.num_demonstrations):
        task = draw_tool_task(world, rng, family, SHOWN_PART)
        has_tools = rng.random() >= WITHOUT_TOOLS
        messages = task.messages(calls=has_tools and rng.random() < calls)
        rows.append({"messages": messages, "tools": tools if has_tools else None})
    return rows


def demonstrations_without(script_args: "ToolsArguments") -> list[Row]:
    """Return those of the demonstrations that need no tool, as they are without any: a control."""
    return [
        {"messages": row["messages"]}
        for row, family in zip(demonstrations(script_args), _shown_families(script_args), strict=True)
        if family in NO_NEED
    ]


def prompts(script_args: "ToolsArguments") -> list[Row]:
    """Return the questions that PPO asks, with their gold answers by the table of training."""
    world = World(script_args.world_seed)
    table, _ = tables(world)
    rng = random.Random(f"tools-asked-{world.seed}-{script_args.seed}")
    families = _families(rng, script_args.num_prompts)
    return [draw_tool_task(world, rng, family, ASKED, table).task.prompt_row() for family in families]


def _families(rng: random.Random, count: int) -> Sequence[str]:
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)


def _shown_families(script_args: "ToolsArguments") -> Sequence[str]:
    rng = random.Random(f"tools-shown-{script_args.world_seed}-{script_args.seed}")
    return _families(rng, script_args.num_demonstrations)

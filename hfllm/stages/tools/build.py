"""Learning to use tools step by step: each run gets its rows, and the models answer what is held out."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from hfllm.environments.tools import ToolBox
from hfllm.outputs.report import Found, write_atomically
from hfllm.runs.pipeline import by_main_process, write_rows
from hfllm.stages.shared import load_speaking
from hfllm.stages.tools.flags import (
    PLAIN,
    PRETRAIN,
    RL,
    SHOWN,
    SHUFFLED,
    Course,
    ToolsArguments,
    data_file,
    table_file,
)
from hfllm.stages.tools.report import Answered, answer, questions_to_ask, report, tools_of

if TYPE_CHECKING:
    from trl import ModelConfig


# ---- data ----
#
# The rows of each run of the tools recipe: what people show, what PPO asks, and what a model without tools learns.


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
    return json.dumps(ToolBox(tools_of({})).schemas)


def demonstrations(script_args: ToolsArguments, calls: float = CALLS) -> list[Row]:
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


def demonstrations_without(script_args: ToolsArguments) -> list[Row]:
    """Return those of the demonstrations that need no tool, as they are without any: a control."""
    return [
        {"messages": row["messages"]}
        for row, family in zip(demonstrations(script_args), _shown_families(script_args), strict=True)
        if family in NO_NEED
    ]


def prompts(script_args: ToolsArguments) -> list[Row]:
    """Return the questions that PPO asks, with their gold answers by the table of training."""
    world = World(script_args.world_seed)
    table, _ = tables(world)
    rng = random.Random(f"tools-asked-{world.seed}-{script_args.seed}")
    families = _families(rng, script_args.num_prompts)
    return [draw_tool_task(world, rng, family, ASKED, table).task.prompt_row() for family in families]


def _families(rng: random.Random, count: int) -> Sequence[str]:
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)


def _shown_families(script_args: ToolsArguments) -> Sequence[str]:
    rng = random.Random(f"tools-shown-{script_args.world_seed}-{script_args.seed}")
    return _families(rng, script_args.num_demonstrations)


# ---- steps ----


@dataclass
class Steps:
    """The course of one recipe's run, step by step.

    Args:
        script_args, model_args: its flags.
        course: the runs of other recipes.

    Attributes:
        metrics: of the runs, by their names.
    """

    script_args: ToolsArguments
    model_args: "ModelConfig"
    course: Course
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def show(self) -> None:
        """Make a model that calls tools half of the time: a base model learns from people who do."""
        if self.script_args.is_world:
            self._run(PRETRAIN)
            self._rows(SHOWN, lambda: demonstrations(self.script_args))
        if SHOWN in self.course.runs:
            self._run(SHOWN)

    def reinforce(self) -> None:
        """Let PPO find out that calls pay."""
        if self.script_args.is_world:
            by_main_process(self._write_table)
            self._rows(RL, lambda: prompts(self.script_args))
        self._run(RL)

    def controls(self) -> None:
        """Run the arms: rewards that are shuffled, and a model that never sees a tool."""
        if SHUFFLED in self.course.runs:
            self._run(SHUFFLED)
        if PLAIN in self.course.runs:
            self._rows(PLAIN, lambda: demonstrations_without(self.script_args))
            self._run(PLAIN)

    def _run(self, name: str) -> None:
        self.metrics[name] = self.course.run(name)

    def _rows(self, name: str, make: Callable[[], list[Row]]) -> None:
        by_main_process(lambda: write_rows("tools", data_file(self.script_args, name), make()))

    def _write_table(self) -> None:
        path = table_file(self.script_args)
        text = json.dumps(tables(World(self.script_args.world_seed))[0])
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)

    def answers(self) -> dict[str, list[Answered]]:
        """Return what the world's models answer: each greedily, those of PPO also sampled, the last without tools.

        Names are those of the runs, `NAME sampled`, and `off`.
        """
        script_args = self.script_args
        world = World(script_args.world_seed)
        table = tables(world)[1]
        questions = questions_to_ask(world, table, script_args.num_eval_prompts)
        result: dict[str, list[Answered]] = {}
        for name in (SHOWN, RL, SHUFFLED, PLAIN):
            if not self.course.has_made(name):
                continue
            speaking = load_speaking(self.course.folder(name), self.model_args)
            model = (speaking.model, speaking.tokenizer, questions)
            if name == PLAIN:
                result[name] = answer(*model, None)
                continue
            result[name] = answer(*model, table)
            result[f"{name} sampled"] = answer(*model, table, do_sample=True, seed=script_args.seed)
            if name == RL:
                result["off"] = answer(*model, None)
        return result

    @property
    def artifacts(self) -> dict[str, str]:
        """What the output folder holds, by path."""
        return {name: name for name in self.course.runs if self.course.has_made(name)}


# ---- evaluation ----
#
# What learning to use tools has changed: on the embedded world exactly, on your questions by your rewards.


def evaluate(steps: Steps) -> Found:
    """Return the report: of the world's models by what they answer, of yours by what PPO measured itself."""
    return report(steps.answers()) if steps.script_args.is_world else Found(steps.metrics[RL], "", {}, {})

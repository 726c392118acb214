"""Learning to use tools step by step: rows for every run, and the models' answers to held-out questions."""

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


def tools_column() -> str:
    """Return the schemas of the world's tools as JSON text, as datasets with a column `tools` have them."""
    return json.dumps(ToolBox(tools_of({})).schemas)


def demonstrations(script_args: ToolsArguments, calls: float = CALLS) -> list[Row]:
    """Return conversations of people with tools, a share `calls` with calls, and of some without tools."""
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
    """Return the demonstrations without need of a tool, in their form without tools: a control."""
    return [
        {"messages": row["messages"]}
        for row, family in zip(demonstrations(script_args), _shown_families(script_args), strict=True)
        if family in NO_NEED
    ]


def prompts(script_args: ToolsArguments) -> list[Row]:
    """Return the questions for PPO, with their gold answers by the table of training."""
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
    """The pipeline of one recipe's run, step by step.

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
        """Make a model with tool calls half of the time: a base model trained on people who do so."""
        if self.script_args.is_world:
            self._run(PRETRAIN)
            self._rows(SHOWN, lambda: demonstrations(self.script_args))
        if SHOWN in self.course.runs:
            self._run(SHOWN)

    def reinforce(self) -> None:
        """Let PPO find out the benefit of calls."""
        if self.script_args.is_world:
            by_main_process(self._write_table)
            self._rows(RL, lambda: prompts(self.script_args))
        self._run(RL)

    def controls(self) -> None:
        """Run the controls: shuffled rewards, and a model without tools in training."""
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
        """Return the world's models' answers: of all greedily, around PPO also sampled, of the last without tools.

        Names are the names of the runs, `NAME sampled`, and `off`.
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
        """The contents of the output folder, by path."""
        return {name: name for name in self.course.runs if self.course.has_made(name)}


# ---- evaluation ----
#
# The effect of learning to use tools: exact on the embedded world, by the user's rewards on the user's questions.


def evaluate(steps: Steps) -> Found:
    """Return the report: of the world's models by their answers, of the user's by PPO's own measurements."""
    return report(steps.answers()) if steps.script_args.is_world else Found(steps.metrics[RL], "", {}, {})

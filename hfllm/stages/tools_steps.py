"""Learning to use tools step by step: each run gets its rows, and the models answer what is held out."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfllm.data.world.world import World
from hfllm.evaluation.tools import Answered, answer, questions_to_ask
from hfllm.outputs.report import write_atomically
from hfllm.stages import tools_data
from hfllm.stages.course import by_main_process, load_speaking, write_rows
from hfllm.stages.tools import PLAIN, SHUFFLED, ToolsArguments, data_file, table_file
from hfllm.stages.tools_runs import PRETRAIN, RL, SHOWN, Course

if TYPE_CHECKING:
    from trl import ModelConfig


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
            self._rows(SHOWN, lambda: tools_data.demonstrations(self.script_args))
        if SHOWN in self.course.runs:
            self._run(SHOWN)

    def reinforce(self) -> None:
        """Let PPO find out that calls pay."""
        if self.script_args.is_world:
            by_main_process(self._write_table)
            self._rows(RL, lambda: tools_data.prompts(self.script_args))
        self._run(RL)

    def controls(self) -> None:
        """Run the arms: rewards that are shuffled, and a model that never sees a tool."""
        if SHUFFLED in self.course.runs:
            self._run(SHUFFLED)
        if PLAIN in self.course.runs:
            self._rows(PLAIN, lambda: tools_data.demonstrations_without(self.script_args))
            self._run(PLAIN)

    def _run(self, name: str) -> None:
        self.metrics[name] = self.course.run(name)

    def _rows(self, name: str, make: Callable[[], list[tools_data.Row]]) -> None:
        by_main_process(lambda: write_rows("tools", data_file(self.script_args, name), make()))

    def _write_table(self) -> None:
        path = table_file(self.script_args)
        text = json.dumps(tools_data.tables(World(self.script_args.world_seed))[0])
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)

    def answers(self) -> dict[str, list[Answered]]:
        """Return what the world's models answer: each greedily, those of PPO also sampled, the last without tools.

        Names are those of the runs, `NAME sampled`, and `off`.
        """
        script_args = self.script_args
        world = World(script_args.world_seed)
        table = tools_data.tables(world)[1]
        asked = questions_to_ask(world, table, script_args.num_eval_prompts)
        found: dict[str, list[Answered]] = {}
        for name in (SHOWN, RL, SHUFFLED, PLAIN):
            if not self.course.has_made(name):
                continue
            speaking = load_speaking(self.course.folder(name), self.model_args)
            model = (speaking.model, speaking.tokenizer, asked)
            if name == PLAIN:
                found[name] = answer(*model, None)
                continue
            found[name] = answer(*model, table)
            found[f"{name} sampled"] = answer(*model, table, do_sample=True, seed=script_args.seed)
            if name == RL:
                found["off"] = answer(*model, None)
        return found

    @property
    def artifacts(self) -> dict[str, str]:
        """What the output folder holds, by path."""
        return {name: name for name in self.course.runs if self.course.has_made(name)}

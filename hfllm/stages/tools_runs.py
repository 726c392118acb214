"""The runs of other recipes that learning to use tools consists of, each in a folder of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.data.loading import RowArguments
from hfllm.runs.recipes import settings_file
from hfllm.stages import course
from hfllm.stages.constitution import flags_for_all
from hfllm.stages.tools import PLAIN, SHUFFLED, ToolsArguments, data_file, given_words, table_file

if TYPE_CHECKING:
    from trl import ModelConfig

PRETRAIN, SHOWN, RL = "pretrain", "shown", "rl"
# About how long each takes on two cores, in minutes.
MINUTES = {PRETRAIN: 2.5, SHOWN: 1, RL: 1, SHUFFLED: 1, PLAIN: 0.3}


@dataclass(frozen=True)
class Course(course.Course):
    """The runs of the recipe.

    Args:
        named: the user's model, where one is named.
    """

    named: str | None
    stage = "tools"
    minutes = MINUTES

    @property
    def is_timed(self) -> bool:
        """Whether the settings are those that were timed."""
        return self.named is None


def course_of(script_args: ToolsArguments, model_args: "ModelConfig") -> Course:
    """Return the runs that the flags ask for.

    Raises:
        InputError: when a config of one of them is wrong.
    """
    named = model_args.model_name_or_path
    runs = _own_runs(script_args, model_args) if named else _runs_of_world(script_args)
    return Course(*course.parsed_runs(runs, script_args.output_dir, script_args.seed), named)


def _runs_of_world(script_args: ToolsArguments) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name of each run, its recipe, and its flags but for seed and folder."""

    def learning(run: str, config: str, start: str) -> list[str]:
        file = getattr(script_args, f"{config}_config") or str(settings_file(f"tools/{config}.yaml"))
        model = str(Path(script_args.output_dir, start))
        return [*("--config", file, "--model_name_or_path", model), *("--dataset_name", _rows(script_args, run))]

    def reinforced(run: str, reward: str) -> tuple[str, str, list[str]]:
        tools = ["--tools", "calculator", f"lookup:{table_file(script_args)}"]
        return run, "rlhf", [*learning(run, "rlhf", SHOWN), *tools, "--reward_funcs", reward]

    config = script_args.pretrain_config or str(settings_file("tools/pretrain.yaml"))
    yield PRETRAIN, "pretrain", ["--config", config, "--world_seed", str(script_args.world_seed)]
    yield SHOWN, "sft", learning(SHOWN, "sft", PRETRAIN)
    yield reinforced(RL, "gold")
    if SHUFFLED in script_args.arms:
        yield reinforced(SHUFFLED, "shuffled_gold")
    if PLAIN in script_args.arms:
        yield PLAIN, "sft", learning(PLAIN, "sft", PRETRAIN)


def _rows(script_args: ToolsArguments, run: str) -> str:
    # Both arms of PPO ask the same questions.
    return str(data_file(script_args, RL if run == SHUFFLED else run))


def _own_runs(script_args: ToolsArguments, model_args: "ModelConfig") -> Iterator[tuple[str, str, list[str]]]:
    """Yield the runs of the user's own model, as `_runs_of_world` does."""
    model, demonstrations = given_words(model_args), script_args.demonstrations_dataset_name
    if demonstrations:
        config = ["--config", script_args.sft_config] if script_args.sft_config else []
        yield SHOWN, "sft", [*config, *model, "--dataset_name", demonstrations]
        # An adapter that the demonstrations have made is trained further.
        model = ["--model_name_or_path", str(Path(script_args.output_dir, SHOWN)), *flags_for_all(model_args)]
    config = ["--config", script_args.rlhf_config] if script_args.rlhf_config else []
    of_rows = RowArguments.__dataclass_fields__
    rows = given_words(script_args, [name for name in ToolsArguments.__dataclass_fields__ if name not in of_rows])
    tools = ["--tools", *script_args.tools, "--reward_funcs", *script_args.reward_funcs]
    yield RL, "rlhf", [*config, *model, *rows, *tools, "--num_eval_prompts", str(script_args.num_eval_prompts)]

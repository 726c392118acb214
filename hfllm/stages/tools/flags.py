"""Learning to use tools: its flags, its checks, and its runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError
from hfllm.flags import NAMED, SEED, UNNAMED, at_least, check_flags, flag
from hfllm.runs import pipeline
from hfllm.runs.arguments import flags_for_all, given_words
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from trl import ModelConfig


# ---- flags ----


# Controls of the world: PPO by rewards shuffled among the answers, and a model without tools in training.
SHUFFLED, PLAIN = CONTROLS = ("shuffled", "plain")
# Reasons for flags of the user's own model, and of the world's, to have no effect.
OF_THE_WORLD, IS_WORLDS = "the model and its tools are the embedded world's", "it is of the embedded world's model"


@dataclass(frozen=True)
class ToolsArguments(RowArguments, RemoteCodeArguments):
    """Questions, tools, and how much people show of them."""

    output_dir: str = flag("outputs/tools", "Where the models, the data and the report go.")
    seed: int = flag(42, "Of data and weights: the same seed, the same result.", takes=SEED)
    tools: list[str] | None = flag(
        None,
        "Functions that your model may call: path/to/file.py:function, calculator, or lookup:table.json.",
        never=UNNAMED.because(OF_THE_WORLD),
    )
    reward_funcs: list[str] | None = flag(
        None, "Rewards of your own: path/to/file.py:function.", never=UNNAMED.because(OF_THE_WORLD)
    )
    demonstrations_dataset_name: str | None = flag(
        None,
        "Conversations with calls of tools that your model learns from before PPO.",
        never=UNNAMED.because(OF_THE_WORLD),
    )
    controls: list[str] | None = flag(
        None,
        "Arms of the embedded world: shuffled (PPO by shuffled rewards, which must not gain), plain (a "
        "model without tools), or none; by default both.",
        some_of=CONTROLS,
        never=NAMED.because(IS_WORLDS),
    )
    num_demonstrations: int = flag(
        12000, "Demonstrations of the embedded world.", takes=at_least(1), never=NAMED.because(IS_WORLDS)
    )
    num_prompts: int = flag(
        4000, "Questions of the embedded world that PPO asks.", takes=at_least(1), never=NAMED.because(IS_WORLDS)
    )
    num_eval_prompts: int = flag(100, "Held-out questions of each family, at most.", takes=at_least(1))
    pretrain_config: str | None = flag(None, "YAML flags of the pretraining run.", never=NAMED.because(IS_WORLDS))
    sft_config: str | None = flag(None, "YAML flags of fine-tuning on demonstrations.")
    rlhf_config: str | None = flag(None, "YAML flags of the run of PPO.")

    takes_any_column: ClassVar[bool] = True

    @property
    def is_world(self) -> bool:
        """Whether the questions are the embedded world's."""
        return self.dataset_name == WORLD

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        chosen = CONTROLS if self.controls is None else self.controls
        return tuple(arm for arm in CONTROLS if arm in chosen) if self.is_world else ()


def check(script_args: ToolsArguments, model_args: "ModelConfig") -> None:
    """Refuse flags without effect and contradictory flags."""
    check_flags(script_args, model_args)
    named = bool(model_args.model_name_or_path)
    if named and script_args.is_world:
        raise InputError("--model_name_or_path needs --dataset_name: prompts, for instance a JSON Lines of `prompt`")
    if not named and not script_args.is_world:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs --model_name_or_path: the embedded world's model does "
            "not know such prompts"
        )
    for name in ("tools", "reward_funcs") if named else ():
        if not getattr(script_args, name):
            raise InputError(f"--model_name_or_path {model_args.model_name_or_path} needs --{name}")


def data_file(script_args: ToolsArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def table_file(script_args: ToolsArguments) -> Path:
    """Return the file of the look-up tool's facts in training."""
    return Path(script_args.output_dir, "data", "table.json")


# ---- runs ----
#
# The runs of other recipes in learning to use tools, each in its own folder.


PRETRAIN, SHOWN, RL = "pretrain", "shown", "rl"
# Approximate times of the runs on two cores, in minutes.
MINUTES = {PRETRAIN: 2.5, SHOWN: 1, RL: 1, SHUFFLED: 1, PLAIN: 0.3}


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe.

    Args:
        named: the user's model, if named.
    """

    named: str | None
    stage = "tools"
    minutes = MINUTES

    @property
    def is_timed(self) -> bool:
        """Whether the settings are the timed ones."""
        return self.named is None


def course_of(script_args: ToolsArguments, model_args: "ModelConfig") -> Course:
    """Return the runs selected by the flags."""
    named = model_args.model_name_or_path
    runs = _own_runs(script_args, model_args) if named else _runs_of_world(script_args)
    return Course(*pipeline.parsed_runs(runs, script_args.output_dir, script_args.seed), named)


def _runs_of_world(script_args: ToolsArguments) -> Iterator[tuple[str, str, list[str]]]:
    """Yield names, recipes and flags of the runs, except seed and folder."""

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
    # PPO and its control ask the same questions.
    return str(data_file(script_args, RL if run == SHUFFLED else run))


def _own_runs(script_args: ToolsArguments, model_args: "ModelConfig") -> Iterator[tuple[str, str, list[str]]]:
    """Yield the runs of the user's own model, as `_runs_of_world` does."""
    model, demonstrations = given_words(model_args), script_args.demonstrations_dataset_name
    if demonstrations:
        config = ["--config", script_args.sft_config] if script_args.sft_config else []
        yield SHOWN, "sft", [*config, *model, "--dataset_name", demonstrations]
        # The adapter trained on the demonstrations is trained further.
        model = ["--model_name_or_path", str(Path(script_args.output_dir, SHOWN)), *flags_for_all(model_args)]
    config = ["--config", script_args.rlhf_config] if script_args.rlhf_config else []
    of_rows = RowArguments.__dataclass_fields__
    rows = given_words(script_args, [name for name in ToolsArguments.__dataclass_fields__ if name not in of_rows])
    tools = ["--tools", *script_args.tools, "--reward_funcs", *script_args.reward_funcs]
    yield RL, "rlhf", [*config, *model, *rows, *tools, "--num_eval_prompts", str(script_args.num_eval_prompts)]

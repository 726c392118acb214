"""Learning to use tools: its flags, its checks, and its runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import FOREIGN_PROMPTS, RowArguments
from hfllm.data.sources import WORLD
from hfllm.flags import NAMED, SEED, UNNAMED, WORLD_GROUP, Clashes, at_least, flag, flags_for_all, given_words
from hfllm.runs import pipeline
from hfllm.runs.flags import RemoteCodeArguments
from hfllm.runs.recipes import settings_file
from hfllm.stages.rlhf.flags import TOOLS

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
    tools: list[str] | None = flag(None, TOOLS, never=UNNAMED.because(OF_THE_WORLD))
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
        group=WORLD_GROUP,
    )
    num_demonstrations: int = flag(
        12000,
        "Demonstrations of the embedded world.",
        takes=at_least(1),
        never=NAMED.because(IS_WORLDS),
        group=WORLD_GROUP,
    )
    num_prompts: int = flag(
        4000,
        "Questions of the embedded world that PPO asks.",
        takes=at_least(1),
        never=NAMED.because(IS_WORLDS),
        group=WORLD_GROUP,
    )
    num_eval_prompts: int = flag(100, "Held-out questions of each kind, at most.", takes=at_least(1))
    pretrain_config: str | None = flag(
        None, "YAML flags of the pretraining run.", never=NAMED.because(IS_WORLDS), group=WORLD_GROUP
    )
    sft_config: str | None = flag(None, "YAML flags of fine-tuning on demonstrations.")
    rlhf_config: str | None = flag(None, "YAML flags of the run of PPO.")

    takes_any_column: ClassVar[bool] = True
    clashes: ClassVar[Clashes] = {
        "--model_name_or_path needs --dataset_name: prompts, for instance a JSON Lines of `prompt`": lambda flags: (
            NAMED.holds(flags) and flags.is_world
        ),
        FOREIGN_PROMPTS: lambda flags: not (flags.model_name_or_path or flags.is_world),
        "--model_name_or_path {model_name_or_path} needs --tools": lambda flags: (
            NAMED.holds(flags) and not flags.tools
        ),
        "--model_name_or_path {model_name_or_path} needs --reward_funcs": lambda flags: (
            NAMED.holds(flags) and not flags.reward_funcs
        ),
    }

    @property
    def is_world(self) -> bool:
        """Whether the questions are the embedded world's."""
        return self.dataset_name == WORLD

    @property
    def arms(self) -> tuple[str, ...]:
        """The selected controls, in their order."""
        chosen = CONTROLS if self.controls is None else self.controls
        return tuple(arm for arm in CONTROLS if arm in chosen) if self.is_world else ()


def table_file(output_dir: str) -> Path:
    """Return the file of the look-up tool's facts in training."""
    return Path(output_dir, "data", "table.json")


# ---- runs ----
#
# The runs of other recipes in learning to use tools, each in its own folder.


PRETRAIN, SHOWN, RL = "pretrain", "shown", "rl"


@dataclass(frozen=True)
class Course(pipeline.Course):
    """The runs of the recipe."""

    stage = "tools"
    minutes = {PRETRAIN: 2.5, SHOWN: 1, RL: 0.7, SHUFFLED: 0.7, PLAIN: 0.5}


def course_of(script_args: ToolsArguments, model_args: "ModelConfig") -> Course:
    """Return the runs selected by the flags."""
    named, output_dir, configs = model_args.model_name_or_path, script_args.output_dir, {}
    for recipe in ("pretrain", "sft", "rlhf"):
        file = getattr(script_args, f"{recipe}_config") or (None if named else settings_file(f"tools/{recipe}.yaml"))
        configs[recipe] = ["--config", str(file)] if file else []
    if not named:
        runs = [*_runs_of_world(output_dir, configs, script_args.world_seed, script_args.arms)]
    else:
        runs, words = [], given_words(model_args)
        if demonstrations := script_args.demonstrations_dataset_name:
            runs = [(SHOWN, "sft", [*configs["sft"], *words, "--dataset_name", demonstrations])]
            # The adapter trained on the demonstrations is trained further.
            words = ["--model_name_or_path", str(Path(output_dir, SHOWN)), *flags_for_all(model_args)]
        own_flags = ToolsArguments.__dataclass_fields__.keys() - RowArguments.__dataclass_fields__
        words += given_words(script_args, without=[*own_flags])
        # Tools need conversations: a text is a user's turn.
        words += ["--tools", *script_args.tools, "--reward_funcs", *script_args.reward_funcs, "--apply_chat_template"]
        words += ["--num_eval_prompts", str(script_args.num_eval_prompts)]
        runs.append((RL, "rlhf", [*configs["rlhf"], *words]))
    return Course(*pipeline.parsed_runs(runs, output_dir, script_args.seed), named)


def _runs_of_world(
    output_dir: str, configs: Mapping[str, list[str]], world_seed: int, arms: Sequence[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield names, recipes and flags of the runs, except seed and folder.

    Args:
        configs: by recipe the words of its YAML file.
    """

    def learning(run: str, recipe: str, start: str, *words: str) -> tuple[str, str, list[str]]:
        # PPO and its control ask the same questions.
        rows = str(pipeline.data_file(output_dir, RL if run == SHUFFLED else run))
        model = str(Path(output_dir, start))
        return run, recipe, [*configs[recipe], "--model_name_or_path", model, "--dataset_name", rows, *words]

    tools = ("--tools", "calculator", f"lookup:{table_file(output_dir)}")
    yield PRETRAIN, "pretrain", [*configs["pretrain"], "--world_seed", str(world_seed)]
    yield learning(SHOWN, "sft", PRETRAIN)
    yield learning(RL, "rlhf", SHOWN, *tools, "--reward_funcs", "gold")
    if SHUFFLED in arms:
        yield learning(SHUFFLED, "rlhf", SHOWN, *tools, "--reward_funcs", "shuffled_gold")
    if PLAIN in arms:
        yield learning(PLAIN, "sft", PRETRAIN)

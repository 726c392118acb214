"""Learning to use tools: its flags, and what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import RowArguments
from hfllm.data.sources import WORLD
from hfllm.errors import InputError, refuse
from hfllm.runs.flags import RemoteCodeArguments

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from trl import ModelConfig

# Arms of the world: PPO by rewards that are shuffled among the answers, and a model that never sees a tool.
SHUFFLED, PLAIN = CONTROLS = ("shuffled", "plain")
AT_LEAST_ONE = ("num_demonstrations", "num_prompts", "num_eval_prompts")
# What there is of your own model alone, and of the world's alone.
OWN = ("tools", "reward_funcs", "demonstrations_dataset_name")
OF_WORLD = ("controls", "pretrain_config", "num_demonstrations", "num_prompts")


@dataclass(frozen=True)
class ToolsArguments(RowArguments, RemoteCodeArguments):
    """Questions, tools, and how much people show of them."""

    output_dir: str = field(
        default="outputs/tools", metadata={"help": "Where the models, the data and the report go."}
    )
    seed: int = field(default=42, metadata={"help": "Of data and weights: the same seed, the same result."})
    tools: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions that your model may call: path/to/file.py:function, calculator, or lookup:table.json."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards of your own: path/to/file.py:function."}
    )
    demonstrations_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Conversations with calls of tools that your model learns from before PPO."},
    )
    controls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Arms of the embedded world: shuffled (PPO by shuffled rewards, which must not gain), plain (a "
            "model without tools), or none; by default both."
        },
    )
    num_demonstrations: int = field(default=12000, metadata={"help": "Demonstrations of the embedded world."})
    num_prompts: int = field(default=4000, metadata={"help": "Questions of the embedded world that PPO asks."})
    num_eval_prompts: int = field(default=100, metadata={"help": "Held-out questions of each family, at most."})
    pretrain_config: str | None = field(default=None, metadata={"help": "YAML flags of the pretraining run."})
    sft_config: str | None = field(default=None, metadata={"help": "YAML flags of fine-tuning on demonstrations."})
    rlhf_config: str | None = field(default=None, metadata={"help": "YAML flags of the run of PPO."})

    takes_any_column: ClassVar[bool] = True

    @property
    def is_world(self) -> bool:
        """Whether the questions are the embedded world's."""
        return self.dataset_name == WORLD

    @property
    def arms(self) -> tuple[str, ...]:
        """The controls that run, in their order."""
        chosen = CONTROLS if self.controls is None else self.controls
        return tuple(arm for arm in CONTROLS if arm in chosen) if self.is_world else ()


def check(script_args: ToolsArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect or contradict each other.

    Raises:
        InputError: naming the flag.
    """
    for flag in AT_LEAST_ONE:
        value = getattr(script_args, flag)
        if value < 1:
            raise InputError(f"--{flag} {value}: expected at least 1")
    named = bool(model_args.model_name_or_path)
    if named and script_args.is_world:
        raise InputError("--model_name_or_path needs --dataset_name: prompts, for instance a JSON Lines of `prompt`")
    if not named and not script_args.is_world:
        raise InputError(
            f"--dataset_name {script_args.dataset_name} needs --model_name_or_path: the embedded world's model does "
            "not know such prompts"
        )
    for flag in OWN:
        is_given = bool(getattr(script_args, flag))
        refuse(not named and is_given, f"--{flag}", "the model and its tools are the embedded world's")
        if named and not is_given and flag != "demonstrations_dataset_name":
            raise InputError(f"--model_name_or_path {model_args.model_name_or_path} needs --{flag}")
    for flag in OF_WORLD:
        is_given = getattr(script_args, flag) != getattr(ToolsArguments, flag)
        refuse(named and is_given, f"--{flag}", "it is of the embedded world's model")
    controls = script_args.controls or ()
    for control in controls:
        if control not in (*CONTROLS, "none"):
            raise InputError(f"--controls {control!r}: expected some of {', '.join(CONTROLS)}, or none")
    if "none" in controls and set(controls) != {"none"}:
        raise InputError(f"--controls {' '.join(controls)}: expected arms, or none alone")


def given_words(group: "DataclassInstance", without: Sequence[str] = ()) -> list[str]:
    """Return those flags of a parsed group that are not at their defaults, as words of a command line."""
    words: list[str] = []
    for each in fields(group):
        value = getattr(group, each.name)
        if each.init and each.name not in without and value is not None and value != each.default and value != []:
            words += [f"--{each.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def data_file(script_args: ToolsArguments, name: str) -> Path:
    """Return the file of a run's rows."""
    return Path(script_args.output_dir, "data", f"{name}.jsonl")


def table_file(script_args: ToolsArguments) -> Path:
    """Return the file of what the look-up tool knows in training."""
    return Path(script_args.output_dir, "data", "table.json")

"""Extension to longer texts: its flags, what it refuses, and the stage before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hfllm.data.loading import DataArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.runs.recipes import settings_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments
    from trl import ModelConfig

# The libraries' dataclasses of flags that the recipe takes besides its own.
LIBRARY = ("transformers.TrainingArguments", "trl.ModelConfig")
AT_LEAST = {"num_eval_texts": 2, "num_needles": 1}
# Texts that the base model of the world learns from, under the output folder; so many words fill 128 tokens.
BASE_TEXTS, BASE_WORDS = "base_texts.jsonl", 88


@dataclass(frozen=True)
class ExtendArguments(DataArguments):
    """How far the model is extended, how, and what it is judged on."""

    rope_type: str = field(
        default="yarn",
        metadata={
            "help": "How rotary positions are extended: linear, ntk (a higher rope_theta), dynamic, yarn or llama3.",
            # Those of hfllm.models.extension, which a list of flags is too early to import.
            "choices": ["linear", "ntk", "dynamic", "yarn", "llama3"],
        },
    )
    factor: float = field(default=4.0, metadata={"help": "How many times longer the context becomes, above 1."})
    original_max_position_embeddings: int | None = field(
        default=None,
        metadata={"help": "Tokens of the longest text that the model was trained on; by default its context."},
    )
    num_documents: int = field(default=12000, metadata={"help": "Texts of the world for the base model made here."})
    num_train_texts: int = field(default=512, metadata={"help": "Rows of the new length to train on, at most."})
    num_eval_texts: int = field(default=16, metadata={"help": "Held-out rows of the new length, at most."})
    num_needles: int = field(default=8, metadata={"help": "Needles for each length and depth."})
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the base model, if none is named."}
    )

    # `--max_steps 0` extends without training.
    may_train_nothing: ClassVar[bool] = True


def default_settings(given: Mapping[str, object]) -> list[Path]:
    """Return the settings of the embedded world's model, or of your own."""
    return [settings_file("extend/model.yaml" if given.get("model_name_or_path") else "extend/world.yaml")]


def check(script_args: ExtendArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect or no meaning.

    Raises:
        InputError: naming the flag.
    """
    from hfllm.stages.pretrain import shards_parameters

    for flag, least in AT_LEAST.items():
        if getattr(script_args, flag) < least:
            raise InputError(f"--{flag} {getattr(script_args, flag)}: expected at least {least}")
    refuse(model_args.use_peft, "--use_peft", "all weights are trained; --max_steps 0 trains none")
    for flag in ("load_in_8bit", "load_in_4bit"):
        refuse(getattr(model_args, flag), f"--{flag}", "the extended model is saved in full precision")
    is_split = shards_parameters(training_args)
    refuse(is_split, "DeepSpeed or FSDP", "the model is judged whole in each process")
    is_named = bool(model_args.model_name_or_path)
    refuse(is_named and bool(script_args.pretrain_config), "--pretrain_config", "the model is named")
    is_idle = training_args.max_steps == 0 and training_args.resume_from_checkpoint is not None
    refuse(is_idle, "--resume_from_checkpoint", "--max_steps 0 trains nothing")


def stages_before(
    script_args: ExtendArguments, training_args: "TrainingArguments", model_args: "ModelConfig"
) -> Chain:
    """Return the pretraining that makes a small base model of a short context, if none is named."""
    return chain_before(
        "extend",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"pretrain": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config or str(settings_file("extend/base.yaml"))},
        more_flags={"pretrain": ["--dataset_name", str(Path(training_args.output_dir) / BASE_TEXTS)]},
    )


def lengths_of(script_args: ExtendArguments, config: "PreTrainedConfig") -> tuple[int, int]:
    """Return the length that the model was trained on, and the one that it is extended to, in tokens.

    Args:
        config: of the model, whether named or not yet trained.

    Raises:
        InputError: when it cannot be extended so, see `extended_config`; or when that is no longer than before.
    """
    from hfllm.models.extension import extended_config
    from hfllm.models.loading.saved import max_length_of

    original = script_args.original_max_position_embeddings
    extended_config(config, script_args.rope_type, script_args.factor, original)
    original = max_length_of(config) if original is None else original
    length = int(original * script_args.factor)
    if length <= original:
        raise InputError(f"--factor {script_args.factor} makes {length} tokens of {original}: expected more")
    return original, length

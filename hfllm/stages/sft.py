"""Fine-tuning on instructions: its flags, what it refuses, and its data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfllm.data.loading import DataArguments
from hfllm.errors import InputError, refuse
from hfllm.runs.chain import Chain, chain_before
from hfllm.trainers.learning_rate import BatchArguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments
    from trl import ModelConfig


@dataclass(frozen=True)
class SftArguments(DataArguments, BatchArguments):
    """Instruction data."""

    num_examples: int = field(default=9600, metadata={"help": "Demonstrations of the embedded world to train on."})
    pretrain_config: str | None = field(
        default=None, metadata={"help": "YAML flags of the pretraining that makes the base model, if none is named."}
    )


def check(script_args: SftArguments, model_args: "ModelConfig") -> None:
    """Refuse flags that have no effect.

    Raises:
        InputError: naming the flag.
    """
    is_named = bool(model_args.model_name_or_path)
    refuse(is_named and bool(script_args.pretrain_config), "--pretrain_config", "the model is named")


def check_head(model: "PreTrainedModel") -> None:
    """Refuse to train an adapter of the output head further: TRL reads the head's own weights, past the adapter.

    Args:
        model: what is trained.

    Raises:
        InputError: naming what can be done.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(model.get_output_embeddings(), (BaseTunerLayer, TrainableTokensWrapper)):
        raise InputError(
            "the adapter changes the output head by more than a copy of it, which SFTTrainer cannot train further: "
            "train a new one on it (--use_peft), or merge it (hfllm merge)"
        )


def stages_before(script_args: SftArguments, training_args: "TrainingArguments", model_args: "ModelConfig") -> Chain:
    """Return the pretraining that makes the base model, if none is named."""
    return chain_before(
        "sft",
        training_args.output_dir,
        training_args.seed,
        script_args.world_seed,
        given_models={"pretrain": model_args.model_name_or_path},
        configs={"pretrain": script_args.pretrain_config},
    )


def instruction_data(
    script_args: DataArguments, num_examples: int, seed: int
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    """Return training and held-out rows with `prompt` and `completion` messages.

    Args:
        script_args: where the data comes from.
        num_examples: demonstrations, where it comes from the embedded world.
        seed: of the demonstrations and of the split.
    """
    from hfllm.data import formats
    from hfllm.data.loading import load_rows, split_rows
    from hfllm.data.sources import WORLD, Source
    from hfllm.data.world.demonstrators import instruction_rows
    from hfllm.data.world.world import World

    if script_args.dataset_name != WORLD:
        return split_rows(load_rows(script_args, formats.to_sft), seed)
    rows = instruction_rows(World(script_args.world_seed), num_examples, seed)
    source = Source(rows, [f"world, row {number}" for number in range(1, len(rows) + 1)])
    return split_rows(formats.convert(source, formats.to_sft), seed)

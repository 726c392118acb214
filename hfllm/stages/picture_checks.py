"""What training on rows with pictures refuses, whichever stage trains."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.errors import InputError, refuse
from hfllm.runs.command_line import given_names
from hfllm.stages.pretrain import shards_parameters

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import SFTConfig

    from hfllm.data.loading import RowArguments

WHOLE = "rows with pictures are read by the model's processor, as they are"
# Flags of TRL that would cut, join or write anew the tokens of rows that the processor reads.
NOT_JOINED = {
    "packing": "rows with pictures are not packed",
    "eval_packing": "rows with pictures are not packed",
    "padding_free": "rows with pictures are padded",
    "assistant_only_loss": "of rows with pictures the answers are found without marks",
    "chat_template_path": WHOLE,
    "eos_token": WHOLE,
}


def check_whole_rows(script_args: "RowArguments", training_args: "SFTConfig", is_cut: bool = False) -> None:
    """Refuse flags of fine-tuning that would cut, join or write anew rows with pictures, or learn their questions.

    Args:
        is_cut: whether `--max_length` has a meaning: as many questions as fit are put into a row.

    Raises:
        InputError: naming the flag.
    """
    for flag, why in NOT_JOINED.items():
        refuse(bool(getattr(training_args, flag)), f"--{flag}", why)
    check_sampling(training_args)
    refuse(training_args.completion_only_loss is False, "--completion_only_loss false", "answers alone are learned")
    is_given = "max_length" in (given_names(script_args, training_args) or ())
    is_idle = is_given and training_args.max_length is not None and not is_cut
    refuse(is_idle, "--max_length", "rows with pictures are not cut")


def check_sampling(training_args: "TrainingArguments") -> None:
    """Refuse to group rows with pictures by length, which is not known before a batch is made.

    Raises:
        InputError: naming the flag.
    """
    is_grouped = training_args.train_sampling_strategy == "group_by_length"
    refuse(
        is_grouped, "--train_sampling_strategy group_by_length", "rows with pictures are read when a batch needs them"
    )


def count_seen(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rows have pictures."""
    return sum(bool(row.get("images")) for row in rows)


def is_mixed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether some rows have pictures and others have none."""
    return 0 < count_seen(rows) < len(rows)


def check_split_weights(
    training_args: "TrainingArguments",
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
) -> None:
    """Refuse pictures in some rows only where processes hold parts of the weights, as PPO does.

    A process whose batch has no picture does not run the tower, and the others would wait for it to gather or reduce
    that.

    Raises:
        InputError: saying how many rows have pictures.
    """
    if not shards_parameters(training_args):
        return
    for what, rows in (("training", train_rows), ("held-out", eval_rows)):
        if is_mixed(rows):
            raise InputError(
                f"pictures in {count_seen(rows)} of {len(rows)} {what} rows: DeepSpeed and FSDP need one in each row "
                "or in none; train the others by themselves, or by DDP, which takes both mixed"
            )

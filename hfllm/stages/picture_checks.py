"""What training on rows with pictures refuses, whichever stage trains."""

from typing import TYPE_CHECKING

from hfllm.errors import refuse
from hfllm.runs.command_line import given_names

if TYPE_CHECKING:
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
    refuse(training_args.completion_only_loss is False, "--completion_only_loss false", "answers alone are learned")
    is_given = "max_length" in (given_names(script_args, training_args) or ())
    is_idle = is_given and training_args.max_length is not None and not is_cut
    refuse(is_idle, "--max_length", "rows with pictures are not cut")

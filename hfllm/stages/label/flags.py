"""The flags of labeling by people, and what they refuse."""

import importlib.util
from dataclasses import dataclass

from hfllm.data.loading import DataArguments
from hfllm.errors import InputError, refuse_if
from hfllm.flags import Fact, Range, at_least, check_flags, flag
from hfllm.stages.chat.flags import ModelArguments

NO_MODEL = Fact(
    lambda flags: flags.model_name_or_path is None, "the rows bring both answers (no --model_name_or_path)"
)
EVERYBODY = Fact(lambda flags: not flags.annotators, "everybody labels everything without --annotators")
PACKAGE = "gradio"
MAX_NAME = 40


@dataclass(frozen=True)
class LabelArguments(DataArguments, ModelArguments):
    """Which answers people compare, and who they are."""

    output_dir: str = flag("outputs/label", "Where the answers, the labels and the report go.")
    other_model_name_or_path: str | None = flag(
        None, "A second model; one answer of each is compared, in place of two samples of one.", never=NO_MODEL
    )
    num_prompts: int = flag(100, "Prompts to label, the first of the dataset.", takes=at_least(1))
    label_temperature: float = flag(
        1.0,
        "Of the sampled answers.",
        takes=Range("a number above 0", lambda value: 0 < value < float("inf")),
        never=NO_MODEL,
    )
    annotators: list[str] | None = flag(None, "Names of the people who label; by default anybody, by any name.")
    overlap: float = flag(
        0.2,
        "Share of the prompts that all of them label, for their agreement; the others are divided.",
        takes=Range("a number, 0 to 1", lambda value: 0 <= value <= 1),
        never=EVERYBODY,
    )
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, without any password.")
    port: int = flag(
        7860, "Port to listen on; 0 takes a free one.", takes=Range("a port, 0 to 65535", lambda n: 0 <= n < 65536)
    )

    # Rows with two answers have columns of their own.
    takes_any_column = True


def check(script_args: LabelArguments) -> None:
    """Refuse impossible flags, and a page whose library is not installed."""
    check_flags(script_args)
    names = script_args.annotators or []
    for name in names:
        refuse_if(
            not is_name(name), f"--annotators {name!r}: expected 1 to {MAX_NAME} letters, digits, - _ . or space"
        )
    refuse_if(len({*names}) < len(names), f"--annotators {' '.join(names)}: a name comes twice")
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(f"hfllm label needs {PACKAGE}: pip install 'hfllm[label]'")


def is_name(name: str) -> bool:
    """Return whether a text can be an annotator's name."""
    is_short = len(name.strip()) > 0 and len(name) <= MAX_NAME
    return is_short and all(each.isalnum() or each in "-_. " for each in name)

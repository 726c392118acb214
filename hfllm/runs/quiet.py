"""What libraries print and a recipe's user can do nothing about: named here one by one, and kept out of the output.

Whatever is not named comes through. A user who sets the environment variables below has the last word.
"""

import logging
import os
import re
import warnings
from dataclasses import dataclass

# A load report's rows, and what a scorer made from a language model has in it: a head that is about to be trained in
# the place of the one that predicts tokens. A reward model that is used without its head is refused (rewards/models).
_ROW = re.compile(r"^(\S+)\s*\|\s*(?:\x1b\[\d+m)?([A-Z]+)", re.MULTILINE)
_NEW_HEAD = frozenset((("score.weight", "MISSING"), ("lm_head.weight", "UNEXPECTED")))

HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@dataclass(frozen=True)
class Unhelpful(logging.Filter):
    """Drops what one logger says where the message begins as given.

    Args:
        logger: its name.
        message: how it begins.
        reason: why nobody needs it.
    """

    logger: str
    message: str
    reason: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may pass."""
        return not record.getMessage().startswith(self.message)


@dataclass(frozen=True)
class NewHead(logging.Filter):
    """Drops the load report of a scorer whose head alone is new."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may pass."""
        message = record.getMessage()
        rows = {(key, status) for key, status in _ROW.findall(message) if key != "Key"}
        return "LOAD REPORT" not in message or ("score.weight", "MISSING") not in rows or not rows <= _NEW_HEAD


UNHELPFUL = (
    Unhelpful(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
        "a faster kernel for 4-bit weights on a CPU, which is looked for whenever bitsandbytes is imported",
    ),
    Unhelpful(
        "DeepSpeed",
        "Setting accelerator to CPU",
        "DeepSpeed is imported wherever it is installed, on a machine without a GPU too",
    ),
    Unhelpful(
        "datasets.arrow_dataset",
        "Setting TOKENIZERS_PARALLELISM=false for forked processes",
        "datasets does what is right by itself",
    ),
)
NEW_HEAD = NewHead()
# Of `warnings`: the beginning of the message, the category, and the module that warns.
UNHELPFUL_WARNINGS = (
    # DeepSpeed calls torch by older names.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"),
    # TRL and PEFT ask a model by the older of two names.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
)


def hide_unhelpful_output() -> None:
    """Keep out of the output what `UNHELPFUL` names, a scorer's new head, and bars of loading, saving, tokenizing.

    To be called before transformers and datasets are imported. Downloads from the Hub keep their bars.
    """
    for each in UNHELPFUL:
        logging.getLogger(each.logger).addFilter(each)
    logging.getLogger("transformers.modeling_utils").addFilter(NEW_HEAD)
    for message, category, module in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if HUB_BARS not in os.environ:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        # transformers asks for the state of all bars, the Hub's own for that of their group.
        disable_progress_bars()
        enable_progress_bars("huggingface_hub")

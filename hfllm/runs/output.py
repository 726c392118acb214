"""The output of a run: suppressed warnings of libraries, and explanations of failures.

All other messages come through. The user's environment variables below take precedence.
"""

import errno
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfllm.errors import is_out_of_memory
from hfllm.outputs.checkpoints import checkpoints_in, is_complete, missing_for_resuming
from hfllm.runs.schedule import current_job

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# ---- unhelpful output ----


# A load report's rows, and the entries of a scorer made from a language model: a head to be trained in place of the
# head for predicting tokens. A reward model without its head is refused (rewards/models).
_ROW = re.compile(r"^(\S+)\s*\|\s*(?:\x1b\[\d+m)?([A-Z]+)", re.MULTILINE)
_NEW_HEAD = frozenset((("score.weight", "MISSING"), ("lm_head.weight", "UNEXPECTED")))

HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@dataclass(frozen=True)
class Unhelpful(logging.Filter):
    """Drops messages of one logger with the given beginning.

    Args:
        logger: its name.
        message: its beginning.
        reason: why no reader needs it.
    """

    logger: str
    message: str
    reason: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may pass."""
        return not record.getMessage().startswith(self.message)


@dataclass(frozen=True)
class NewHead(logging.Filter):
    """Drops the load report of a scorer where only the head is new."""

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
# Of `warnings`: the beginning of the message, the category, and the warning module.
UNHELPFUL_WARNINGS = (
    # DeepSpeed calls torch by older names.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning, r"torch\.distributed\.c10d_logger"),
    # TRL and PEFT ask a model by the older of two names.
    (r"`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
)


def hide_unhelpful_output() -> None:
    """Suppress the messages in `UNHELPFUL`, and a scorer's new head.

    To be called before transformers and datasets are imported.
    """
    for each in UNHELPFUL:
        logging.getLogger(each.logger).addFilter(each)
    logging.getLogger("transformers.modeling_utils").addFilter(NEW_HEAD)
    for message, category, module in UNHELPFUL_WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def hide_unhelpful_bars() -> None:
    """Suppress progress bars of loading, saving and tokenizing. Downloads from the Hub keep theirs.

    It imports a library, so a refused flag does not wait for it.
    """
    if HUB_BARS not in os.environ:
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        # transformers asks for the state of all bars, the Hub's own bars for the state of their group.
        disable_progress_bars()
        enable_progress_bars("huggingface_hub")


# ---- failures ----
# Failures other than bad input and errors of this program: full memory, a full or read-only disk.
# Another is a tokenizer's pattern abandoned by its library. Such errors become one line with the remedy, the saved
# files and how to resume. All others keep their traceback.


DISK = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system takes no file of this size",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk cannot be read or written",
    errno.ENOTDIR: "a folder was expected where there is a file",
    errno.EISDIR: "a file was expected where there is a folder",
}
# Memory-saving flags of the stages.
SAVES_MEMORY = {
    "per_device_train_batch_size": "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps",
    "gradient_checkpointing": "--gradient_checkpointing true",
    "max_length": "a shorter --max_length",
    "response_length": "a shorter --response_length",
    "batch_size": "a smaller --batch_size",
    "use_peft": "--use_peft (also with --load_in_8bit)",
}


def explained(error: BaseException, *parsed: "DataclassInstance") -> str | None:
    """Return the explanation of an error of the machine as a line, or `None` for any other error.

    Args:
        parsed: the flags of the run, to find remedies.
    """
    if is_out_of_memory(error):
        message = " ".join(str(error).split())
        amount = message.partition("ried to allocate ")[2].partition(". ")[0]
        size = f" (tried to allocate {amount[:60]})" if amount else ""
        names = {name for group in parsed for name in vars(group)}
        helpful = [text for flag, text in SAVES_MEMORY.items() if flag in names and not _is_on(flag, parsed)]
        return f"out of memory{size}" + (f": try {', '.join(helpful)}" if helpful else "")
    if type(error).__name__ == "PanicException" and "retry-limit" in str(error):
        return "a pattern of the tokenizer tries too many ways to match a text: name a model with another tokenizer"
    code = _disk_error(error)
    if code is None:
        return None
    # For a copy the second is the unwritten file.
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return DISK[code] + (f": {named}" if named else "")


def what_is_saved(folder: str | Path, can_resume: bool = True, is_training: bool = False) -> str:
    """Return the files of a run in its output folder, and how it continues, as words for the end of a line.

    Args:
        can_resume: whether `--resume_from_checkpoint` reaches this run.
        is_training: whether it was training, so weights in the folder are not its own.
    """
    from hfllm.models.loading.weights import SAFE, safetensors_damage

    job = current_job()
    if job is not None and job.place < len(job.stages) - 1:
        stage = job.stages[job.place].name
        return f"the stages before {stage} are saved, and the same command starts that one again"
    usable = [path for path in checkpoints_in(folder) if is_complete(path) and not missing_for_resuming(path)]
    if can_resume and usable:
        return f"the same command with --resume_from_checkpoint auto continues from {usable[-1].name} in {folder}"
    weights = Path(folder) / SAFE
    if not is_training and weights.is_file() and safetensors_damage(weights) is None:
        return f"the model is saved in {folder}, its report is not"
    if not can_resume:
        return "the same command starts anew"
    how = " (--save_strategy steps --save_steps N)" if is_training else ""
    return f"no checkpoint was saved{how}: the same command starts anew"


def _is_on(flag: str, parsed: "Sequence[DataclassInstance]") -> bool:
    """Return whether an on/off flag is already on, so it need not be named."""
    return any(getattr(group, flag, False) is True for group in parsed)


def _disk_error(error: BaseException) -> int | None:
    """Return the number of a disk's error, also where a library has wrapped it in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK else None
    words = str(error)
    is_ours = type(error).__name__ == "SafetensorError" or isinstance(error, OSError)
    for code in DISK if is_ours else ():
        if f"os error {code})" in words or f"[Errno {code}]" in words or f"errno {code} " in words:
            return code
    # The message of torch.save, whatever the reason.
    writes = ("PytorchStreamWriter", "unexpected pos", "iostream error")
    if isinstance(error, RuntimeError) and any(word in words for word in writes):
        return errno.ENOSPC
    return None

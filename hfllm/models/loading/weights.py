"""Check whether saved weights are readable and complete, and compare the weights of two models.

transformers replaces missing weights by random ones with a warning, and reads pickles.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from hfllm.errors import InputError, is_out_of_memory, refuse_if
from hfllm.models.loading.saved import (
    leave_out_idle_settings,
    quantization_method,
    reason_of,
    refuse_outside,
    saved_model,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


# ---- weight files ----


SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
# Stored by older versions of transformers and computed again by this one.
BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".cos_cached", ".sin_cached", ".position_ids")
# Of TRL: next to a language model, and no part of it.
VALUE_HEADS = ("v_head.",)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_weights_of(
    auto_class: "type[_BaseAutoModelClass]", name: str, whose: str = "model", **kwargs: object
) -> tuple["PreTrainedModel", dict[str, Any]]:
    """Load a model with all of its weights, from safetensors; only a head for scores may be new.

    Args:
        auto_class: such as `AutoModelForCausalLM`.
        name: a folder or a Hub id.
        whose: its name in complaints.
        kwargs: arguments of `from_pretrained`.

    Returns:
        The model, and transformers' report of the loading. With `ignore_mismatched_sizes` the report names heads of
        other sizes.

    Raises:
        InputError: when it cannot be loaded, naming the damaged or missing file or weight, or the one of another size.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    check_weight_files(name, whose)
    may_mismatch = bool(kwargs.get("ignore_mismatched_sizes"))
    # Mismatches are reported here: transformers refers to a logged table.
    settings = {**kwargs, "output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with load_report_held() as report:
            model, info = saved_model(auto_class, name, **settings)
    except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"{whose} {name!r} could not be loaded: {_reason(error)}") from error
    trunk = f"{model.base_model_prefix}."
    may_be_new = auto_class not in (AutoModelForCausalLM, AutoModelForImageTextToText)
    for key, saved, expected in sorted(info["mismatched_keys"]):
        if not (may_mismatch and may_be_new and not key.startswith(trunk)):
            raise InputError(
                f"{whose} {name!r}: {key} is of the shape {tuple(saved)} in its files, and of {tuple(expected)} by "
                "its config.json: one of them is another model's"
            )
    # Other methods of quantization have their own names for their stored tensors.
    if quantization_method(model.config) in (None, "bitsandbytes"):
        _check_names(model, info, f"{whose} {name!r}", may_be_new)
    report()
    leave_out_idle_settings(model, f"{whose} {name!r}")
    return model, info


def _check_names(model: "PreTrainedModel", info: Mapping[str, Any], whose: str, may_be_new: bool) -> None:
    """Refuse a model if weights would be random or left out, as when its config has another number of layers.

    Args:
        info: transformers' report of the loading.
        may_be_new: whether the head is new, and the one in the files, if any, is left out on purpose.
    """
    trunk = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not may_be_new or key.startswith(trunk))
    if missing:
        raise InputError(
            f"{whose}: {_counted(missing)} of the {type(model).__name__} not in its files, such as {missing[0]}, and "
            "would be random: are they those of another model?"
        )
    # Files of only a trunk have no prefix.
    parts = {name for name, _ in model.base_model.named_children()}
    unused = sorted(
        key
        for key in info["unexpected_keys"]
        if not key.endswith(BUFFERS)
        and not key.startswith(VALUE_HEADS)
        and (not may_be_new or key.startswith(trunk) or key.partition(".")[0] in parts)
    )
    if unused:
        raise InputError(
            f"{whose}: {_counted(unused)} in its files and not of the {type(model).__name__}, such as {unused[0]}, "
            "and would be left out: does its config.json name fewer layers, or is it another model's?"
        )


def check_weight_files(name: str, whose: str = "model") -> None:
    """Refuse a local model with pickled, truncated or damaged weights, or with a part missing."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return
    if (folder / SAFE).is_file():
        files = [SAFE]
    elif (folder / SAFE_INDEX).is_file():
        files = _shards(folder, name, whose)
    elif any((folder / pickled).is_file() for pickled in PICKLES):
        raise InputError(_about_pickles(name, whose))
    else:
        # transformers lists its expected names.
        return
    for file in files:
        refuse_if(not (folder / file).is_file(), f"{whose} {name!r}: {file} is missing, which {SAFE_INDEX} lists")
        if damage := safetensors_damage(folder / file):
            raise InputError(f"{whose} {name!r}: {file} is damaged ({damage}): download or copy it again")


def safetensors_damage(file: Path) -> str | None:
    """Return the problem of a safetensors file, by its header and its size; `None` if there is none."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        beginning = stream.read(8)
        length = int.from_bytes(beginning, "little")
        if size == 0:
            return "it is empty"
        if len(beginning) < 8 or length > size - 8:
            return "cut short, or no safetensors file"
        header = stream.read(length)
    try:
        entries: Mapping[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return "its header cannot be read"
    whole = 8 + length + max(ends, default=0)
    return None if size == whole else f"{size:,} bytes, and its header says {whole:,}"


@contextmanager
def load_report_held() -> Iterator[Any]:
    """Hold back transformers' table of missing and mismatched weights; yield a function to let it through."""
    logger, records = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        records.append(record)
        return False

    def let_through() -> None:
        for record in records:
            logger.handle(record)

    logger.addFilter(hold)
    try:
        yield let_through
    finally:
        logger.removeFilter(hold)


def _shards(folder: Path, name: str, whose: str) -> list[str]:
    try:
        files = set(json.loads((folder / SAFE_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        shards = sorted(map(str, files))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise InputError(f"{whose} {name!r}: {SAFE_INDEX} is damaged: it lists no files (weight_map)") from None
    refuse_outside(shards, f"{whose} {name!r}: {SAFE_INDEX}")
    return shards


def _about_pickles(name: str, whose: str) -> str:
    return (
        f"{whose} {name!r} has pickled weights alone (pytorch_model.bin), which can run code when they are read. If "
        'you trust them, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{name}').save_pretrained('{Path(name).name}-safe')\", and copy the tokenizer's files"
    )


def _counted(missing: list[str]) -> str:
    return "1 weight is" if len(missing) == 1 else f"{len(missing)} weights are"


def _reason(error: Exception) -> str:
    if "use_safetensors" in str(error):
        return (
            "it has no safetensors files, and pickled weights can run code when they are read: if you trust them, "
            "convert them by https://huggingface.co/spaces/safetensors/convert"
        )
    return reason_of(error)


# ---- precision ----
#
# Cast a new model to the precision of a loaded one.


Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Return the model with its weights in `dtype` and its buffers unchanged, as `from_pretrained` loads it.

    `model.to(dtype)` would round buffers too: rotary frequencies in bf16 rotate later positions by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# ---- fingerprint ----
#
# Distinguish models by their weights, where they have no file for a comparison.


# The number of values to read from a tensor; from a larger one so many, evenly from all over it.
MOST_VALUES = 1 << 16


def weights_fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes, types, and up to 65,536 values per tensor.

    Training changes nearly every value, so another state of the same model has another digest, and a model of
    billions is read in a second.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        digest.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        some = value.detach().flatten()[:: -(-value.numel() // MOST_VALUES) or 1]
        digest.update(some.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- outputs compared ----
#
# Compare the outputs of models expected to be the same, on random tokens.


# The largest change by rounding, as a share of the largest logit: in single precision, and in half.
TOLERANCE, TOLERANCE_IN_HALF = 1e-4, 5e-2
LENGTH = 64


def random_tokens(vocab_size: int, context: int | None, seed: int) -> torch.Tensor:
    """Return a row of random tokens, (1, `LENGTH`) or as long as a model's context."""
    # Most vocabularies put special tokens first, and scorers skip padding.
    first, generator = min(3, vocab_size - 1), torch.Generator().manual_seed(seed)
    return torch.randint(first, vocab_size, (1, min(LENGTH, context or LENGTH)), generator=generator)


def logits_of(model: "PreTrainedModel | PeftModel", ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits in single precision; of a model without a head its last hidden states."""
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids)
    return outputs["logits" if "logits" in outputs else "last_hidden_state"].float()


def is_rounding(difference: float, logits: torch.Tensor, in_half: bool) -> bool:
    """Return whether a difference of outputs is no larger than rounding explains; NaN is not."""
    return difference <= (TOLERANCE_IN_HALF if in_half else TOLERANCE) * logits.abs().max().item()

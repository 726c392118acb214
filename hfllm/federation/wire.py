"""Updates and weights as bytes: safetensors, which runs no code, with a limit that holds before anything is read.

A message is a safetensors file whose metadata says whose it is, which round it answers, of how many tokens and rows,
and of which base model.
Its header is checked against what the server expects before any tensor is made of the data.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.compression import KINDS, dequantize, quantize, quantized_forms
from hfllm.federation.updates import Expected, Form, Update, check_counts

FORMAT = "hfllm.federation.1"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
# Room for the header: a name may be long, and metadata is short.
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 1 << 16, 1 << 10


def to_bytes(update: Update, compression: str = "none", round: int | None = None) -> bytes:
    """Return an update as bytes.

    Args:
        compression: none, or int8 with a scale per row; see `compression.ErrorFeedback`.
        round: that was asked for; written where the update names none itself.

    Raises:
        InputError: for another compression, and a change with NaN or infinite values.
    """
    if compression not in KINDS:
        raise InputError(f"compression is {compression!r}; expected one of {', '.join(KINDS)}")
    check_counts(update)
    for name, tensor in update.tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"organisation {update.organisation!r}: its change of {name} has NaN or infinite values: "
                "training diverged, so that nothing is sent"
            )
    tensors = quantize(update.tensors) if compression == "int8" else update.tensors
    answered = round if update.round is None else update.round
    return save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {
            **{"format": FORMAT, "compression": compression, "organisation": update.organisation},
            **{"num_tokens": str(update.num_tokens), "num_rows": str(update.num_rows)},
            "base_sha256": update.base_sha256,
            **({} if answered is None else {"round": str(answered)}),
        },
    )


def from_bytes(data: bytes, limit: int, expected: Expected, sender: str | None = None) -> Update:
    """Return the update that bytes hold, checked.

    Args:
        data: what an organisation sent.
        limit: most bytes that are read; `size_limit` gives one.
        expected: the tensors that are averaged.
        sender: the organisation that the transport received this from, which must be the one that it names.

    Raises:
        InputError: in one line that names the sender: too large, truncated, not safetensors, another round, other
            tensors, precision or base model, NaN.
    """
    whose = f"organisation {sender!r}" if sender is not None else "an organisation"
    _check_size(len(data), limit, whose)
    try:
        metadata, forms = _header(data, HEADER_BYTES + HEADER_BYTES_PER_TENSOR * 2 * len(expected.forms))
        update_of = _described(metadata, sender)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{whose} sent bytes that are not an update: {_one_line(error)}") from None
    name = update_of["organisation"]
    expected.check_round(update_of["round"], name)
    compression = metadata["compression"]
    wanted = Expected(quantized_forms(expected.forms), expected.base_sha256) if compression == "int8" else expected
    if compression == "int8" and expected.any_rank:
        raise InputError(f"organisation {name!r} sent int8; adapters of any rank are sent in full precision")
    wanted.check_forms(forms, name)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"organisation {name!r} sent bytes that are not an update: {_one_line(error)}") from None
    if compression == "int8":
        tensors = dequantize(tensors, {each: form.dtype for each, form in expected.forms.items()})
    update = Update(tensors=tensors, **update_of)
    expected.check(update)
    return update


def read_update(path: Path, limit: int, expected: Expected, sender: str | None = None) -> Update:
    """Return the update in a file, whose size is looked at first; see `from_bytes`."""
    size = os.stat(path).st_size
    _check_size(size, limit, f"organisation {sender!r}" if sender is not None else str(path))
    with open(path, "rb") as file:
        # What is written to the file meanwhile is not read either.
        return from_bytes(file.read(limit + 1), limit, expected, sender)


def size_limit(expected: Expected, factor: float = 1.0) -> int:
    """Return the most bytes that an honest update of these tensors has.

    Args:
        factor: above 1 where adapters of larger ranks are accepted.
    """
    values = sum(_num_bytes(form) for form in expected.forms.values())
    return int(factor * values) + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * 2 * len(expected.forms)


def weights_to_bytes(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Return weights that a server sends, as bytes."""
    return save({name: value.detach().cpu().contiguous() for name, value in weights.items()}, metadata or None)


def weights_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Return the weights that a server sent.

    Raises:
        InputError: for bytes that are not safetensors.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the server sent bytes that are not weights: {_one_line(error)}") from None


def _check_size(size: int, limit: int, whose: str) -> None:
    if size > limit:
        raise InputError(f"{whose} sent {size:,} bytes; at most {limit:,} are read")


def _header(data: bytes, most: int) -> tuple[dict[str, Any], dict[str, Form]]:
    """Return metadata and forms of a safetensors message, of which only the header is read."""
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are too few")
    length = int.from_bytes(data[:8], "little")
    if length > min(most, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes in {len(data):,}, of which at most {most:,} are read")
    header = json.loads(data[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__")
    if metadata.get("format") != FORMAT or metadata.get("compression") not in KINDS:
        raise ValueError(f"format {metadata.get('format')!r:.60}, compression {metadata.get('compression')!r:.60}")
    forms = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name:.100} is of the type {entry['dtype']!r:.20}")
        forms[name] = Form(tuple(int(size) for size in entry["shape"]), DTYPES[entry["dtype"]])
    return metadata, forms


def _described(metadata: Mapping[str, str], sender: str | None) -> dict[str, Any]:
    """Return the fields of the update, but for its tensors."""
    organisation = metadata["organisation"]
    if sender is not None and organisation != sender:
        raise ValueError(f"it is in the name of {organisation!r:.60}")
    counts: dict[str, int | None] = {"round": None}
    for field in ("num_tokens", "num_rows", *(["round"] if "round" in metadata else [])):
        # A longer number would be read for minutes.
        if not (metadata[field].isdecimal() and metadata[field].isascii() and len(metadata[field]) <= 15):
            raise ValueError(f"{field} is {metadata[field]!r:.40}")
        counts[field] = int(metadata[field])
    return {"organisation": organisation, "base_sha256": metadata["base_sha256"], **counts}


def _num_bytes(form: Form) -> int:
    count = 1
    for size in form.shape:
        count *= size
    return count * form.dtype.itemsize


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

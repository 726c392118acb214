"""Updates sent by an organisation after a round: checked, compressed, and written as bytes.

The tensors of an update are *changes*: the trained weights minus the received weights of the organisation, in their
precision. Only `lora.stacked` reads factors of adapters themselves; they begin at zero in every round.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from hfllm import durable
from hfllm.errors import InputError, check_choice, one_line, refuse_if
from hfllm.federation.settings import COMPRESSIONS

# ---- updates ----


@dataclass(frozen=True)
class Update:
    """The change of one organisation in one round.

    Args:
        organisation: its name.
        tensors: the change of every trained tensor by name, on the CPU.
        num_tokens: target tokens of its training in this round, repeated ones counted again: the weight of the
            average.
        num_rows: rows of its training in this round.
        base_sha256: `weights_sha256` of its initial model before the first round.
        round: the answered round; by default given on sending (`to_bytes`).
    """

    organisation: str
    tensors: dict[str, Tensor]
    num_tokens: int
    num_rows: int
    base_sha256: str
    round: int | None = None


@dataclass(frozen=True)
class Failure:
    """An organisation left out of a round, and why, in one line."""

    organisation: str
    reason: str


@dataclass(frozen=True)
class Form:
    """Shape and precision of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """The updates accepted by a server, for every organisation.

    Args:
        forms: shape and precision of every tensor by name.
        base_sha256: of the base model.
        any_rank: accept LoRA factors of other ranks, for the sum in `lora.stacked`.
        max_tokens: maximum of target tokens, and of rows, learned by an organisation in a round: they are its weight
            in the mean. By default any number.
        round: answered by the updates; an update of another round, late or sent again, is refused. By default any.
    """

    forms: Mapping[str, Form]
    base_sha256: str
    any_rank: bool = False
    max_tokens: int | None = None
    round: int | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], base_sha256: str, any_rank: bool = False) -> "Expected":
        """Return the expectation for updates of these weights."""
        forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        return cls(forms, base_sha256, any_rank)

    def check(self, update: Update) -> None:
        """Refuse an unsuitable update.

        Raises:
            InputError: in one line with the organisation's name.
        """
        whose = f"organisation {update.organisation!r}"
        self.check_round(update.round, whose)
        if update.base_sha256 != self.base_sha256:
            theirs, ours = update.base_sha256[:12], self.base_sha256[:12]
            raise InputError(f"{whose} began from another base model: sha256 {theirs!r}; expected {ours!r}")
        result = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in update.tensors.items()}
        self.check_forms(result, whose)
        check_counts(update, self.max_tokens)
        for name, tensor in update.tensors.items():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{whose} sent {name} with NaN or infinite values; expected finite ones")

    def check_round(self, round: int | None, whose: str) -> None:
        """Refuse an update of another round, or without a round; see `check`."""
        if self.round is not None and round != self.round:
            sent = f"an update of {'no round' if round is None else f'round {round}'}"
            raise InputError(f"{whose} sent {sent}; expected one of round {self.round}")

    def check_forms(self, forms: Mapping[str, Form], whose: str) -> None:
        """Refuse other names, shapes or precisions; see `check`."""
        count = len(self.forms)
        for name in self.forms:
            refuse_if(name not in forms, f"{whose} sent no {name}, one of {count} tensors that are averaged")
        for name, form in forms.items():
            expected = self.forms.get(name)
            refuse_if(expected is None, f"{whose} sent {name!r:.200}, which is none of the {count} averaged tensors")
            if form == expected or (self.any_rank and _differ_in_rank_alone(name, form, expected)):
                continue
            if (axis := rank_axis(name)) is not None and _differ_in_rank_alone(name, form, expected):
                raise InputError(
                    f"{whose} sent an adapter of rank {form.shape[axis]}; expected rank {expected.shape[axis]}, or "
                    "the average 'stacked', which takes any"
                )
            raise InputError(f"{whose} sent {name} as {form}; expected {expected}")


def check_counts(update: Update, most: int | None = None) -> None:
    """Refuse an update of no tokens or rows, or of more than `most`."""
    whose = f"organisation {update.organisation!r}"
    for field in ("num_tokens", "num_rows"):
        value = getattr(update, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{whose}: {field} is {value!r:.40}; expected at least 1")
        if most is not None and value > most:
            raise InputError(f"{whose}: {field} is {value:,}; a round has at most {most:,}")


def rank_axis(name: str) -> int | None:
    """Return the rank axis of a LoRA factor; `None` for other tensors.

    PEFT names factors of linear layers `lora_A`, shape (rank, in), and `lora_B`, (out, rank).
    """
    parts = name.split(".")
    return 0 if "lora_A" in parts else 1 if "lora_B" in parts else None


def changes(trained: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the changes by training to an organisation's received weights, on the CPU, in their precision."""
    return {name: (trained[name].detach() - received[name].to(trained[name].device)).cpu() for name in received}


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of all weights: names in order, shapes, precisions and every byte.

    Organisations compare it before they train. Take it of the base model before an adapter is put on it: PEFT renames
    the weights.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _differ_in_rank_alone(name: str, form: Form, expected: Form) -> bool:
    axis = rank_axis(name)
    if axis is None or form.dtype != expected.dtype or len(form.shape) != 2 or len(expected.shape) != 2:
        return False
    return form.shape[1 - axis] == expected.shape[1 - axis] and form.shape[axis] > 0


# ---- wire ----
#
# Updates and weights as bytes: safetensors, a format without code, with a size limit checked before anything is read.
#
# A message is a safetensors file. Its metadata has the organisation, the answered round, the numbers of tokens and
# rows, and the base model.
# Its header is checked against the server's expectation before any tensor is made of the data.


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
        compression: none, or int8 with a scale per row; see `ErrorFeedback`.
        round: the requested round; written where the update names none itself.

    Raises:
        InputError: for another compression, and a change with NaN or infinite values.
    """
    check_choice(f"compression is {compression!r}; expected one of", compression, COMPRESSIONS)
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
    """Return the update from bytes, checked.

    Args:
        data: an organisation's message.
        limit: most bytes to read, such as from `size_limit`.
        expected: the averaged tensors.
        sender: the organisation known to the transport as sender; the message must name the same.

    Raises:
        InputError: in one line with the sender's name: too large, truncated, not safetensors, another round, other
            tensors, precision or base model, NaN.
    """
    whose = f"organisation {sender!r}" if sender is not None else "an organisation"
    _check_size(len(data), limit, whose)
    try:
        metadata, forms = _header(data, HEADER_BYTES + HEADER_BYTES_PER_TENSOR * 2 * len(expected.forms))
        update_of = _described(metadata, sender)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{whose} sent bytes that are not an update: {_one_line(error)}") from None
    whose = f"organisation {update_of['organisation']!r}"
    expected.check_round(update_of["round"], whose)
    compression = metadata["compression"]
    expected_encoding = (
        Expected(quantized_forms(expected.forms), expected.base_sha256) if compression == "int8" else expected
    )
    if compression == "int8" and expected.any_rank:
        raise InputError(f"{whose} sent int8; adapters of any rank are sent in full precision")
    expected_encoding.check_forms(forms, whose)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"{whose} sent bytes that are not an update: {_one_line(error)}") from None
    if compression == "int8":
        tensors = dequantize(tensors, {each: form.dtype for each, form in expected.forms.items()})
    update = Update(tensors=tensors, **update_of)
    expected.check(update)
    return update


def read_update(path: Path, limit: int, expected: Expected, sender: str | None = None) -> Update:
    """Return the update in a file, after a check of its size; see `from_bytes`."""
    size = os.stat(path).st_size
    _check_size(size, limit, f"organisation {sender!r}" if sender is not None else str(path))
    with open(path, "rb") as file:
        # Bytes added to the file meanwhile are not read either.
        return from_bytes(file.read(limit + 1), limit, expected, sender)


def size_limit(expected: Expected, factor: float = 1.0) -> int:
    """Return the maximum size in bytes of an honest update of these tensors.

    Args:
        factor: above 1 where adapters of larger ranks are accepted.
    """
    values = sum(_num_bytes(form) for form in expected.forms.values())
    return int(factor * values) + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * 2 * len(expected.forms)


def weights_to_bytes(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Return a server's weights as bytes."""
    return save({name: value.detach().cpu().contiguous() for name, value in weights.items()}, metadata or None)


def weights_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Return the weights sent by a server.

    Raises:
        InputError: for bytes other than safetensors.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the server sent bytes that are not weights: {_one_line(error)}") from None


def _check_size(size: int, limit: int, whose: str) -> None:
    refuse_if(size > limit, f"{whose} sent {size:,} bytes; at most {limit:,} are read")


def _header(data: bytes, most: int) -> tuple[dict[str, Any], dict[str, Form]]:
    """Return metadata and forms of a safetensors message, reading only the header."""
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are too few")
    length = int.from_bytes(data[:8], "little")
    if length > min(most, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes in {len(data):,}, of which at most {most:,} are read")
    header = json.loads(data[8 : 8 + length].decode("utf-8"))
    metadata = header.pop("__metadata__")
    if metadata.get("format") != FORMAT or metadata.get("compression") not in COMPRESSIONS:
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
    return one_line(error) or type(error).__name__


# ---- compression ----
#
# Changes in 8 bits on the wire: one scale per row, and error feedback at the organisation.
#
# Every row of a tensor (its first axis; a vector is one row) is divided by its largest magnitude over 127 and rounded,
# so the error of a value is half a step at most. An organisation keeps the rounding errors and adds them to its next
# change (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847), so errors do not add up over rounds.


VALUES, SCALES = ".int8", ".scale"
STEPS = 127


def quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return int8 values and float32 scales, under every name with `.int8` and `.scale`."""
    packed = {}
    for name, tensor in tensors.items():
        rows = _rows(tensor).float()
        # A row too small for a normal number as scale is sent as zeros.
        scales = rows.abs().amax(1, keepdim=True) / STEPS if rows.numel() else rows.new_zeros(len(rows), 1)
        scales = torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
        packed[name + VALUES] = (rows / scales).round().clamp(-STEPS, STEPS).to(torch.int8).reshape(tensor.shape)
        packed[name + SCALES] = scales[:, 0].contiguous()
    return packed


def dequantize(packed: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the input tensors of `quantize`, rounded, in these precisions."""
    tensors = {}
    for name, dtype in dtypes.items():
        values, scales = packed[name + VALUES], packed[name + SCALES]
        tensors[name] = (_rows(values).float() * scales[:, None]).reshape(values.shape).to(dtype)
    return tensors


def quantized_forms(forms: Mapping[str, Form]) -> dict[str, Form]:
    """Return shapes and precisions of the output of `quantize` for tensors of these."""
    packed = {}
    for name, form in forms.items():
        packed[name + VALUES] = Form(form.shape, torch.int8)
        packed[name + SCALES] = Form((form.shape[0] if len(form.shape) > 1 else 1,), torch.float32)
    return packed


class ErrorFeedback:
    """Rounding errors in the changes of one organisation, kept there from round to round.

    `residual` is plain tensors: save it with the organisation's other state, and set it to resume.
    """

    def __init__(self, residual: Mapping[str, Tensor] | None = None):
        self.residual = dict(residual or {})

    def corrected(self, update: Update) -> Update:
        """Return the update plus the losses of earlier rounds, and keep the loss of int8 in the sum.

        Raises:
            InputError: when the tensors differ from the tensors of the round before.
        """
        if self.residual and self.residual.keys() != update.tensors.keys():
            raise InputError(f"organisation {update.organisation!r}: its kept rounding errors are of other tensors")
        whole = {name: value + self.residual.get(name, 0) for name, value in update.tensors.items()}
        sent = dequantize(quantize(whole), {name: value.dtype for name, value in whole.items()})
        self.residual = {name: value - sent[name] for name, value in whole.items()}
        return replace(update, tensors=whole)


def _rows(tensor: Tensor) -> Tensor:
    count = tensor.shape[0] if tensor.ndim > 1 else 1
    return tensor.reshape(count, tensor.numel() // max(count, 1))


# ---- files of tensors ----


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, and its metadata."""
    with safe_open(path, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}  # noqa: SIM118


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under another name, to the disk, and rename."""
    unfinished = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, unfinished, metadata)
    durable.replace(unfinished, path)

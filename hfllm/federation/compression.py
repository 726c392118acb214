"""Changes in 8 bits on the wire: one scale per row, and error feedback at the organisation.

Each row of a tensor (its first axis; a vector is one row) is divided by its largest magnitude over 127 and rounded, so
that a value is off by half a step at most. An organisation keeps what rounding took and adds it to its next change
(Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847), so that errors do not add up over rounds.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.updates import Form, Update

KINDS = ("none", "int8")
VALUES, SCALES = ".int8", ".scale"
STEPS = 127


def quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return int8 values and float32 scales, under each name with `.int8` and `.scale`."""
    packed = {}
    for name, tensor in tensors.items():
        rows = _rows(tensor).float()
        # A row so small that its scale would not be a normal number is sent as zeros.
        scales = rows.abs().amax(1, keepdim=True) / STEPS if rows.numel() else rows.new_zeros(len(rows), 1)
        scales = torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
        packed[name + VALUES] = (rows / scales).round().clamp(-STEPS, STEPS).to(torch.int8).reshape(tensor.shape)
        packed[name + SCALES] = scales[:, 0].contiguous()
    return packed


def dequantize(packed: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the tensors that `quantize` was given, rounded, in these precisions."""
    tensors = {}
    for name, dtype in dtypes.items():
        values, scales = packed[name + VALUES], packed[name + SCALES]
        tensors[name] = (_rows(values).float() * scales[:, None]).reshape(values.shape).to(dtype)
    return tensors


def quantized_forms(forms: Mapping[str, Form]) -> dict[str, Form]:
    """Return shapes and precisions of what `quantize` makes of tensors of these."""
    packed = {}
    for name, form in forms.items():
        packed[name + VALUES] = Form(form.shape, torch.int8)
        packed[name + SCALES] = Form((form.shape[0] if len(form.shape) > 1 else 1,), torch.float32)
    return packed


class ErrorFeedback:
    """What rounding took from the changes of one organisation, which keeps it from round to round.

    `residual` is plain tensors: save it with the organisation's other state, and set it to resume.
    """

    def __init__(self, residual: Mapping[str, Tensor] | None = None):
        self.residual = dict(residual or {})

    def corrected(self, update: Update) -> Update:
        """Return the update with what earlier rounds lost, and keep what int8 loses of that.

        Raises:
            InputError: when the tensors are not those of the round before.
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

"""A GPU that is not there: tensors that say `cuda:0`, compute on the CPU, and refuse to meet the CPU's tensors.

    with pretend_gpu() as device:
        model.to(device)
        ...

Only the place of a tensor is pretended. Below Python it is a tensor of the device `meta`, as a FakeTensor is, so that
torch without CUDA takes it; its values are real, so that loops over data run as they would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
# A kernel takes numbers from the CPU, and these operations copy or take indices from there.
FROM_THE_CPU = ("aten.copy_.", "aten.index.", "aten.index_put", "aten._local_scalar_dense")


class MixedDevicesError(RuntimeError):
    """Raised where an operation gets tensors of both devices, as CUDA's would."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended device; `values` is the same on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnGpu":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), dtype=values.dtype, device=torch.device("meta"), **layout
        )
        made.values = values
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE

    def tolist(self) -> Any:
        return self.values.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Callable, args: tuple, kwargs: dict) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, OnGpu)]
    plain_args, plain_kwargs = tree_map(_values, (args, kwargs))
    if kwargs.get("device") is not None:
        is_ours = torch.device(kwargs["device"]).type in ("cuda", "meta")
        out = func(*plain_args, **{**plain_kwargs, "device": torch.device("cpu"), "pin_memory": False})
        return tree_map(lambda each: OnGpu(each) if is_ours and isinstance(each, torch.Tensor) else each, out)
    others = [each for each in tensors if not isinstance(each, OnGpu) and each.dim()]
    if ours and others and not str(func).startswith(FROM_THE_CPU):
        raise MixedDevicesError(f"{func}: {tuple(others[0].shape)} is on the CPU, {tuple(ours[0].shape)} on {DEVICE}")
    out = func(*plain_args, **plain_kwargs)
    # An operation in place returns the tensor that it was given.
    known = {id(each.values): each for each in ours}

    def placed(each: Any) -> Any:
        if not ours or not isinstance(each, torch.Tensor):
            return each
        return known[id(each)] if id(each) in known else OnGpu(each)

    return tree_map(placed, out)


def _values(each: Any) -> Any:
    return each.values if isinstance(each, OnGpu) else each


def _tensor(data: Any, *, device: Any = None, make: Callable = torch.tensor, **settings: Any) -> torch.Tensor:
    """`torch.tensor`, which bypasses dispatch modes to copy its numbers to a device."""
    made = make(_values(data), **settings)
    return made if device is None else made.to(device)


def _new_tensor(self: torch.Tensor, data: Any, *, dtype: Any = None, device: Any = None, **settings: Any) -> Any:
    return _tensor(data, device=device or self.device, dtype=dtype or self.dtype, **settings)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """Let tensors go to `cuda:0` within this context, which yields the device."""
    converts = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches = (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.tensor", _tensor),
        mock.patch("torch.Tensor.new_tensor", _new_tensor),
        # Inference tensors bypass dispatch modes too.
        mock.patch("torch.inference_mode", torch.no_grad),
        # There is no state to restore.
        mock.patch("torch.random.fork_rng", lambda *args, **kwargs: nullcontext()),
        mock.patch("torch.accelerator.synchronize", lambda *devices: None),
    )
    for patch in patches:
        patch.start()
    try:
        with _Everything():
            yield DEVICE
    finally:
        for patch in patches:
            patch.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(converts)

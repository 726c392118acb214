"""Check whether a teacher fits into memory before loading it, by its architecture, without weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfllm.errors import InputError
from hfllm.models.loading.adapters import find_adapter
from hfllm.models.loading.saved import empty_model, location_of, quantization_of, saved_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

PROC_MEMORY = Path("/proc/meminfo")
# Folder, limit, use, and the beginning of the names in memory.stat, of version 2 and of version 1.
CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
# Used where neither the settings nor the config say; a model that may fit must not be refused.
UNKNOWN_DTYPE_BYTES = 2


def check_fits_memory(name: str, settings: Mapping[str, object]) -> None:
    """Refuse a model that is larger than memory, before it is loaded.

    Args:
        name: a folder or a Hub id; one whose architecture transformers does not have passes: its size is unknown.
        settings: arguments of `from_pretrained`. With a `device_map` the model passes, since it may be spread, also to
            disk; so it does under ZeRO-3, whose processes hold a part each.

    Raises:
        InputError: with both sizes and what to do.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if settings.get("device_map") is not None or is_deepspeed_zero3_enabled():
        return
    config = _config_of(name, settings)
    size = None if config is None else loaded_bytes(config, settings)
    bytes_free = available_memory()
    if size is None or bytes_free is None or size <= bytes_free:
        return
    quantization = settings.get("quantization_config") or quantization_of(config)
    smaller = (
        'load it quantized (--teacher_model_init_kwargs \'{"quantization_config": {"load_in_8bit": true}}\'), or '
    )
    raise InputError(
        f"the teacher {name!r} takes {size / 2**30:.1f} GiB, and {bytes_free / 2**30:.1f} GiB are free: "
        f"{'' if quantization else smaller}let it write answers on a larger machine and train on those with "
        "hfllm sft"
    )


def _config_of(name: str, settings: Mapping[str, object]) -> "PreTrainedConfig | None":
    """Return the config of the model to load, for an adapter that of its base; `None` if it cannot be read."""
    location = location_of(settings)
    try:
        adapter = find_adapter(name, **location)
        return saved_config(name, **location) if adapter is None else adapter.base_config()
    except (InputError, OSError, TypeError, ValueError, KeyError):
        # Loading will report the error, or may succeed in another way.
        return None


def loaded_bytes(config: "PreTrainedConfig", settings: Mapping[str, object]) -> int | None:
    """Return the bytes of a causal language model's loaded weights; for a quantized one a lower bound.

    Args:
        settings: arguments of `from_pretrained`.

    Returns:
        `None` for an architecture that transformers does not have.
    """
    try:
        model = empty_model(config)
    except InputError:
        return None
    model.tie_weights()
    given = settings.get("dtype", settings.get("torch_dtype"))
    size = _itemsize(given, config)
    quantization = settings.get("quantization_config") or quantization_of(config)
    share = _quantized_bytes(quantization)
    if quantization and not isinstance(given, torch.dtype | str):
        size = min(size, UNKNOWN_DTYPE_BYTES)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    total = 0.0
    for parameter in model.parameters():
        is_matrix = parameter.ndim > 1 and id(parameter) not in tables
        total += parameter.numel() * (min(share, size) if quantization and is_matrix else size)
    return int(total)


def _itemsize(dtype: object, config: "PreTrainedConfig") -> int:
    """Return the bytes of a weight loaded with this `dtype` of `from_pretrained`."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else UNKNOWN_DTYPE_BYTES


def _quantized_bytes(quantization: "QuantizationConfigMixin | dict[str, Any]") -> float:
    """Return the estimated bytes of a weight of a quantized matrix; 0 for an unknown method."""
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if values.get("load_in_8bit") or values.get("quant_method") == "hfllm_int8":
        return 1.0
    return 0.5 if values.get("load_in_4bit") else 0.0


def available_memory() -> int | None:
    """Return the free bytes of the accelerator's memory, else of the machine and container; `None` if unknown."""
    if torch.accelerator.is_available() and hasattr(torch.accelerator, "get_memory_info"):
        return torch.accelerator.get_memory_info()[0]
    return min([*_of_machine(), *(free for group in CGROUPS for free in _of_cgroup(*group))], default=None)


def _of_machine() -> list[int]:
    try:
        lines = PROC_MEMORY.read_text().splitlines()
        return [next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))]
    except (OSError, StopIteration):
        pass
    try:
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (OSError, ValueError, AttributeError):
        return []


def _of_cgroup(folder: Path, limit: str, use: str, prefix: str) -> list[int]:
    """Return what a container's limit leaves free; cached files count as free, since they are dropped when needed."""
    try:
        most, used = (int((folder / name).read_text()) for name in (limit, use))
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        # No such group, or "max": no limit.
        return []
    kept = sum(int(line[1]) for line in lines if line[0] in (f"{prefix}inactive_file", f"{prefix}active_file"))
    return [max(0, most - used + kept)]

"""Capabilities of a device, and building models on it.

Its native precision, the tokens that fit into one pass, and one process per device; random numbers without a
trace, and models kept whole on each process where others are partitioned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

# The logits of a pass take at most this share of a device's memory: weights, optimizer and caches need the rest.
SHARE = 1 / 8
# Of one logit: its value in 16 bits, its copy and its log-probability in 32, and a temporary or its gradient.
BYTES_PER_VALUE = 16


def has_native_bf16() -> bool:
    """Return whether the accelerator multiplies in bf16; one that only emulates it (T4, V100, MPS) is slower so."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type == "mps":
        return False
    if accelerator.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def tokens_that_fit(values_per_token: int, memory: int) -> int:
    """Return how many tokens may be in one pass of a device, at least 1.

    Args:
        values_per_token: the widest tensor's, such as the vocabulary's size where all logits are made.
        memory: the device's, in bytes.
    """
    return max(int(memory * SHARE / (BYTES_PER_VALUE * values_per_token)), 1)


def device_memory(device: "torch.device") -> int | None:
    """Return all bytes of an accelerator's memory, free or not, so that equal devices get equal passes.

    It is `None` for a CPU, whose passes are limited by other rules, and where it is unknown.
    """
    import torch

    if device.type in ("cpu", "meta"):
        return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return torch.accelerator.get_memory_info(device)[1]
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def most_logits(model: "PreTrainedModel", device: "torch.device") -> int | None:
    """Return the most tokens of one pass whose logits are all made; `None` is no limit, as on a CPU."""
    memory = device_memory(device)
    return None if memory is None else tokens_that_fit(model.config.get_text_config().vocab_size, memory)


def most_tokens(model: "PreTrainedModel", device: "torch.device") -> int | None:
    """Return the most tokens of one pass without gradients, padding included; `None` is no limit, as on a CPU."""
    memory = device_memory(device)
    if memory is None:
        return None
    config = model.config.get_text_config()
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return tokens_that_fit(max(widest, config.hidden_size), memory)


@contextmanager
def forked_random(device: "torch.device") -> Iterator[None]:
    """Restore the random state of the CPU and of this device afterwards.

    `torch.random.fork_rng()` by itself would open a context on every GPU of the machine, in each of the processes.
    """
    import torch

    with torch.random.fork_rng(devices=[] if device.type in ("cpu", "meta") else [device.index or 0]):
        yield


def refuse_data_parallel(args: "TrainingArguments") -> None:
    """Refuse one process with several GPUs, over which `Trainer` would spread each batch by `nn.DataParallel`."""
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs, which nn.DataParallel would share: start one process for each by "
            "accelerate launch (or hfllm NAME), or choose a single one by CUDA_VISIBLE_DEVICES=0"
        )


@contextmanager
def built_whole() -> Iterator[None]:
    """Build models whole on each process within this context, also where ZeRO-3 is on.

    A constructor itself is never partitioned. transformers partitions models built by `from_config` within one, such
    as a vision tower, whose weights are then empty when the constructor draws them.
    """
    from transformers.integrations import deepspeed

    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    settings = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(settings)

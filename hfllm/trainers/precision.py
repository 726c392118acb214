"""Products in bf16 on a CPU with units for them, chosen by measurement and kept when a run is resumed.

Recent processors multiply in bf16 two to eight times as fast as in fp32, and others emulate it slowly. Autocast rounds
the inputs of products alone: weights, their updates and everything between products stay in fp32.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfllm.flags import GIVEN, changed
from hfllm.models.family.attention_hfllm import attend_in_fp32
from hfllm.outputs.checkpoints import record_of, state_of
from hfllm.runs.command_line import say_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

Trained = TypeVar("Trained", bound="TrainingArguments")

# In narrower models rounding takes as long as it saves.
NARROWEST = 128
# A processor with units for bf16 is at least twice as fast, and one without slower than in fp32: nothing is between.
PAYS = 1.4
# Tokens, inputs and outputs of the measured product; how often it is measured; and the tokens of a first trial, since
# a processor without units takes ten times as long.
SHAPE, ROUNDS, TRIAL = (1024, 256, 512), 5, 64
CHOICE = "products"


@cache
def bf16_speedup() -> float:
    """Return how many times as fast as in fp32 this CPU multiplies in bf16, rounding included; in a tenth of a second.

    Both run in turn, and the fastest round of each counts. Where bf16 is emulated, a few tokens show it.
    """
    tokens, inputs, outputs = SHAPE
    with torch.random.fork_rng(devices=[]):
        states, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    trial = _speedup(states[:TRIAL], weight)
    return trial if trial < 0.5 else _speedup(states, weight)


def _speedup(states: torch.Tensor, weight: torch.Tensor) -> float:
    rounded = weight.bfloat16()

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        began = time.perf_counter()
        for _ in range(4):
            product()
        return time.perf_counter() - began

    times = [
        (
            seconds(lambda: torch.nn.functional.linear(states, weight)),
            seconds(lambda: torch.nn.functional.linear(states.bfloat16(), rounded)),
        )
        for _ in range(ROUNDS + 1)
    ]
    # The first round prepares the kernels.
    return min(plain for plain, _ in times[1:]) / min(half for _, half in times[1:])


def multiplies_in_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies in bf16 at least as fast as in fp32; of a CPU this is measured."""
    return device.type != "cpu" or bf16_speedup() >= PAYS


def with_fast_products(args: Trained, model: "PreTrainedModel", checkpoint: str | None = None) -> Trained:
    """Return a trainer's arguments, with bf16 autocast where it is faster on this CPU; a line says so.

    A precision chosen by the user, accelerate or DeepSpeed stays, and so does fp32 where the model is narrow, or its
    weights are not in fp32.

    Args:
        checkpoint: to resume from; its run's choice is kept.
    """
    is_open = args.mixed_precision == "no" and args.deepspeed_plugin is None and not args.fsdp
    if not is_open or args.device.type != "cpu" or {"bf16", "fp16"} & set(getattr(args, GIVEN, ())):
        return args
    width = getattr(model.config.get_text_config(), "hidden_size", None) or 0
    if width < NARROWEST or model.dtype != torch.float32:
        return args
    before = (record_of(state_of(checkpoint)).get("run") or {}).get(CHOICE) if checkpoint else None
    if before == "fp32" or (before is None and not multiplies_in_bf16(args.device)):
        return args
    reason = "as before" if before else f"{bf16_speedup():.1f} times as fast as fp32 on this CPU"
    AttentionInterface.register("sdpa", _attention)
    say_once(f"products in bf16, {reason} (--bf16 false: fp32)")
    return changed(args, bf16=True, mixed_precision="bf16")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' SDPA returns, computed in fp32 within a CPU's autocast also for models as they are."""
    states = query, key, value, attention_mask
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return attend_in_fp32(sdpa_attention_forward, module, *states, **kwargs)
    return sdpa_attention_forward(module, *states, **kwargs)


def choice_of(args: "TrainingArguments") -> str:
    """Return the precision of a trainer's products, for the record of its run."""
    return {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision)

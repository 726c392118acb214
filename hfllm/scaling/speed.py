"""Estimate the time of a step from FLOPs, memory traffic, pipeline bubble, and communication.

An estimate for comparing layouts. Two constants are fitted to 14 published runs, which it reproduces within 12%
(tests/scaling/test_speed.py): Narayanan et al. 2021 (arXiv:2104.04473, table 1) and Korthikanti et al. 2022
(arXiv:2205.05198, table 5), 1.7 to 1008 billion parameters on 8 to 3072 A100.
"""

from dataclasses import dataclass, replace

from hfllm.scaling.activations import Precision, layer_activations
from hfllm.scaling.devices import Device
from hfllm.scaling.flops import pipeline_bubble
from hfllm.scaling.layouts import DDP, MEGATRON, Layout
from hfllm.scaling.shapes import Shape

# Share of its peak that a device reaches in large matrix products.
EFFICIENCY = 0.68
# How often operations between them (norms, activations, softmax) move a layer's kept bytes through memory: once in
# three of these forward, the rest backward.
TRAVERSALS = 8.75


@dataclass(frozen=True)
class Speed:
    """One step of a layout.

    Args:
        seconds: time of the step.
        compute, bubble, communication: its parts: work, waiting for other stages, and communication that is
            not overlapped.
        mfu, hfu: shares of the peak, without and with recomputation.
        tokens_per_second: of all devices.
    """

    seconds: float
    compute: float
    bubble: float
    communication: float
    mfu: float
    hfu: float
    tokens_per_second: float


def flops_per_token(shape: Shape, sequence_length: int, recompute: str = "none") -> dict[str, float]:
    """Return the FLOPs of training on one token: `layers`, `attention`, `head`, and recomputation (`again`).

    Two per multiplied parameter and pass, three passes; attention scores as in PaLM's count, 12 L H Q T, in
    which every token attends to all others. Recomputed are one forward pass of the layers (`"full"`) or of the scores
    (`"selective"`).
    """
    head = 6 * shape.vocab_size * shape.hidden_size
    layers = 6 * shape.multiplied_parameters() - head
    attention = 12 * shape.num_hidden_layers * shape.query_size * sequence_length
    again = {"none": 0.0, "selective": attention / 3, "full": (layers + attention) / 3}[recompute]
    return {"layers": layers, "attention": attention, "head": head, "again": again}


def estimate(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    device: Device,
    sequence_length: int,
    global_batch_size: int,
    attention: str = "flash",
    efficiency: float = EFFICIENCY,
) -> Speed:
    """Estimate the time of one step on `global_batch_size` sequences.

    Args:
        attention: `"flash"` or `"eager"`, whose scores pass through memory.
        efficiency: share of its peak that the device reaches in matrix products.

    Raises:
        InputError: when the device cannot compute in the precision.
    """
    flops, peak = flops_per_token(shape, sequence_length, layout.recompute), device.peak(precision.name)
    tokens = layout.micro_batch * sequence_length
    passes = layout.micro_batches(global_batch_size)
    # The last stage also has the head, and the others wait for it.
    stage = (flops["layers"] + flops["attention"] + flops["again"]) / layout.pipeline + flops["head"]
    work = tokens * stage / (layout.tensor * peak * efficiency)
    work += tokens * _memory_traffic(shape, layout, precision, sequence_length, attention) / device.bandwidth
    compute = passes * work
    bubble = compute * pipeline_bubble(layout.pipeline, passes, layout.interleave)
    waiting = passes * _waiting_within(shape, layout, precision, device, tokens)
    waiting += _waiting_for_replicas(shape, layout, precision, device, passes, work)
    seconds = compute + bubble + waiting
    step_tokens = global_batch_size * sequence_length
    model = flops["layers"] + flops["attention"] + flops["head"]
    reach = step_tokens / (seconds * layout.devices * peak)
    return Speed(
        seconds, compute, bubble, waiting, model * reach, (model + flops["again"]) * reach, step_tokens / seconds
    )


def _memory_traffic(shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str) -> float:
    """Return the bytes per token that a device moves in its own memory between matrix products."""
    keeping_all = replace(layout, recompute="none")
    options = precision, sequence_length, attention
    kept = layer_activations(shape, keeping_all, *options)
    again = kept - layer_activations(shape, layout, *options) if layout.recompute != "none" else 0.0
    return shape.num_hidden_layers / layout.pipeline * TRAVERSALS * (kept + again / 3)


def _bandwidth(device: Device, group: int) -> float:
    """Return the bytes per second between neighbors in a group of `group` adjacent devices."""
    return device.near if group <= device.per_node else device.far


def _waiting_within(shape: Shape, layout: Layout, precision: Precision, device: Device, tokens: int) -> float:
    """Return the seconds per pass for tensor, expert and pipeline communication, which is not overlapped."""
    states = tokens * shape.hidden_size * precision.compute
    layers, seconds = shape.num_hidden_layers / layout.pipeline, 0.0
    # Forward, backward, and recomputation.
    passes = 3 if layout.recompute == "full" else 2
    if layout.tensor > 1:
        blocks = 1 if shape.parallel_block else 2
        moved = 2 * (layout.tensor - 1) / layout.tensor * states
        seconds += layers * blocks * passes * moved / _bandwidth(device, layout.tensor)
    if layout.expert > 1:
        moved = 2 * (layout.expert - 1) / layout.expert * states * shape.num_experts_per_tok
        seconds += layers * passes * moved / _bandwidth(device, layout.expert * layout.tensor)
    if layout.pipeline > 1:
        share = layout.tensor if layout.sequence_parallel else 1
        seconds += 2 * layout.interleave * states / share / _bandwidth(device, layout.devices)
    return seconds


def _waiting_for_replicas(
    shape: Shape, layout: Layout, precision: Precision, device: Device, passes: int, work: float
) -> float:
    """Return the seconds per step for gradients and sharded weights, beyond the overlapping work."""
    if layout.data == 1:
        return 0.0
    layer = shape.layer_parameters()
    dense = shape.num_parameters() - shape.num_hidden_layers * layer["experts"]
    parameters = dense / (layout.tensor * layout.pipeline)
    parameters += shape.num_hidden_layers * layer["experts"] / (layout.tensor * layout.pipeline * layout.expert)
    once = parameters * (layout.data - 1) / layout.data / _bandwidth(device, layout.data * layout.tensor)
    gradients, weights = once * precision.gradients, once * precision.weights
    backward = work * 2 / 3
    if layout.zero_stage == 3:
        # Weights are gathered for the forward and the backward pass of every micro-batch.
        return passes * max(0.0, 2 * weights + gradients - work)
    if layout.engine == DDP or (layout.engine == MEGATRON and layout.zero_stage == 0):
        return max(0.0, 2 * gradients - backward)
    reductions = passes if layout.zero_stage == 2 else 1
    return reductions * max(0.0, gradients - backward) + weights

"""Estimate the time of a step from FLOPs, memory traffic, pipeline bubble, and links between devices.

An estimate for comparing layouts. Its constants (below, and a device's efficiencies) are fitted to published
runs; others are held out. benchmarks/published_runs.csv lists all of them, and docs/guides/planner.md shows the
errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hfllm.errors import InputError, check_choice
from hfllm.scaling.devices import Device
from hfllm.scaling.layouts import DDP, MEGATRON, RECOMPUTE, Layout, stage_layers
from hfllm.scaling.memory import Precision, layer_activations
from hfllm.scaling.shapes import Shape, scored_keys

# ---- the time of a step ----


# How often operations between matrix products (norms, activations, softmax) move a layer's kept bytes through memory:
# once in three of these forward, the rest backward.
TRAVERSALS = 10
# The same for layers fused by torch.compile. The fit is flat between 4 and 8.
COMPILED_TRAVERSALS = 5
# Communication behind work takes processors and memory bandwidth from it: so much of its own time.
CONTENTION = 0.6


@dataclass(frozen=True)
class Speed:
    """One step of a layout.

    Args:
        seconds: time of the step.
        compute, bubble, communication: its parts: work, waiting for other stages, and communication that is
            not overlapped.
        mfu, hfu: shares of the 16-bit peak (in fp32, of the fp32 peak), without and with recomputation.
        tokens_per_second: of all devices.
    """

    seconds: float
    compute: float
    bubble: float
    communication: float
    mfu: float
    hfu: float
    tokens_per_second: float


def flops_per_token(
    shape: Shape, sequence_length: int, recompute: str = "none", attention: str = "flash"
) -> dict[str, float]:
    """Return the FLOPs of training on one token: `layers`, `attention`, `head`, and recomputation (`again`).

    Two per multiplied parameter and pass, three passes; attention scores as in PaLM's count, 12 L H Q T, in
    which every token attends to all others. Recomputed are one forward pass of the layers (`"full"`) or of the scores
    (`"selective"`). A layer of linear attention recalls, changes and reads its state instead: 18 H D W. One with a
    window scores the keys of its blocks (`banded_keys`), unless `attention` is `"eager"`. Among `layers` is the work
    of a row's images, spread over its tokens.
    """
    head = 6 * shape.vocab_size * (shape.hidden_size + shape.lm_head_bias)
    layers = 6 * shape.multiplied_parameters() - head
    if shape.tower is not None:
        layers += shape.images_per_row * shape.tower.flops_per_picture() / sequence_length
    keys = scored_keys(shape, sequence_length, attention)
    scores = 6 * keys * (shape.query_size + shape.output_size) + 18 * shape.linear_layers * shape.state_size
    again = {"none": 0.0, "selective": scores / 3, "full": (layers + scores) / 3}[recompute]
    return {"layers": layers, "attention": scores, "head": head, "again": again}


def estimate(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    device: Device,
    sequence_length: int,
    global_batch_size: int,
    attention: str = "flash",
    efficiency: float | None = None,
    overlap_experts: bool = False,
    compiled: bool = False,
) -> Speed:
    """Estimate the time of one step on `global_batch_size` sequences.

    Args:
        attention: `"flash"`, `"flash1"` or `"eager"`, whose scores pass through memory.
        efficiency: the device's share of its peak in matrix products; `None` is `device.efficiency`.
        overlap_experts: whether the exchange with experts hides behind work, as far as there is work (DualPipe,
            arXiv:2412.19437, section 3.2.1).
        compiled: whether torch.compile fuses the operations between the matrix products.

    Raises:
        InputError: when the device cannot compute in the precision.
    """
    flops = flops_per_token(shape, sequence_length, layout.recompute, attention)
    tokens = layout.micro_batch * sequence_length / layout.context
    passes = layout.micro_batches(global_batch_size)
    share = efficiency or device.efficiency
    traversals = COMPILED_TRAVERSALS if compiled else TRAVERSALS
    traffic = traversals * _memory_traffic(shape, layout, precision, sequence_length, attention)
    layer, head = _layer_and_head(flops, traffic, shape, layout, precision, device, attention, share)
    layer_counts = stage_layers(shape.num_hidden_layers, layout.pipeline, layout.interleave)
    # The last stage also has the head, and the others wait for the slowest.
    slowest = tokens * max(max(layer_counts) * layer, layer_counts[-1] * layer + head)
    mean = tokens * (shape.num_hidden_layers * layer + head) / layout.pipeline
    compute = passes * slowest + _optimizer_seconds(shape, layout, precision, device)
    bubble = passes * mean * pipeline_bubble(layout.pipeline, passes, layout.interleave)
    waiting = passes * _waiting_within(
        shape, layout, precision, device, tokens, max(layer_counts), slowest, overlap_experts
    )
    waiting += _waiting_for_replicas(shape, layout, precision, device, passes, slowest)
    seconds = compute + bubble + waiting
    step_tokens = global_batch_size * sequence_length
    model = flops["layers"] + flops["attention"] + flops["head"]
    peak = device.peak_fp32 if precision.name.startswith("fp32") else device.peak_16bit
    reach = step_tokens / (seconds * layout.devices * peak)
    return Speed(
        seconds, compute, bubble, waiting, model * reach, (model + flops["again"]) * reach, step_tokens / seconds
    )


def _layer_and_head(
    flops: Mapping[str, float],
    traffic: float,
    shape: Shape,
    layout: Layout,
    precision: Precision,
    device: Device,
    attention: str,
    share: float,
) -> tuple[float, float]:
    """Return the seconds of work per token in one layer, and in the head.

    Args:
        traffic: bytes per token and layer through the device's memory, between matrix products.
        share: reached share of the peak.
    """
    peak = device.peak(precision.name)
    # Attention and the head are not computed in fp8.
    wide = device.peak_16bit if precision.name.startswith("fp8") else peak
    rounds = 4 / 3 if layout.recompute == "full" else 1
    scores = 4 / 3 if layout.recompute != "none" else 1
    products = flops["layers"] * rounds / (peak * share)
    kernel = device.flash1_efficiency if attention == "flash1" else device.attention_efficiency
    products += flops["attention"] * scores / (wide * kernel)
    if precision.name.startswith("fp8"):
        traffic += rounds * _casts(shape) / layout.tensor
    layer = products / (shape.num_hidden_layers * layout.tensor) + traffic / device.bandwidth
    return layer, flops["head"] / (layout.tensor * wide * share)


def _memory_traffic(shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str) -> float:
    """Return the bytes per token and layer of one traversal of the kept values, a third more if recomputed."""
    # Casts to fp8 are counted apart.
    options = replace(precision, copies=0), sequence_length, attention
    if layout.recompute == "none":
        return layer_activations(shape, layout, *options)
    activations = layer_activations(shape, replace(layout, recompute="none"), *options)
    return activations + (activations - layer_activations(shape, layout, *options)) / 3


def _casts(shape: Shape) -> float:
    """Return the bytes per token and layer moved by casts to fp8: of inputs and gradients of each product.

    16-bit values are read, and written once as they are and once transposed, for the gradient of the weight.
    """
    inner, widths = 2 if shape.is_gated else 1, [shape.intermediate_size]
    if shape.num_local_experts:
        widths = [shape.expert_size] * shape.num_experts_per_tok + ([shape.shared_size] if shape.shared_size else [])
    attention = shape.hidden_size + shape.output_size + shape.query_size + shape.key_size + shape.value_size
    mlp = len(widths) * 2 * shape.hidden_size + (1 + inner) * sum(widths)
    return 4 * (attention + shape.hidden_size + mlp)


def _device_parameters(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Return the parameters on one device before sharding, on average over stages: of experts, and all others."""
    experts = shape.parameters()["experts"]
    split = layout.tensor * layout.pipeline
    return experts / (split * layout.expert), (shape.num_parameters() - experts) / split


def _optimizer_seconds(shape: Shape, layout: Layout, precision: Precision, device: Device) -> float:
    """Return the seconds of the optimizer's step: it reads all states and gradients, and writes states and weights."""
    experts, dense = _device_parameters(shape, layout)
    shards = layout.shards if layout.zero_stage else 1
    moved = 2 * precision.optimizer + precision.gradients + precision.weights
    return moved * (dense / shards + experts / max(1, shards // layout.expert)) / device.bandwidth


def _waiting_within(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    device: Device,
    tokens: float,
    layers: int,
    work: float,
    overlap_experts: bool,
) -> float:
    """Return the seconds per pass for tensor, context, expert and pipeline communication.

    Only the exchange with experts may be hidden, behind the `work` of the pass.
    """
    states = tokens * shape.hidden_size * precision.compute
    seconds = 0.0
    # Forward, backward, and recomputation.
    passes = 3 if layout.recompute == "full" else 2
    share = layout.tensor if layout.sequence_parallel else 1
    if layout.tensor > 1:
        blocks = 1 if shape.parallel_block else 2
        moved = 2 * (layout.tensor - 1) / layout.tensor * states
        seconds += layers * blocks * passes * moved / bandwidth(device, layout.tensor)
    if layout.context > 1:
        # Keys and values of the whole row, and in the backward pass also their gradients.
        width = (shape.key_size + shape.value_size) / layout.attention_split(shape)
        moved = tokens * (layout.context - 1) * width * precision.compute
        seconds += layers * (passes + 1) * moved / bandwidth(device, layout.context * layout.tensor)
    if layout.expert > 1:
        exchange = 2 * layers * passes * exchange_seconds(shape, layout, device, states / share)
        seconds += _beside(exchange, work) if overlap_experts else exchange
    if layout.pipeline > 1:
        seconds += 2 * layout.interleave * states / share / bandwidth(device, layout.devices)
    return seconds


def _waiting_for_replicas(
    shape: Shape, layout: Layout, precision: Precision, device: Device, passes: int, work: float
) -> float:
    """Return the seconds per step for gradients and sharded weights, beyond the overlapping work."""
    if layout.shards == 1:
        return 0.0
    experts, dense = _device_parameters(shape, layout)

    def gathered(width: float, calls: int = 1) -> float:
        among = gather_seconds(device, width * dense, layout.shards, layout.tensor, calls)
        if not experts:
            return among
        # The replicas of the same experts are further apart.
        stride = layout.tensor * layout.expert
        return among + gather_seconds(device, width * experts, layout.shards // layout.expert, stride, calls)

    gradients = gathered(precision.gradients)
    backward = work * 2 / 3
    if layout.zero_stage == 3:
        # Weights are gathered for the forward and the backward pass of every micro-batch, in 16 bits, layer by layer.
        width, calls = precision.compute if precision.is_autocast else precision.weights, shape.num_hidden_layers
        each = 2 * gathered(width, calls) + gathered(precision.gradients, calls)
        return passes * _beside(each, work)
    if layout.engine == DDP or (layout.engine == MEGATRON and layout.zero_stage == 0):
        return _beside(2 * gradients, backward)
    reductions = passes if layout.zero_stage == 2 else 1
    return reductions * _beside(gradients, backward) + gathered(precision.weights)


def _beside(communication: float, work: float) -> float:
    """Return the additional seconds of work from simultaneous communication."""
    return max(0.0, communication - work) + CONTENTION * min(communication, work)


# ---- flops ----
#
# Published arithmetic of training: FLOPs, utilization, pipeline bubbles and days.
#
# Symbols are the papers': P or N parameters, D or T tokens, l layers, h hidden size, a heads, s sequence length,
# V vocabulary, B sequences in a global batch, n devices, X achieved FLOP/s per device.


SECONDS_PER_DAY = 86400


def megatron_parameters(layers: int, hidden: int, vocab_size: int, sequence_length: int) -> float:
    """Return P = 12 l h^2 (1 + 13/(12h) + (V+s)/(12lh)) (Narayanan et al. 2021, arXiv:2104.04473, equation 2)."""
    return 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocab_size + sequence_length) / (12 * layers * hidden))


def megatron_flops_per_batch(
    layers: int,
    hidden: int,
    vocab_size: int,
    sequence_length: int,
    batch_size: int,
    recompute: str = "none",
) -> float:
    """Return the FLOPs of a training step on B sequences, as in Korthikanti et al. 2022 (arXiv:2205.05198, app. A).

    Args:
        recompute: `"none"` is the model's FLOPs, 72 B l s h^2 (1 + s/(6h) + V/(12lh)). `"selective"` doubles the
            attention term, as the paper counts it: s/(3h). `"full"` is every layer's forward pass once more:
            96 B l s h^2 (1 + s/(6h) + V/(16lh)), equation 3 of Narayanan et al. 2021.

    Raises:
        InputError: for another `recompute`.
    """
    check_choice(f"recompute={recompute!r} is not one of", recompute, RECOMPUTE)
    layer = batch_size * layers * sequence_length * hidden**2
    attention, head = sequence_length / (6 * hidden), vocab_size / (12 * layers * hidden)
    if recompute == "full":
        return layer * (96 * (1 + attention) + 72 * head)
    return 72 * layer * (1 + attention * (2 if recompute == "selective" else 1) + head)


def palm_flops_per_token(
    num_parameters: float, layers: int, heads: int, head_dim: int, sequence_length: int, attention: bool = True
) -> float:
    """Return the matrix-multiplication FLOPs of training on one token: 6N + 12 L H Q T, without `attention` 6N.

    PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B.

    Args:
        num_parameters: N, the ones multiplied with each token: only active experts; an embedding table not tied to the
            head is looked up, not multiplied.
        sequence_length: T, tokens of a sequence, all attending to each other in this count.
    """
    return 6 * num_parameters + 12 * layers * heads * head_dim * sequence_length * attention


def training_flops(num_parameters: float, tokens: float) -> float:
    """Return 6ND: forward and backward pass per parameter and token (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * num_parameters * tokens


def utilization(tokens_per_second: float, flops_per_token: float, devices: int, peak_flops: float) -> float:
    """Return the reached share of the devices' peak.

    This is MFU with the model's FLOPs per token, HFU with the hardware's, including recomputation.

    Args:
        tokens_per_second: of all devices together.
        peak_flops: of one device, in FLOP/s.
    """
    return tokens_per_second * flops_per_token / (devices * peak_flops)


def training_days(
    num_parameters: float, tokens: float, devices: int, achieved_flops: float, recompute: bool = True
) -> float:
    """Return 8TP/(nX) in days (Narayanan et al. 2021, equation 4), or 6TP/(nX) when nothing is recomputed.

    Args:
        achieved_flops: X, FLOP/s of one device, including any recomputation.
    """
    return (8 if recompute else 6) * tokens * num_parameters / (devices * achieved_flops) / SECONDS_PER_DAY


def days_at_speed(tokens: float, tokens_per_second: float) -> float:
    """Return the days to train on `tokens` at a measured speed of all devices together."""
    return tokens / tokens_per_second / SECONDS_PER_DAY


def pipeline_bubble(pipeline: int, micro_batches: int, interleave: int = 1) -> float:
    """Return idle time over useful time, (p - 1)/(v m) (Narayanan et al. 2021, section 2.2).

    Args:
        pipeline: p, stages.
        micro_batches: m, micro-batches per step.
        interleave: v, model chunks per device.
    """
    return (pipeline - 1) / (interleave * micro_batches)


def ramp_tokens(stages: Sequence[tuple[int, int]], sequence_length: int) -> int:
    """Return the tokens of a run whose batch grows.

    Args:
        stages: sequences per batch, and the last step of the stage; PaLM's (arXiv:2204.02311, section 5) are
            `[(512, 50_000), (1024, 115_000), (2048, 255_000)]`.

    Raises:
        InputError: when the steps do not grow.
    """
    total, before = 0, 0
    for sequences, until in stages:
        if until <= before or sequences < 1:
            raise InputError(f"batch ramp: stage {sequences}:{until} must have sequences and end after step {before}")
        total += sequences * (until - before) * sequence_length
        before = until
    return total


# ---- links ----
# Transfer times of bytes between devices, in seconds: collectives of a group, inside nodes and across them.


# Latency of a step of a ring, within a node and over the network: NCCL's own model (ring, protocol Simple).
NEAR_LATENCY, FAR_LATENCY = 3.4e-6, 14e-6


def bandwidth(device: Device, group: int) -> float:
    """Return the bytes per second between neighbors in a group of `group` adjacent devices."""
    return device.near if group <= device.per_node else device.far


def gather_seconds(device: Device, size: float, group: int, stride: int = 1, calls: int = 1) -> float:
    """Return the seconds to gather `size` bytes on each device of a group, or to reduce as many to shares.

    A node receives its missing bytes once, over the links of all its devices in the group, which pass them on among
    themselves: each link carries `size` over their number.

    Args:
        size: bytes on each device in the end.
        group: devices.
        stride: distance between neighbors; devices in between hold other weights (tensor parallelism).
        calls: number of collectives for the bytes, each with a ring's latency.
    """
    if group == 1:
        return 0.0
    here = min(group, max(1, device.per_node // stride))
    nodes = -(-group // here)
    near = size * (here - 1) / here / device.near
    far = size * (nodes - 1) / nodes / (here * device.far)
    return max(near, far) + calls * ((group - nodes) * NEAR_LATENCY + (nodes - 1) * FAR_LATENCY)


def exchange_seconds(shape: Shape, layout: Layout, device: Device, states: float) -> float:
    """Return the seconds to send the states of a layer's tokens to their experts, or back.

    To another node a token travels once, however many of its experts are there; with evenly used experts they are on
    n (1 - (1 - 1/n)^k) of n nodes, and on `topk_group` at most.

    Args:
        states: bytes of the tokens of one device.
    """
    devices, chosen = layout.expert, shape.num_experts_per_tok
    near = states * chosen * (devices - 1) / devices / device.near
    nodes = -(-devices * layout.tensor * layout.context // device.per_node)
    if nodes == 1:
        return near
    reached = min(nodes * (1 - (1 - 1 / nodes) ** chosen), shape.topk_group if shape.n_group > 1 else nodes)
    return max(near, states * reached * (nodes - 1) / nodes / device.far)

"""Bytes that training needs on one device: weights, gradients, optimizer states, activations.

    device_memory(shape, Layout(data=8, zero_stage=2), PRECISIONS["bf16"], sequence_length=4096).peak

The activations themselves are counted in activations.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hfllm.errors import InputError
from hfllm.scaling.activations import (
    ATTENTION,
    PRECISIONS,
    Precision,
    autocast_weights,
    layer_activations,
    layer_workspace,
    loss_bytes,
    norm_bytes,
)
from hfllm.scaling.devices import Device
from hfllm.scaling.layouts import DDP, DEEPSPEED, FSDP2, MEGATRON, Layout
from hfllm.scaling.shapes import Shape
from hfllm.scaling.stages import stage_layers

# DeepSpeed's defaults, in elements: reduce_bucket_size of ZeRO-1 and 2, stage3_max_live_parameters,
# stage3_prefetch_bucket_size.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by part.

    Args:
        activations: kept by the forward pass, and needed in addition by one layer's backward pass.
        logits: scores of the vocabulary, their softmax and their gradient.
        buffers: for communication, for weights that ZeRO-3 gathers, and of the process itself.
        fragments: reserved by the device's allocator beyond what is allocated, fewer where the device is full.
        peak: largest total at any time. It is less than the sum of the parts if gradients replace activations.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    fragments: float
    peak: float


def zero_state_bytes(
    num_parameters: float, data: int = 1, zero_stage: int = 0, precision: Precision = PRECISIONS["bf16"]
) -> dict[str, float]:
    """Return the bytes of weights, gradients and optimizer states of one device (ZeRO, arXiv:1910.02054, figure 1)."""
    return {
        "weights": num_parameters * (precision.weights + precision.copies) / (data if zero_stage >= 3 else 1),
        "gradients": num_parameters * precision.gradients / (data if zero_stage >= 2 else 1),
        "optimizer": num_parameters * precision.optimizer / (data if zero_stage >= 1 else 1),
    }


@dataclass(frozen=True)
class _Stage:
    """One device's part of a pipeline: its layers, its ends, and how many micro-batches are in progress in it."""

    layers: int
    is_first: bool
    is_last: bool
    passes: float


def _stages(shape: Shape, layout: Layout, micro_batches: int) -> Iterator[_Stage]:
    """Yield the stages of which one is the fullest.

    They are the first, which holds most micro-batches, the second, which may have a layer more than it, and the last,
    which holds the logits.
    """
    if layout.pipeline == 1:
        yield _Stage(shape.num_hidden_layers, True, True, 1)
        return
    layers, p = stage_layers(shape.num_hidden_layers, layout.pipeline, layout.interleave), layout.pipeline
    # Interleaving keeps 1 + (p-1)/(pv) times as much (arXiv:2205.05198, section 4.2.3).
    passes = p if layout.interleave == 1 else p * (1 + (p - 1) / (p * layout.interleave))
    yield _Stage(layers[0], True, False, min(passes, micro_batches))
    if p > 2 and layers[1] > layers[0]:
        yield _Stage(layers[1], False, False, min(passes - 1 / layout.interleave, micro_batches))
    yield _Stage(layers[-1], False, True, 1)


def _stage_parameters(shape: Shape, layout: Layout, stage: _Stage) -> tuple[float, float]:
    """Return the parameters on one device before sharding over `data`: those of experts, and all others."""
    layer = shape.layer_parameters()
    # The mean over layers of several types.
    attention = shape.parameters()["attention"] / shape.num_hidden_layers / layout.attention_split(shape)
    dense = stage.layers * (attention + layer["mlp"] / layout.tensor + layer["router"] + layer["norms"])
    experts = stage.layers * layer["experts"]
    # Of stages between, as if they had none, which is the fullest.
    replaced = shape.dense_layers(0, stage.layers) if stage.is_first else 0
    if not stage.is_first and stage.is_last:
        replaced = shape.dense_layers(shape.num_hidden_layers - stage.layers)
    if replaced:
        change = shape.dense_layer_change()
        dense += replaced * (change["mlp"] / layout.tensor + change["router"])
        experts += replaced * change["experts"]
    parts = shape.parameters()
    # transformers' plans split only the head, Megatron-LM both tables.
    table_split = layout.tensor if layout.splits_logits else 1
    if stage.is_first:
        dense += parts["embeddings"] / table_split + parts["positions"]
        # What sees is on every device of the first stage.
        dense += parts.get("tower", 0) + parts.get("projector", 0)
    if stage.is_last and not (stage.is_first and shape.tie_word_embeddings):
        dense += shape.vocab_size * shape.hidden_size / layout.tensor
    if stage.is_last:
        dense += shape.vocab_size * shape.lm_head_bias / layout.tensor
        dense += parts["norms"] - shape.num_hidden_layers * layer["norms"]
    return experts / (layout.tensor * layout.expert), dense


def _buffers(shape: Shape, layout: Layout, precision: Precision, parameters: float) -> float:
    """Return the bytes of an engine's buffers: gradient buckets, and weights gathered by ZeRO-3."""
    layer = _layer_size(shape) / layout.tensor
    if layout.engine == DDP:
        return parameters * precision.gradients
    if layout.engine == FSDP2:
        # The current layer and the prefetched one, which is copied out of a buffer, and a gradient that is copied into
        # one, in fp32. Outside of the layers are the tables, which stay gathered, and their gradient.
        tables = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size if layout.fsdp else 0
        tables /= layout.tensor if layout.splits_logits else 1
        return layer * (3 * precision.compute + precision.gradients + 4) + 2 * precision.compute * tables
    if layout.engine == DEEPSPEED:
        bucket = _bucket(precision, parameters)
        if layout.zero_stage == 3:
            # A matrix is gathered, and its gradient made, in one piece.
            largest = _largest_tensor(shape)
            live = max(min(MAX_LIVE_PARAMETERS, parameters), largest) * precision.weights
            # The next weights are fetched into a buffer of their own.
            live += min(PREFETCH_BUCKET, parameters) * precision.weights
            return live + max(bucket, largest * precision.gradients)
        # ZeRO-1 and 2 keep a copy of their share of the weights, also of fp32 ones.
        return bucket + (parameters * precision.weights / layout.shards if precision.weights == 4 else 0)
    return 4 * min(precision.reduced, parameters)


def _bucket(precision: Precision, parameters: float) -> float:
    """Return the size of DeepSpeed's bucket for gradients before it reduces them."""
    return min(REDUCE_BUCKET, parameters) * precision.gradients


def device_memory(
    shape: Shape,
    layout: Layout,
    precision: Precision,
    sequence_length: int,
    micro_batches: int = 1,
    attention: str = "flash",
    reserved: bool = True,
    device: Device | None = None,
) -> Memory:
    """Return the memory of a layout's fullest device.

    Args:
        sequence_length: tokens per row.
        micro_batches: passes of a replica per step; with more than one, gradients are kept between them.
        attention: `"flash"` or `"eager"`, see `layer_activations`.
        reserved: whether `peak` counts the bucket of ZeRO-1 and 2 from the beginning, as an accelerator's memory does.
            A CPU's memory is used only once written, and the bucket fills while activations are freed.
        device: whose `runtime`, `group_buffer` and `fragments` are added; `None` counts tensors alone.

    Raises:
        InputError: for another `attention`.
    """
    if attention not in ATTENTION:
        raise InputError(f"attention={attention!r} is not one of {', '.join(ATTENTION)}")
    options = shape, layout, precision, sequence_length, micro_batches, attention, reserved
    tensors = max((_stage_memory(stage, *options) for stage in _stages(shape, layout, micro_batches)), key=_peak)
    return tensors if device is None else _on_device(tensors, layout, device)


def _on_device(tensors: Memory, layout: Layout, device: Device) -> Memory:
    """Return the memory with what a process on `device` takes beside its tensors."""
    beside = device.runtime + layout.groups * device.group_buffer
    free = device.usable * device.memory - tensors.peak - beside
    usual, least = (tensors.peak * share / (1 - share) for share in (device.fragments, device.least_fragments))
    fragments = max(least, min(usual, free))
    peak = tensors.peak + beside + fragments
    return replace(tensors, buffers=tensors.buffers + beside, fragments=fragments, peak=peak)


def _peak(memory: Memory) -> float:
    return memory.peak


def _stage_memory(
    stage: _Stage,
    shape: Shape,
    layout: Layout,
    precision: Precision,
    sequence_length: int,
    micro_batches: int,
    attention: str,
    reserved: bool,
) -> Memory:
    experts, dense = _stage_parameters(shape, layout, stage)
    shares = [
        zero_state_bytes(dense, layout.shards, layout.zero_stage, precision),
        zero_state_bytes(experts, layout.shards // layout.expert, layout.zero_stage, precision),
    ]
    weights, gradients, optimizer = (sum(share[part] for share in shares) for part in shares[0])
    tokens = layout.micro_batch * sequence_length / layout.context
    kept, at_work = _activation_bytes(stage, shape, layout, precision, sequence_length, attention)
    logits = loss_bytes(shape, layout, precision, tokens) if stage.is_last else 0.0
    buffers = _buffers(shape, layout, precision, dense + experts)
    fills = not reserved and layout.engine == DEEPSPEED and layout.zero_stage < 3
    bucket = _bucket(precision, dense + experts) if fills else 0.0
    static = weights + optimizer + buffers - bucket
    # Megatron-LM and ZeRO-3 hold gradients in flat buffers, the others free them after each step.
    if layout.engine == DEEPSPEED and layout.zero_stage == 3:
        # Its reduction copies the bucket, which is full when all activations are freed.
        peak = static + gradients + max(kept + max(logits, at_work), _bucket(precision, dense + experts))
    elif micro_batches > 1 or layout.engine == MEGATRON:
        peak = static + gradients + kept + max(logits, at_work)
    else:
        # Gradients come from the last layer to the first, and the embeddings' at the very end.
        table = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        table, layer = (precision.gradients * count / layout.tensor for count in (table, _layer_size(shape)))
        begin = max(kept + logits, kept + at_work + table + min(bucket, table))
        # ZeRO-2 joins its share of the gradients into one tensor for the optimizer while the bucket is still there.
        end = (2 if layout.engine == DEEPSPEED and layout.zero_stage == 2 else 1) * gradients + bucket
        peak = static + max(begin, gradients - table - layer + at_work + bucket, end)
    return Memory(weights, gradients, optimizer, kept + at_work, logits, buffers, 0.0, peak)


def _activation_bytes(
    stage: _Stage, shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str
) -> tuple[float, float]:
    """Return the bytes kept by all micro-batches in progress, plus those of one layer's backward pass."""
    tokens, hidden = layout.micro_batch * sequence_length / layout.context, shape.hidden_size
    kept = tokens * stage.layers * layer_activations(shape, layout, precision, sequence_length, attention)
    if stage.is_last:
        kept += tokens * (norm_bytes(shape, hidden, precision.residual) + precision.compute * hidden)
    if precision.is_autocast and layout.recompute != "full":
        kept += (stage.layers * autocast_weights(shape) + 2 * shape.vocab_size * hidden) / layout.tensor
    if stage.is_first and shape.tower is not None:
        pictures = layout.micro_batch * shape.images_per_row
        kept += pictures * shape.tower.activation_bytes_per_picture(precision.compute, layout.recompute == "full")
    if layout.pipeline > 1 and not stage.is_last:
        # What a stage has sent on stays until its backward pass.
        share = layout.tensor if layout.sequence_parallel else 1
        kept += tokens * precision.residual * hidden / share
    at_work = tokens * layer_workspace(shape, layout, precision, sequence_length, attention)
    if layout.recompute != "none":
        again = replace(layout, recompute="none")
        at_work += tokens * layer_activations(shape, again, precision, sequence_length, attention)
    return kept * stage.passes, at_work


def _largest_tensor(shape: Shape) -> int:
    width = shape.expert_size * 2 * shape.num_local_experts or shape.intermediate_size
    return shape.hidden_size * max(width, shape.query_size, shape.vocab_size)


def _layer_size(shape: Shape) -> int:
    return sum(shape.layer_parameters().values())

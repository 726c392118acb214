"""Bytes for training on one device: weights, gradients, optimizer states, activations.

    device_memory(shape, Layout(data=8, zero_stage=2), PRECISIONS["bf16"], sequence_length=4096).peak

The activations themselves are counted in the first section.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hfllm.errors import check_choice
from hfllm.scaling.devices import Device
from hfllm.scaling.layouts import DDP, DEEPSPEED, FSDP2, MEGATRON, RECOMPUTE, Layout, stage_layers
from hfllm.scaling.shapes import Shape, linear_mixer_bytes

# ---- activations ----
# Bytes of activations kept by the forward pass of this family's code for the backward pass.
#
# `tests/scaling/test_memory.py` counts them with autograd's hooks. `korthikanti_activations` is the published formula
# for GPT-3's block, which keeps more: this family's attention keeps no scores, and its MLP recomputes its product.


# FlashAttention of the second generation or later (also the kernel of CPUs), of the first, and none.
ATTENTION = ("flash", "flash1", "eager")


@dataclass(frozen=True)
class Precision:
    """Bytes per value.

    Args:
        weights, gradients: per parameter.
        optimizer: Adam's states per parameter, with the fp32 copy of a 16-bit weight (K = 12 in the ZeRO paper).
        compute: inputs and outputs of matrix products.
        residual: the residual stream between layers.
        is_autocast: weights stay in fp32, and a 16-bit copy of each lives from its use until its backward pass.
        copies: of weights in fp8, as they are and transposed; per parameter.
        reduced: gradients reduced at once, from a copy in fp32.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    compute: int
    residual: int
    is_autocast: bool = False
    copies: int = 0
    reduced: int = 0

    @property
    def stored(self) -> int:
        """Return the bytes of a product's kept input: for fp8, the multiplied copy."""
        return 1 if self.copies else self.compute


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", 4, 4, 8, 4, 4),
        # Mixed precision of DeepSpeed.
        Precision("bf16", 2, 2, 12, 2, 2),
        Precision("fp16", 2, 2, 12, 2, 2),
        # Megatron-LM adds up gradients of bf16 weights in fp32, and keeps an fp32 copy of fp16 weights' gradients;
        # Megatron-DeepSpeed, of bf16 ones, keeps both, and reduces 500 million at once (MEMORY_OPT_ALLREDUCE_SIZE).
        Precision("bf16_megatron", 2, 4, 12, 2, 2),
        Precision("bf16_megatron_deepspeed", 2, 6, 12, 2, 2, reduced=500_000_000),
        Precision("fp16_megatron", 2, 2, 16, 2, 2),
        # With grad_reduce_in_fp32 off, as in NVIDIA's own measurements.
        Precision("bf16_megatron_bf16_gradients", 2, 2, 12, 2, 2),
        Precision("fp8_megatron_bf16_gradients", 2, 2, 12, 2, 2, copies=2),
        Precision("fp32_megatron", 4, 4, 8, 4, 4),
        # Products in fp8; all else as in bf16.
        Precision("fp8", 2, 2, 12, 2, 2, copies=2),
        Precision("fp8_megatron", 2, 4, 12, 2, 2, copies=2),
        Precision("fp8_autocast", 4, 4, 8, 2, 4, is_autocast=True, copies=2),
        # Mixed precision of accelerate without DeepSpeed.
        Precision("bf16_autocast", 4, 4, 8, 2, 4, is_autocast=True),
        Precision("fp16_autocast", 4, 4, 8, 2, 4, is_autocast=True),
    )
}


def korthikanti_activations(
    sequence_length: int,
    micro_batch: int,
    hidden_size: int,
    heads: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> float:
    """Return the bytes of a layer of GPT-3 in 16 bits with dropout (arXiv:2205.05198, equations 1 to 4 and 6).

    s b h (34 + 5as/h), of which tensor parallelism splits all but 10, and sequence parallelism also the rest;
    selective recomputation drops 5as/h, full recomputation leaves 2.

    Raises:
        InputError: for another `recompute`.
    """
    check_choice(f"recompute={recompute!r} is not one of", recompute, RECOMPUTE)
    inputs = sequence_length * micro_batch * hidden_size
    if recompute == "full":
        return 2 * inputs
    scores = 5 * heads * sequence_length / hidden_size if recompute == "none" else 0
    return inputs * ((10 / tensor if sequence_parallel else 10) + (24 + scores) / tensor)


def norm_bytes(shape: Shape, width: int, read: int) -> float:
    """Return the bytes kept by a norm over `width` values of `read` bytes: its input, LayerNorm statistics too."""
    return read * width + (8 if shape.norm_type == "layernorm" else 0)


def _inputs(shape: Shape, precision: Precision) -> int:
    """Return how often a layer keeps its projections' input: once per norm, but one copy each under autocast."""
    if not precision.is_autocast:
        return shape.norms_per_layer
    attention = 3 if shape.kv_lora_rank is None else 2
    # Of the MLP's gate and its other half, or of the router and the experts shared by all tokens.
    products = 2 if shape.is_gated else 1
    return attention + (1 + (products if shape.shared_size else 0) if shape.num_local_experts else products)


def autocast_weights(shape: Shape) -> float:
    """Return the bytes of the 16-bit copies of a layer's weights, without recomputed copies of the MLP."""
    layer, projections = shape.layer_parameters(), 3 if shape.is_gated else 2
    # Layers of linear attention have more than others.
    attention = shape.parameters()["attention"] / shape.num_hidden_layers
    # Grouped products of experts are not cast.
    return 2 * (attention + layer["mlp"] * (projections - 1) / projections + layer["router"])


def layer_activations(
    shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str = "flash"
) -> float:
    """Return the bytes per token and layer kept by the forward pass for the backward pass, on one device.

    With layers of linear attention, this is the mean over the layers. Their count is for a CPU; kernels on a GPU may
    keep more.

    Args:
        attention: `"flash"` keeps a number per query (also the CPU's kernel); `"eager"` keeps all scores.
    """
    size, hidden = precision.compute, shape.hidden_size
    if layout.recompute == "full":
        return precision.residual * hidden / (layout.tensor if layout.sequence_parallel else 1)
    # Two norms with the same input keep it once.
    is_same = shape.parallel_block
    # Megatron-LM's fused norms keep only their input.
    is_fused = layout.engine == MEGATRON
    norm = precision.residual * hidden + 8 if is_fused else norm_bytes(shape, hidden, precision.residual)
    whole = (1 if is_same else shape.norms_per_layer) * norm
    whole += precision.stored * hidden * _inputs(shape, precision)
    # The latents and their norms' outputs.
    whole += 2 * size * shape.latent_size
    heads = size * (shape.query_size + shape.output_size + shape.key_size + shape.value_size)
    if shape.kv_lora_rank is not None and not is_fused:
        # The rotated key has no norm, and the values keep the product containing them.
        whole -= size * shape.qk_rope_head_dim
        heads += size * shape.num_attention_heads * shape.qk_nope_head_dim
    heads += 4 * shape.num_attention_heads
    if precision.copies:
        # Attention keeps its output in 16 bits, the product after it a copy.
        heads += precision.stored * shape.output_size
    if shape.qk_norm:
        count = shape.num_attention_heads + shape.num_key_value_heads
        heads += count * (size * shape.head_dim + 8 if is_fused else norm_bytes(shape, shape.head_dim, size))
    if attention == "eager":
        # The softmax in fp32 and, in 16 bits, a copy; keys and values repeated for every query head.
        scores = (4 if size == 4 else 6) * shape.num_attention_heads * sequence_length
        heads += size * 2 * (shape.query_size - shape.key_size) - 4 * shape.num_attention_heads
        heads += scores if layout.recompute == "none" else 0
    whole = whole / (layout.tensor if layout.sequence_parallel else 1)
    mlp = _mlp_bytes(shape, layout, precision) / layout.tensor
    activations = whole + heads / layout.attention_split(shape) + mlp
    if not shape.linear_layers:
        return activations
    linear = 2 * norm + mlp + linear_mixer_bytes(shape, size, layout.micro_batch, sequence_length)
    # Six projections read the layer's input, and each has its own copy under autocast.
    linear += size * hidden * (2 if not precision.is_autocast else _inputs(shape, precision) + 3)
    return activations + (linear - activations) * shape.linear_layers / shape.num_hidden_layers


def _mlp_bytes(shape: Shape, layout: Layout, precision: Precision) -> float:
    hidden, products = shape.hidden_size, 2 if shape.is_gated else 1
    # The dense MLP recomputes its inner activation, except with weights gathered by ZeRO-3 of DeepSpeed, or by FSDP
    # without tensor parallelism. Megatron-LM's keeps it. The experts shared by all tokens are one.
    is_gathered = layout.zero_stage == 3 and (layout.engine == DEEPSPEED or (layout.fsdp and layout.tensor == 1))
    num_activations = 2 * products if is_gathered else products + (layout.engine == MEGATRON)
    # The last product's input.
    saved = precision.compute - precision.stored
    if shape.num_local_experts:
        # Grouped products stay in fp32 under autocast. The tokens of each expert are copies.
        size = 4 if precision.is_autocast else precision.compute
        rows = shape.num_experts_per_tok * (size * (2 * hidden + 4 * shape.expert_size) + 28)
        rows -= shape.num_experts_per_tok * saved * (hidden + shape.expert_size)
        shared = shape.shared_size * (precision.compute * num_activations - saved)
        return rows + shared + 3 * precision.residual * shape.num_local_experts
    return shape.intermediate_size * (precision.compute * num_activations - saved)


def layer_workspace(
    shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str = "flash"
) -> float:
    """Return the bytes per token of the backward pass of one layer in addition to the kept ones.

    The MLP's recomputed activation and product, and their gradients; in a mixture, the same of the token's experts.
    With eager attention, if more, the gradients of the scores before and after the softmax. Where rows are split, the
    whole input of a product and its gradient.
    """
    width = shape.intermediate_size
    if shape.num_local_experts:
        width = shape.expert_size * shape.num_experts_per_tok + shape.shared_size
    inner = (4 if shape.is_gated else 2) * width / layout.tensor
    scores = 2 * shape.num_attention_heads * sequence_length / layout.attention_split(shape)
    largest = max(inner, scores) if attention == "eager" else inner
    rows = 2 * precision.compute * shape.hidden_size if layout.sequence_parallel else 0
    return precision.compute * largest + precision.residual * shape.hidden_size + rows


def loss_bytes(shape: Shape, layout: Layout, precision: Precision, tokens: int) -> float:
    """Return the peak bytes of the loss over `tokens`: log-probabilities and two gradients in fp32, 12 V per token.

    Logits of 16 bits, which stay as long as the model's output is referenced, are 2 V more. With
    `shape.loss_chunk_size` only that many rows exist, plus the fp32 gradients of the head and the hidden states. The
    loss of split logits in torch.distributed.tensor makes one more gradient. Where rows are split, the head reads all.
    A fused loss has logits and gradient in their own precision, whatever the chunks.
    """
    split = layout.tensor if layout.splits_logits else 1
    if layout.fused_loss:
        rows = precision.compute * shape.hidden_size if layout.sequence_parallel else 0
        return tokens * (2 * precision.compute * shape.vocab_size / split + rows)
    if not shape.loss_chunk_size:
        entry = (16 if layout.split_rows else 12) + (2 if precision.compute == 2 else 0)
        rows = precision.compute * shape.hidden_size if layout.sequence_parallel else 0
        return tokens * (entry * shape.vocab_size / split + rows)
    rows = min(shape.loss_chunk_size, tokens)
    head = 4 * shape.vocab_size * shape.hidden_size
    return (12 * shape.vocab_size * rows + head) / split + precision.compute * shape.hidden_size * tokens


# ---- memory ----


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
        buffers: for communication, for weights gathered by ZeRO-3, and of the process itself.
        fragments: reserved by the device's allocator beyond the allocated bytes, fewer where the device is full.
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
    """One device's part of a pipeline: its layers, its ends, and the number of its micro-batches in progress."""

    layers: int
    is_first: bool
    is_last: bool
    passes: float


def _stages(shape: Shape, layout: Layout, micro_batches: int) -> Iterator[_Stage]:
    """Yield the candidates for the fullest stage.

    They are the first, with the most micro-batches, the second, possibly with a layer more than it, and the last, with
    the logits.
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
    """Return the parameters on one device before sharding over `data`: the experts', and all others."""
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
        # The vision tower is on every device of the first stage.
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
        device: its `runtime`, `group_buffer` and `fragments` are added; `None` counts only tensors.

    Raises:
        InputError: for another `attention`.
    """
    check_choice(f"attention={attention!r} is not one of", attention, ATTENTION)
    options = shape, layout, precision, sequence_length, micro_batches, attention, reserved
    tensors = max((_stage_memory(stage, *options) for stage in _stages(shape, layout, micro_batches)), key=_peak)
    return tensors if device is None else _on_device(tensors, layout, device)


def _on_device(tensors: Memory, layout: Layout, device: Device) -> Memory:
    """Return the memory with a process's own use on `device` in addition to its tensors."""
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
    activations, at_work = _activation_bytes(stage, shape, layout, precision, sequence_length, attention)
    logits = loss_bytes(shape, layout, precision, tokens) if stage.is_last else 0.0
    buffers = _buffers(shape, layout, precision, dense + experts)
    fills = not reserved and layout.engine == DEEPSPEED and layout.zero_stage < 3
    bucket = _bucket(precision, dense + experts) if fills else 0.0
    static = weights + optimizer + buffers - bucket
    # Megatron-LM and ZeRO-3 hold gradients in flat buffers, the others free them after each step.
    if layout.engine == DEEPSPEED and layout.zero_stage == 3:
        # Its reduction copies the bucket, full when all activations are freed.
        peak = static + gradients + max(activations + max(logits, at_work), _bucket(precision, dense + experts))
    elif micro_batches > 1 or layout.engine == MEGATRON:
        peak = static + gradients + activations + max(logits, at_work)
    else:
        # Gradients come from the last layer to the first, and the embeddings' at the very end.
        table = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        table, layer = (precision.gradients * count / layout.tensor for count in (table, _layer_size(shape)))
        begin = max(activations + logits, activations + at_work + table + min(bucket, table))
        # ZeRO-2 joins its share of the gradients into one tensor for the optimizer while the bucket is still there.
        end = (2 if layout.engine == DEEPSPEED and layout.zero_stage == 2 else 1) * gradients + bucket
        peak = static + max(begin, gradients - table - layer + at_work + bucket, end)
    return Memory(weights, gradients, optimizer, activations + at_work, logits, buffers, 0.0, peak)


def _activation_bytes(
    stage: _Stage, shape: Shape, layout: Layout, precision: Precision, sequence_length: int, attention: str
) -> tuple[float, float]:
    """Return the bytes kept by all micro-batches in progress, plus the bytes of one layer's backward pass."""
    tokens, hidden = layout.micro_batch * sequence_length / layout.context, shape.hidden_size
    activations = tokens * stage.layers * layer_activations(shape, layout, precision, sequence_length, attention)
    if stage.is_last:
        activations += tokens * (norm_bytes(shape, hidden, precision.residual) + precision.compute * hidden)
    if precision.is_autocast and layout.recompute != "full":
        activations += (stage.layers * autocast_weights(shape) + 2 * shape.vocab_size * hidden) / layout.tensor
    if stage.is_first and shape.tower is not None:
        pictures = layout.micro_batch * shape.images_per_row
        activations += pictures * shape.tower.activation_bytes_per_picture(
            precision.compute, layout.recompute == "full"
        )
    if layout.pipeline > 1 and not stage.is_last:
        # A stage's sent output stays until its backward pass.
        share = layout.tensor if layout.sequence_parallel else 1
        activations += tokens * precision.residual * hidden / share
    at_work = tokens * layer_workspace(shape, layout, precision, sequence_length, attention)
    if layout.recompute != "none":
        again = replace(layout, recompute="none")
        at_work += tokens * layer_activations(shape, again, precision, sequence_length, attention)
    return activations * stage.passes, at_work


def _largest_tensor(shape: Shape) -> int:
    width = shape.expert_size * 2 * shape.num_local_experts or shape.intermediate_size
    return shape.hidden_size * max(width, shape.query_size, shape.vocab_size)


def _layer_size(shape: Shape) -> int:
    return sum(shape.layer_parameters().values())

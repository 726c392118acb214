"""Layouts of a model over devices: degrees of parallelism, their engine, and training stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from hfllm.errors import InputError
from hfllm.scaling.shapes import Shape

# ---- layouts ----


RECOMPUTE = ("none", "selective", "full")
# Engines of a layout; accelerate launches all of them. The recipes run the first three directly, the next two need a
# model loaded for tensor parallelism, and Megatron-LM has its own models.
SINGLE, DDP, DEEPSPEED, FSDP2, TENSOR, MEGATRON = "single", "ddp", "deepspeed", "fsdp2", "tensor", "megatron"
RECIPES = (SINGLE, DDP, DEEPSPEED)


@dataclass(frozen=True)
class Layout:
    """One way to train: `data * context * tensor * pipeline` devices.

    Args:
        data: replicas of the model, or of its pipeline (ZeRO shards over these).
        tensor: devices for splitting every matrix (Shoeybi et al. 2019, arXiv:1909.08053).
        pipeline: stages of layers (Narayanan et al. 2021, arXiv:2104.04473).
        expert: devices, out of the `data` ones, for spreading experts.
        zero_stage: sharding over `data`: 1 optimizer states, 2 also gradients, 3 also weights (Rajbhandari et
            al. 2019, arXiv:1910.02054); 0 nothing.
        recompute: activations recomputed in the backward pass: `"none"`, `"selective"` (attention
            scores; Korthikanti et al. 2022, arXiv:2205.05198) or `"full"` (all but each layer's input).
        micro_batch: sequences passed through the model at once by a device.
        interleave: chunks of layers per stage.
        context: devices for splitting every sequence (Ring Attention, arXiv:2310.01889).
        whole_rows: whether tensor parallelism keeps unsplit activations whole, as Megatron-LM did before sequence
            parallelism (arXiv:2205.05198).
        split_rows: whether FSDP2 with tensor parallelism splits rows, tables and logits as Megatron-LM does, as in
            torchtitan (arXiv:2410.06511), not in transformers.
        fsdp: whether torch's FSDP shards by ZeRO-3, in place of DeepSpeed; over `context` too.
        fused_loss: whether a kernel computes the loss from the logits and writes their gradient at once, in their
            precision, as FlashAttention's, Liger's and Transformer Engine's do.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    zero_stage: int = 0
    recompute: str = "none"
    micro_batch: int = 1
    interleave: int = 1
    context: int = 1
    whole_rows: bool = False
    split_rows: bool = False
    fsdp: bool = False
    fused_loss: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def shards(self) -> int:
        """Return the devices with the same weights, for sharding by ZeRO."""
        return self.data * self.context

    @cached_property
    def engine(self) -> str:
        """Return its engine: `single`, `ddp`, `deepspeed`, `fsdp2`, `tensor` or `megatron`."""
        if self.pipeline > 1 or self.expert > 1 or self.recompute == "selective":
            return MEGATRON
        if self.fsdp and self.zero_stage == 3:
            return FSDP2
        if self.context > 1:
            return MEGATRON
        if self.tensor > 1:
            # accelerate composes tensor parallelism with sharding, but not with replicas.
            return FSDP2 if self.data > 1 and self.zero_stage == 3 else TENSOR if self.data == 1 else MEGATRON
        if self.data == 1:
            return SINGLE
        return DEEPSPEED if self.zero_stage else DDP

    @property
    def groups(self) -> int:
        """Return the groups of communication of one device, each with its own buffers.

        All devices, and for each way to split the model the devices with the same part. A pipeline of Megatron-LM has
        two more: its two tables, and all devices of a replica, for the norm of the gradients.
        """
        if self.devices == 1:
            return 0
        degrees = (self.shards, self.context, self.tensor, self.pipeline, self.expert)
        split = 0 if self.engine in (DDP, DEEPSPEED) else sum(degree > 1 for degree in degrees)
        return 1 + split + (2 if self.pipeline > 1 else 0)

    @property
    def sequence_parallel(self) -> bool:
        """Return whether the activations left whole by tensor parallelism are split along the sequence."""
        return self.splits_logits and self.tensor > 1 and not self.whole_rows

    @property
    def splits_logits(self) -> bool:
        """Return whether tensor parallelism splits the tables and the scores of the vocabulary."""
        return self.engine == MEGATRON or self.split_rows

    def micro_batches(self, global_batch_size: int) -> int:
        """Return the passes per replica and step."""
        return global_batch_size // (self.data * self.micro_batch)

    def attention_split(self, shape: Shape) -> int:
        """Return the number of devices for splitting attention.

        It is 1 with a single key-value head, and for latent attention; only Megatron-LM splits its heads.
        """
        is_whole = shape.num_key_value_heads == 1 or (shape.kv_lora_rank is not None and self.engine != MEGATRON)
        return 1 if is_whole else self.tensor

    def check(self, shape: Shape, devices: int, global_batch_size: int) -> None:
        """Refuse an impossible layout."""
        for problem in self.problems(shape, devices, global_batch_size):
            raise InputError(problem)

    def problems(self, shape: Shape, devices: int, global_batch_size: int) -> Iterator[str]:
        """Yield the reasons why the layout cannot run, one sentence per reason."""
        if self.devices != devices:
            multiple = self.tensor * self.pipeline * self.context
            yield f"{self._degrees()} need a multiple of {multiple} devices, --num_devices is {devices}"
        yield from self._indivisible(shape, devices, global_batch_size)
        for name, degree in (("--tensor_parallel", self.tensor), ("--context_parallel", self.context)):
            if shape.linear_layers and degree > 1:
                yield f"{name} {degree} splits no layers of linear_attention, which layer_types names"
        yield from self._too_many_stages(shape)
        if self.engine == MEGATRON and self.zero_stage > 1:
            yield (
                f"--zero_stage {self.zero_stage} cannot be combined with {self._degrees()}, "
                f"--expert_parallel {self.expert} and --recompute {self.recompute}: "
                "Megatron-LM, which runs that, shards the optimizer only"
            )
        if self.zero_stage and self.shards == 1:
            yield f"--zero_stage {self.zero_stage} has nothing to shard over: there is one replica"

    def _degrees(self) -> str:
        context = f", --context_parallel {self.context}" if self.context > 1 else ""
        return f"--tensor_parallel {self.tensor} and --pipeline_parallel {self.pipeline}{context}"

    def _too_many_stages(self, shape: Shape) -> Iterator[str]:
        layers = shape.num_hidden_layers
        if self.pipeline > layers:
            yield f"--pipeline_parallel {self.pipeline} is more than num_hidden_layers={layers}"
        elif self.pipeline * self.interleave > layers + 2:
            yield (
                f"--pipeline_parallel {self.pipeline} times --interleave {self.interleave} is more than "
                f"num_hidden_layers={layers} and the two tables"
            )

    def _indivisible(self, shape: Shape, devices: int, global_batch_size: int) -> Iterator[str]:
        divided = [
            ("--tensor_parallel", self.tensor, "num_attention_heads", shape.num_attention_heads),
            ("--tensor_parallel", self.tensor, "intermediate_size", shape.expert_size),
            ("--expert_parallel", self.expert, "num_local_experts", shape.num_local_experts),
        ]
        if shape.num_key_value_heads > 1:
            divided.insert(1, ("--tensor_parallel", self.tensor, "num_key_value_heads", shape.num_key_value_heads))
        for name, degree, of, size in divided:
            if size % degree:
                yield f"{name} {degree} does not divide {of}={size}"
        if self.expert > 1 and not shape.num_local_experts:
            yield f"--expert_parallel {self.expert}: the model has no experts"
        if self.shards % self.expert:
            yield f"--expert_parallel {self.expert} does not divide the {self.shards} replicas of {self._degrees()}"
        if global_batch_size % (self.data * self.micro_batch):
            yield (
                f"--global_batch_size {global_batch_size} is no multiple of --micro_batch_size {self.micro_batch} "
                f"times {self.data} replicas (--num_devices {devices}, {self._degrees()})"
            )
        elif self.interleave > 1 and (self.pipeline == 1 or self.micro_batches(global_batch_size) % self.pipeline):
            yield (
                f"--interleave {self.interleave} needs a pipeline, and micro-batches that are a multiple of its stages"
            )

    def __str__(self) -> str:
        degrees = {"data": self.data, "context": self.context, "tensor": self.tensor}
        degrees |= {"pipeline": self.pipeline, "expert": self.expert}
        parts = [f"{name} {size}" for name, size in degrees.items() if size > 1]
        parts += [f"ZeRO-{self.zero_stage}"] if self.zero_stage else []
        return ", ".join(parts) or "one device"


# ---- stages ----
#
# How a pipeline's stages share the layers, also when their number does not divide them.


@cache
def stage_layers(layers: int, pipeline: int, interleave: int = 1) -> tuple[int, ...]:
    """Return the layers of each stage, first to last.

    Where `pipeline * interleave` chunks cannot have equally many layers, the last one has a layer less, then the
    first, then others from the end: the last stage also has the head, the first the embeddings. BLOOM
    (arXiv:2211.05100) puts 70 layers on 12 stages in this way, Llama 3 (arXiv:2407.21783, section 3.3.2) 126 on 16.
    """
    chunks = pipeline * interleave
    most = -(-layers // chunks)
    short = chunks * most - layers
    order = [chunks - 1, 0, *range(chunks - 2, 0, -1)][:short]
    layer_counts = [interleave * most] * pipeline
    for chunk in order:
        layer_counts[chunk % pipeline] -= 1
    return tuple(layer_counts)


def is_balanced(layers: int, pipeline: int, interleave: int = 1) -> bool:
    """Return whether all stages have equally many layers, or only the two ends have one less."""
    chunks = pipeline * interleave
    return chunks * -(-layers // chunks) - layers <= min(2, chunks - 1)

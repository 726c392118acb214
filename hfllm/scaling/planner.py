"""Find the layouts of a model over devices that fit, ranked by training time.

    request = Request(shape, find_device("h100"), num_devices=64, max_length=4096, global_batch_size=1024)
    best, *others = plan(request)
    best.layout, best.memory, best.days

Memory is computed in memory.py, time in speed.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from hfllm.errors import InputError
from hfllm.scaling.activations import ATTENTION, PRECISIONS, Precision
from hfllm.scaling.devices import Device
from hfllm.scaling.flops import SECONDS_PER_DAY, pipeline_bubble
from hfllm.scaling.layouts import DDP, DEEPSPEED, MEGATRON, RECIPES, RECOMPUTE, SINGLE, TENSOR, Layout
from hfllm.scaling.memory import Memory, device_memory
from hfllm.scaling.shapes import LARGEST, Shape
from hfllm.scaling.speed import EFFICIENCY, Speed, estimate

# The default of `hfllm pretrain`, which DeepSpeed's ZeRO-3 does not support.
LOSS_CHUNK_SIZE = 1024
# A smaller share is a typing error, and would give infinite numbers.
LEAST_SHARE = 1e-6
MOST_TOKENS = 1e20
# The rest is for the driver's context, communication libraries and fragments.
USABLE = 0.9


@dataclass
class Request:
    """A question to the planner. Degrees that are `None` are searched; the others are fixed.

    Args:
        shape: of the model. Its `loss_chunk_size` applies to engines that support it (see `loss_chunk_size`).
        device: one of `num_devices` equal devices.
        max_length: tokens per row.
        global_batch_size: sequences per step, over all devices.
        tokens: to train on; `None` is 20 per parameter (Hoffmann et al. 2022, arXiv:2203.15556, approaches 1 and 2).
        precision: `"bf16"`, `"fp16"` or `"fp32"`; how weights are stored in the first two depends on the engine.
        attention: `"flash"` or `"eager"`.
        efficiency: share of its peak that a device reaches in matrix products.
        mfu: measured share of the peak, including bubble and communication; replaces the estimate in
            the days.
        usable: share of a device's memory to use.

    Raises:
        InputError: naming the flag of `hfllm plan`, for a number that is not finite or out of range, or a name that is
            not known.
    """

    shape: Shape
    device: Device
    num_devices: int = 8
    max_length: int = 2048
    global_batch_size: int = 256
    tokens: float | None = None
    precision: str = "bf16"
    attention: str = "flash"
    efficiency: float = EFFICIENCY
    mfu: float | None = None
    usable: float = USABLE
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    expert_parallel: int | None = None
    zero_stage: int | None = None
    recompute: str | None = None
    micro_batch_size: int | None = None
    interleave: int | None = None

    def __post_init__(self) -> None:
        sizes = ("num_devices", "max_length", "global_batch_size", "micro_batch_size", "interleave")
        for name in (*sizes, "tensor_parallel", "pipeline_parallel", "expert_parallel"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise InputError(f"--{name} {value} must be at least 1, and at most {LARGEST:,}")
        for name, flag in {"efficiency": "efficiency", "mfu": "mfu", "usable": "usable_memory"}.items():
            value = getattr(self, name)
            if value is not None and not LEAST_SHARE <= value <= 1:
                raise InputError(f"--{flag} {value} must lie between {LEAST_SHARE} and 1")
        if self.tokens is None:
            self.tokens = 20.0 * self.shape.num_parameters()
        elif not 1 <= self.tokens <= MOST_TOKENS:
            raise InputError(f"--tokens {self.tokens} must be at least 1, and at most {MOST_TOKENS:g}")
        choices = {"precision": ("bf16", "fp16", "fp32"), "attention": ATTENTION, "recompute": (None, *RECOMPUTE)}
        for name, allowed in {**choices, "zero_stage": (None, 0, 1, 2, 3)}.items():
            if getattr(self, name) not in allowed:
                accepted = ", ".join(str(value) for value in allowed if value is not None)
                raise InputError(f"--{name} {getattr(self, name)} is not one of {accepted}")
        if self.recompute == "selective" and self.attention != "eager":
            raise InputError(f"--recompute selective drops scores, which --attention {self.attention} never keeps")
        learned = self.shape.position_embedding_type == "learned"
        if learned and self.max_length > self.shape.max_position_embeddings:
            positions = self.shape.max_position_embeddings
            raise InputError(f"--max_length {self.max_length} is more than the {positions} learned positions")
        self._shapes = {size: replace(self.shape, loss_chunk_size=size) for size in {0, self._chunk(LOSS_CHUNK_SIZE)}}
        self.device.peak(self.precision)

    @property
    def usable_bytes(self) -> float:
        return self.usable * self.device.memory

    def _chunk(self, default: int) -> int:
        return default if self.shape.loss_chunk_size is None else self.shape.loss_chunk_size

    def loss_chunk_size(self, layout: Layout) -> int:
        """Return the tokens per chunk of logits: the shape's, if a layout's engine supports it; 0 means all at once.

        Without the shape's it is the default of `hfllm pretrain`, for layouts that the recipes run.
        """
        if layout.engine == MEGATRON or (layout.engine == DEEPSPEED and layout.zero_stage == 3):
            return 0
        return self._chunk(LOSS_CHUNK_SIZE if layout.engine in RECIPES else 0)

    def shape_of(self, layout: Layout) -> Shape:
        """Return the model's shape with the `loss_chunk_size` of a layout."""
        return self._shapes[self.loss_chunk_size(layout)]

    def dtype(self, layout: Layout) -> Precision:
        """Return the precision of a layout's engine: 16-bit weights with fp32 copies, or autocast of fp32 ones."""
        is_autocast = layout.engine in (SINGLE, DDP, TENSOR) and self.precision != "fp32"
        return PRECISIONS[f"{self.precision}_autocast" if is_autocast else self.precision]


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time.

    Args:
        micro_batches: passes of each replica per step.
        bubble: idle time of the pipeline over useful time.
        mfu: estimated, or as given in the request.
        days: days to train on all tokens.
    """

    layout: Layout
    memory: Memory
    speed: Speed
    micro_batches: int
    bubble: float
    mfu: float
    days: float


def plan(request: Request) -> list[Plan]:
    """Return the layouts that fit, fastest first; one per way to spread the model, with its best settings.

    Raises:
        InputError: when a fixed degree does not divide what it must, or nothing fits; the message names the
            closest layout.
    """
    found: dict[tuple, Plan] = {}
    problem, smallest = None, None
    for group in _groups(request):
        if isinstance(group, str):
            problem = problem or group
            continue
        layout, sizes = group
        before, is_full = math.inf, False
        for size in sizes:
            # Memory grows with the micro-batch, but gradients do not wait for a second one if there is none.
            if is_full and size != sizes[-1]:
                continue
            layout = replace(layout, micro_batch=size)
            memory = _memory(request, layout)
            if smallest is None or memory.peak < smallest[0].peak:
                smallest = memory, layout
            is_full = memory.peak > request.usable_bytes
            if is_full:
                continue
            one = _cost(request, layout, memory)
            spread = (layout.data, layout.tensor, layout.pipeline, layout.expert, layout.zero_stage)
            if spread not in found or _order(one) < _order(found[spread]):
                found[spread] = one
            # Each part of the time is convex in the micro-batch: once it rises, it does not fall again.
            if one.speed.seconds > before * (1 - 1e-9):
                break
            before = one.speed.seconds
    if found:
        return sorted(found.values(), key=_order)
    if smallest is None:
        raise InputError(problem or "no layout is possible")
    memory, layout = smallest
    raise InputError(
        f"the model fits nowhere: of {size_text(request.usable_bytes)} usable on each of {request.num_devices} "
        f"{request.device.name}, the smallest layout ({layout}, recompute {layout.recompute}, micro-batch "
        f"{layout.micro_batch}) needs {size_text(memory.peak)}: use more or larger devices, a shorter --max_length, "
        "or offload (hfllm pretrain --config_file zero3_offload_cpu)"
    )


def size_text(size: float) -> str:
    """Return bytes in a readable unit, such as 1.84 TiB."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(size, 1)) // 10), len(units) - 1)
    return f"{size / 2 ** (10 * power):,.{1 if power and size < 100 * 2 ** (10 * power) else 0}f} {units[power]}"


def choose(plans: list[Plan]) -> Plan:
    """Return the fastest layout that the recipes can run, or the fastest of all if there is none."""
    return next((one for one in plans if one.layout.engine in RECIPES), plans[0])


def _order(one: Plan) -> tuple:
    # Among equally fast ones choose the simplest, with the smallest degrees.
    layout = one.layout
    return (round(one.speed.seconds, 9), layout.zero_stage, layout.tensor * layout.pipeline, one.memory.peak)


def _memory(request: Request, layout: Layout) -> Memory:
    passes = layout.micro_batches(request.global_batch_size)
    shape = request.shape_of(layout)
    return device_memory(shape, layout, request.dtype(layout), request.max_length, passes, request.attention)


def _cost(request: Request, layout: Layout, memory: Memory) -> Plan:
    speed = estimate(
        *(request.shape, layout, request.dtype(layout), request.device, request.max_length),
        *(request.global_batch_size, request.attention, request.efficiency),
    )
    passes = layout.micro_batches(request.global_batch_size)
    mfu = request.mfu or speed.mfu
    # Time is inverse to MFU.
    days = request.tokens / speed.tokens_per_second * speed.mfu / mfu / SECONDS_PER_DAY
    bubble = pipeline_bubble(layout.pipeline, passes, layout.interleave)
    return Plan(layout, memory, speed, passes, bubble, mfu, days)


def _groups(request: Request) -> Iterator[tuple[Layout, list[int]] | str]:
    """Yield layouts that can run, each with its possible micro-batches, smallest first.

    For each other combination of fixed and possible degrees, yield a sentence with the problem.
    """
    shape, devices = request.shape, request.num_devices
    tensors = _held(request.tensor_parallel) or _powers(request.device.per_node)
    pipelines = _held(request.pipeline_parallel) or _divisors(shape.num_hidden_layers)
    experts = _held(request.expert_parallel) or _divisors(max(1, shape.num_local_experts))
    for tensor, pipeline, expert in product(tensors, pipelines, experts):
        data = max(1, devices // (tensor * pipeline))
        for zero_stage in _held(request.zero_stage) or _zero_stages(data, tensor, pipeline, expert):
            spread = Layout(data, tensor, pipeline, expert, zero_stage)
            problem = next(spread.problems(shape, devices, request.global_batch_size), None)
            if problem is None:
                yield from _settings(request, spread)
            else:
                yield problem


def _settings(request: Request, spread: Layout) -> Iterator[tuple[Layout, list[int]] | str]:
    """Yield a way to spread the model, with each way to recompute and to interleave."""
    recomputes = ["none", "selective", "full"] if request.attention == "eager" else ["none", "full"]
    recomputes = _held(request.recompute) or recomputes
    interleaves = _held(request.interleave) or ([1, 2, 4] if spread.pipeline > 1 else [1])
    rows = request.global_batch_size // spread.data
    micro_batches = _divisors(rows)
    for recompute, interleave in product(recomputes, interleaves):
        layout = replace(spread, recompute=recompute, interleave=interleave)
        # Those with whole rounds of the pipeline's stages, as interleaving needs.
        sizes = [size for size in micro_batches if interleave == 1 or rows // size % spread.pipeline == 0]
        sizes = _held(request.micro_batch_size) or sizes or [1]
        layout = replace(layout, micro_batch=sizes[0])
        problem = next(layout.problems(request.shape, request.num_devices, request.global_batch_size), None)
        yield (layout, sizes) if problem is None else problem


def _held(value: object) -> list | None:
    return None if value is None else [value]


def _zero_stages(data: int, tensor: int, pipeline: int, expert: int) -> list[int]:
    if data == 1:
        return [0]
    # The choices of Megatron-LM, where sharding costs nothing, and of FSDP2 with tensor parallelism.
    if pipeline > 1 or expert > 1:
        return [1]
    return [1, 3] if tensor > 1 else [0, 1, 2, 3]


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length())]


@lru_cache
def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})

"""Find the fitting layouts of a model over devices, ranked by training time, and put them into words.

    request = Request(shape, find_device("h100"), num_devices=64, max_length=4096, global_batch_size=1024)
    best, *others = plan(request)
    best.layout, best.memory, best.days

Memory is computed in memory.py, time in speed.py.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from hfllm.errors import InputError, refuse_if
from hfllm.scaling.devices import GIB, Device
from hfllm.scaling.layouts import DDP, DEEPSPEED, MEGATRON, RECIPES, RECOMPUTE, SINGLE, TENSOR, Layout, is_balanced
from hfllm.scaling.memory import ATTENTION, PRECISIONS, Memory, Precision, device_memory
from hfllm.scaling.shapes import LARGEST, Shape
from hfllm.scaling.speed import SECONDS_PER_DAY, Speed, estimate, pipeline_bubble

# ---- plans ----


# The default of `hfllm pretrain`, not supported by DeepSpeed's ZeRO-3.
LOSS_CHUNK_SIZE = 1024
# A smaller share is a typing error, and would give infinite numbers.
LEAST_SHARE = 1e-6
MOST_TOKENS = 1e20
# Layouts with at most this much more time than the fastest are equally good, and the simplest of them is chosen. A
# layout with less than this share of the usable memory free is not chosen where another leaves more.
AS_FAST, HEADROOM = 1.1, 0.03
# Values to search where none is given.
DEGREES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "context_parallel", "zero_stage", "recompute")
DEGREES += ("micro_batch_size", "interleave")
# Rows from this length on may be split over devices (context parallelism), with at least as many tokens per device.
LONG_ROW, LEAST_PART = 32768, 8192


@dataclass
class Request:
    """A question to the planner. Degrees of `None` are searched; the others are fixed.

    Args:
        shape: of the model. Its `loss_chunk_size` applies to engines that support it (see `loss_chunk_size`).
        device: one of `num_devices` equal devices.
        max_length: tokens per row.
        global_batch_size: sequences per step, over all devices.
        tokens: to train on; `None` is 20 per parameter (Hoffmann et al. 2022, arXiv:2203.15556, approaches 1 and 2).
        precision: `"bf16"`, `"fp16"`, `"fp8"` or `"fp32"`; how weights are stored in the first three depends on the
            engine. In fp8 are the products of the layers, but not attention.
        attention: `"flash"`, `"flash1"` (the first generation, and Triton's version of it) or `"eager"`.
        efficiency: a device's share of its peak in matrix products; `None` is the device's.
        overlap_experts: whether the exchange with experts hides behind work.
        torch_compile: whether torch.compile fuses the operations between matrix products.
        sequence_parallel: whether Megatron-LM's tensor parallelism also splits the operations between the matrices.
        fsdp: whether torch's FSDP2 shards by ZeRO-3, in place of DeepSpeed.
        fused_loss: whether one kernel computes the loss and the gradient of the logits, in 16 bits.
        mfu: measured share of the peak, including bubble and communication; replaces the estimate in
            the days.
        usable: share of a device's memory to use; `None` is the device's.
    """

    shape: Shape
    device: Device
    num_devices: int = 8
    max_length: int = 2048
    global_batch_size: int = 256
    tokens: float | None = None
    precision: str = "bf16"
    attention: str = "flash"
    efficiency: float | None = None
    mfu: float | None = None
    usable: float | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    expert_parallel: int | None = None
    zero_stage: int | None = None
    recompute: str | None = None
    micro_batch_size: int | None = None
    interleave: int | None = None
    context_parallel: int | None = None
    overlap_experts: bool = False
    torch_compile: bool = False
    sequence_parallel: bool = True
    fsdp: bool = False
    fused_loss: bool = False

    def __post_init__(self) -> None:
        sizes = ("num_devices", "max_length", "global_batch_size", "micro_batch_size", "interleave")
        for name in (*sizes, "tensor_parallel", "pipeline_parallel", "expert_parallel", "context_parallel"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise InputError(f"--{name} {value} must be at least 1, and at most {LARGEST:,}")
        for name, each in {"efficiency": "efficiency", "mfu": "mfu", "usable": "usable_memory"}.items():
            value = getattr(self, name)
            if value is not None and not LEAST_SHARE <= value <= 1:
                raise InputError(f"--{each} {value} must lie between {LEAST_SHARE} and 1")
        if self.tokens is None:
            self.tokens = 20.0 * self.shape.num_parameters()
        elif not 1 <= self.tokens <= MOST_TOKENS:
            raise InputError(f"--tokens {self.tokens} must be at least 1, and at most {MOST_TOKENS:g}")
        choices = {
            "precision": ("bf16", "fp16", "fp8", "fp32"),
            "attention": ATTENTION,
            "recompute": (None, *RECOMPUTE),
        }
        for name, allowed in {**choices, "zero_stage": (None, 0, 1, 2, 3)}.items():
            value, accepted = getattr(self, name), ", ".join(str(value) for value in allowed if value is not None)
            refuse_if(value not in allowed, f"--{name} {value} is not one of {accepted}")
        if self.recompute == "selective" and self.attention != "eager":
            raise InputError(f"--recompute selective drops scores, which --attention {self.attention} never keeps")
        length, positions = self.max_length, self.shape.max_position_embeddings
        is_longer = self.shape.position_embedding_type == "learned" and length > positions
        refuse_if(is_longer, f"--max_length {length} is more than the {positions} learned positions")
        if self.shape.tower is not None:
            count, size = self.shape.images_per_row, self.shape.tower.tokens
            images = f"--images_per_row {count}, of {size} tokens each"
            refuse_if(count * size > length, f"{images}, do not fit --max_length {length}")
        self._shapes = {size: replace(self.shape, loss_chunk_size=size) for size in {0, self._chunk(LOSS_CHUNK_SIZE)}}
        self.device.peak(self.precision)

    @property
    def usable_bytes(self) -> float:
        return (self.device.usable if self.usable is None else self.usable) * self.device.memory

    def _chunk(self, default: int) -> int:
        return default if self.shape.loss_chunk_size is None else self.shape.loss_chunk_size

    def loss_chunk_size(self, layout: Layout) -> int:
        """Return the tokens per chunk of logits: the shape's, if a layout's engine supports it; 0 means all at once.

        Without the shape's it is the default of `hfllm pretrain`, for layouts run by the recipes.
        """
        if layout.engine == MEGATRON or (layout.engine == DEEPSPEED and layout.zero_stage == 3):
            return 0
        return self._chunk(LOSS_CHUNK_SIZE if self.runs_in_recipes(layout) else 0)

    def shape_of(self, layout: Layout) -> Shape:
        """Return the model's shape with the `loss_chunk_size` of a layout."""
        return self._shapes[self.loss_chunk_size(layout)]

    def dtype(self, layout: Layout) -> Precision:
        """Return the precision of a layout's engine: 16-bit weights with fp32 copies, or autocast of fp32 ones."""
        if layout.engine == MEGATRON:
            return PRECISIONS[f"{self.precision}_megatron"]
        is_autocast = layout.engine in (SINGLE, DDP, TENSOR) and self.precision != "fp32"
        return PRECISIONS[f"{self.precision}_autocast" if is_autocast else self.precision]

    def runs_in_recipes(self, layout: Layout) -> bool:
        """Return whether the recipes train the model in a layout without changes."""
        is_plain = self.precision != "fp8" and self.shape.tower is None and not self.fused_loss
        return layout.engine in RECIPES and is_plain


@dataclass(frozen=True)
class Plan:
    """A layout with its memory and time.

    Args:
        micro_batches: passes per replica and step.
        bubble: idle time of the pipeline over useful time.
        mfu: estimated, or as given in the request.
        days: days to train on all tokens.
        headroom: free share of the usable memory.
        runs_in_recipes: whether `hfllm pretrain` trains the model in this layout.
    """

    layout: Layout
    memory: Memory
    speed: Speed
    micro_batches: int
    bubble: float
    mfu: float
    days: float
    headroom: float
    runs_in_recipes: bool


def plan(request: Request) -> list[Plan]:
    """Return the fitting layouts, fastest first; one per way to spread the model, with its best settings.

    Layouts that fit only if the allocator gives free blocks back (no usable memory is left) count if there are no
    others.

    Raises:
        InputError: when a fixed degree violates divisibility, or nothing fits; the message names the closest layout.
    """
    result: dict[tuple, Plan] = {}
    tight: dict[tuple, Plan] = {}
    # For the ways to spread the model, and, for feasible ones, for the settings within one.
    wrong: dict[bool, list[Layout]] = {False: [], True: []}
    smallest = None
    for group in _groups(request):
        layout, sizes, can_run = group
        if not can_run:
            wrong[bool(sizes)].append(layout)
            continue
        before, is_full = math.inf, False
        for size in sizes:
            # Memory grows with the micro-batch, but gradients do not wait for a second one if there is none.
            if is_full and size != sizes[-1]:
                continue
            layout = replace(layout, micro_batch=size)
            memory = _memory(request, layout)
            if smallest is None or memory.peak < smallest[0].peak:
                smallest = memory, layout
            is_full = memory.peak >= request.usable_bytes * (1 - 1e-9)
            if memory.peak > request.usable_bytes * (1 + 1e-9):
                continue
            one = _cost(request, layout, memory)
            spread = (layout.data, layout.tensor, layout.pipeline, layout.expert, layout.zero_stage, layout.context)
            best = tight if is_full else result
            if spread not in best or _order(one) < _order(best[spread]):
                best[spread] = one
            if is_full:
                continue
            # Each part of the time is convex in the micro-batch: once it rises, it does not fall again.
            if one.speed.seconds > before * (1 - 1e-9):
                break
            before = one.speed.seconds
    if result or tight:
        return sorted((result or tight).values(), key=_order)
    if smallest is None:
        raise InputError(_cause(request, wrong[True] or wrong[False]))
    memory, layout = smallest
    raise InputError(
        f"the model fits nowhere: of {size_text(request.usable_bytes)} usable on each of {request.num_devices} "
        f"{request.device.name}, the smallest layout ({layout}, recompute {layout.recompute}, micro-batch "
        f"{layout.micro_batch}) needs {size_text(memory.peak)}: use more or larger devices, a shorter --max_length, "
        "or offload (hfllm pretrain --config_file zero3_offload_cpu)"
    )


def _cause(request: Request, layouts: list[Layout]) -> str:
    """Return the problem to blame: the most frequent one among the combinations, by its subject.

    A searched degree that does not fit is no problem, since others were tried. A combination may also fail for a
    reason of its own, such as a batch not divisible by its replicas.
    """
    searched = {f"--{name}" for name in DEGREES if getattr(request, name) is None}
    about: dict[str, list[str]] = {}
    problems = [
        list(layout.problems(request.shape, request.num_devices, request.global_batch_size)) for layout in layouts
    ]
    for each in problems:
        for text in each:
            flags = re.findall(r"--\w+", re.split(r" (?:needs?|does|is|cannot|has)\b", text)[0])
            if not set(flags) <= searched:
                about.setdefault(" ".join(flags), []).append(text)
    result = max(about.values(), key=len, default=[text for each in problems for text in each])
    return result[0] if result else "no layout is possible"


def size_text(size: float) -> str:
    """Return bytes in a readable unit, such as 1.84 TiB."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(size, 1)) // 10), len(units) - 1)
    return f"{size / 2 ** (10 * power):,.{1 if power and size < 100 * 2 ** (10 * power) else 0}f} {units[power]}"


def choose(plans: list[Plan]) -> Plan:
    """Return the layout of an engineer's choice: with some memory to spare, about as fast as any, and simple.

    Simple are layouts run by the recipes, then layouts with fewer kinds of parallelism, then with fewer parts.
    """
    roomy = [one for one in plans if one.headroom >= HEADROOM] or plans
    fast = [one for one in roomy if one.days <= AS_FAST * min(each.days for each in roomy)]
    return min(fast, key=_complexity)


def _complexity(one: Plan) -> tuple:
    layout = one.layout
    kinds = sum(size > 1 for size in (layout.tensor, layout.pipeline, layout.context, layout.expert))
    parts = layout.tensor * layout.pipeline * layout.context
    return (not one.runs_in_recipes, kinds, layout.zero_stage == 3, round(one.days, 9), layout.zero_stage, parts)


def _order(one: Plan) -> tuple:
    # Among equally fast ones choose the simplest, with the smallest degrees.
    layout = one.layout
    return (round(one.speed.seconds, 9), layout.zero_stage, layout.tensor * layout.pipeline, one.memory.peak)


def _memory(request: Request, layout: Layout) -> Memory:
    passes = layout.micro_batches(request.global_batch_size)
    shape = request.shape_of(layout)
    options = request.dtype(layout), request.max_length, passes, request.attention
    # Its fragments are as many as its usable memory has room for.
    device = request.device if request.usable is None else replace(request.device, usable=request.usable)
    return device_memory(shape, layout, *options, device=device)


def _cost(request: Request, layout: Layout, memory: Memory) -> Plan:
    speed = estimate(
        *(request.shape, layout, request.dtype(layout), request.device, request.max_length),
        *(request.global_batch_size, request.attention, request.efficiency, request.overlap_experts),
        request.torch_compile,
    )
    passes = layout.micro_batches(request.global_batch_size)
    mfu = request.mfu or speed.mfu
    # Time is inverse to MFU.
    days = request.tokens / speed.tokens_per_second * speed.mfu / mfu / SECONDS_PER_DAY
    bubble = pipeline_bubble(layout.pipeline, passes, layout.interleave)
    headroom = 1 - memory.peak / request.usable_bytes
    return Plan(layout, memory, speed, passes, bubble, mfu, days, headroom, request.runs_in_recipes(layout))


def _groups(request: Request) -> Iterator[tuple[Layout, list[int], bool]]:
    """Yield layouts with their possible micro-batches, smallest first, and whether they can run.

    A layout unable to spread the model over the devices has no micro-batches.
    """
    shape, devices = request.shape, request.num_devices
    tensors = _held(request.tensor_parallel) or _powers(request.device.per_node)
    pipelines = _held(request.pipeline_parallel) or _pipelines(shape.num_hidden_layers)
    experts = _held(request.expert_parallel) or _divisors(max(1, shape.num_local_experts))
    most = request.max_length // LEAST_PART if request.max_length >= LONG_ROW else 1
    contexts = _held(request.context_parallel) or _powers(most)
    for tensor, pipeline, expert, context in product(tensors, pipelines, experts, contexts):
        data = max(1, devices // (tensor * pipeline * context))
        is_megatron = pipeline > 1 or expert > 1 or context > 1
        for zero_stage in _held(request.zero_stage) or _zero_stages(data * context, tensor, is_megatron):
            whole = not request.sequence_parallel
            software = {"whole_rows": whole, "fsdp": request.fsdp, "fused_loss": request.fused_loss}
            spread = Layout(data, tensor, pipeline, expert, zero_stage, context=context, **software)
            if not _has_engine(request, spread):
                continue
            if any(spread.problems(shape, devices, request.global_batch_size)):
                yield spread, [], False
            else:
                yield from _settings(request, spread)


def _settings(request: Request, spread: Layout) -> Iterator[tuple[Layout, list[int], bool]]:
    """Yield a way to spread the model, with all ways to recompute and to interleave."""
    recomputes = ["none", "selective", "full"] if request.attention == "eager" else ["none", "full"]
    recomputes = _held(request.recompute) or recomputes
    layers = request.shape.num_hidden_layers
    usual = [v for v in (1, 2, 4, 8) if is_balanced(layers, spread.pipeline, v)] if spread.pipeline > 1 else [1]
    interleaves = _held(request.interleave) or usual or [1]
    rows = request.global_batch_size // spread.data
    micro_batches = _divisors(rows)
    for recompute, interleave in product(recomputes, interleaves):
        layout = replace(spread, recompute=recompute, interleave=interleave)
        if not _has_engine(request, layout):
            continue
        # Micro-batches in whole rounds of the pipeline's stages, as required by interleaving.
        sizes = [size for size in micro_batches if interleave == 1 or rows // size % spread.pipeline == 0]
        sizes = _held(request.micro_batch_size) or sizes or [1]
        layout = replace(layout, micro_batch=sizes[0])
        can_run = not any(layout.problems(request.shape, request.num_devices, request.global_batch_size))
        yield layout, sizes, can_run


def _has_engine(request: Request, layout: Layout) -> bool:
    """Return whether software runs a layout on the device. Without GPUs Megatron-LM is planned only if asked for."""
    if request.device.name != "cpu" or layout.engine != MEGATRON:
        return True
    degrees = request.tensor_parallel, request.pipeline_parallel, request.expert_parallel, request.context_parallel
    return request.recompute == "selective" or any(degree is not None and degree > 1 for degree in degrees)


def _held(value: object) -> list | None:
    return None if value is None else [value]


def _pipelines(layers: int) -> list[int]:
    """Return the numbers of stages with equally many layers each, also if the tables at both ends count as a layer."""
    return sorted({*_divisors(layers), *(stages for stages in _divisors(layers + 2) if 3 <= stages <= layers)})


def _zero_stages(shards: int, tensor: int, is_megatron: bool) -> list[int]:
    if shards == 1:
        return [0]
    # The choices of Megatron-LM, where sharding costs nothing, and of FSDP2 with tensor parallelism.
    if is_megatron:
        return [1]
    return [1, 3] if tensor > 1 else [0, 1, 2, 3]


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length())]


@lru_cache
def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


# ---- advice ----
# The meaning of a plan, in sentences: why this layout, how long it takes, and how many devices would take less.


DAYS_PER_YEAR = 365.25
# The idle share of a step from which a remark is needed.
MUCH_IDLE = 0.3
# ZeRO-3 over so many devices: the only published runs (Narayanan et al. 2021, table 2) took twice to thrice the plan.
MANY_SHARDS = 512
# The plan covers steps, one after the other, by the best layout and software. Published whole runs took so many
# times as long (the median over their sources), four of five of them between these (benchmarks/whole_runs.csv).
WHOLE_RUN, WHOLE_RUN_RANGE = 1.5, (1.0, 2.0)
# Multiples of the batch to try for more devices, and the accepted number of devices beyond proportion.
LARGER_BATCHES, MOST_MORE = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), 1.25


@dataclass(frozen=True)
class Larger:
    """A larger cluster: its layout, rows per step, and its days of training."""

    layout: Layout
    global_batch_size: int
    days: float


def sentences(chosen: Plan, plans: Sequence[Plan], request: Request, target_days: float = 90.0) -> list[str]:
    """Return the explanation of the chosen plan, a sentence or two per line."""
    layout, days = chosen.layout, chosen.days
    lines = [
        f"{layout}: {duration(days)} at an MFU of {chosen.mfu:.0%}, {chosen.memory.peak / GIB:.0f} of "
        f"{request.usable_bytes / GIB:.0f} usable GiB."
    ]
    if chosen.headroom < HEADROOM:
        lines.append(f"Only {chosen.headroom:.1%} of the usable memory stay free: measure before you rely on it.")
    idle = (chosen.speed.communication + chosen.speed.bubble) / chosen.speed.seconds
    if idle > MUCH_IDLE:
        lines.append(
            f"{idle:.0%} of each step wait for other devices: fewer of them, or more than "
            f"{request.global_batch_size:,} rows per step, would be used better."
        )
    if layout.zero_stage == 3 and layout.data >= MANY_SHARDS:
        lines.append(f"Published runs of ZeRO-3 over more than {MANY_SHARDS} devices took two to three times as long.")
    if layout.engine == MEGATRON and request.device.name == "cpu":
        lines.append("Megatron-LM, which runs it, needs GPUs.")
    if not chosen.runs_in_recipes:
        lines.append(_in_recipes(chosen, plans, request))
    elif plans[0].days < days / 1.02:
        lines.append(f"The fastest layout, {plans[0].layout}, takes {duration(plans[0].days)}, and is harder to run.")
    if days > target_days:
        lines.append(_faster(chosen, request, target_days))
    if whole_run_factor(request) > 1:
        low, high = (duration(bound * days) for bound in WHOLE_RUN_RANGE)
        lines.append(
            f"Published whole runs, with restarts and slower software, took {WHOLE_RUN} times the planned time: about "
            f"{duration(WHOLE_RUN * days)}, and {low} to {high} for four of five."
        )
    return lines


def whole_run_factor(request: Request) -> float:
    """Return how many times the planned days a whole run takes: 1 with a measured MFU, and on a CPU."""
    return 1.0 if request.mfu is not None or request.device.name == "cpu" else WHOLE_RUN


def duration(days: float) -> str:
    """Return days in words, with years where there are many, as hours or seconds where there are few."""
    if days < 1:
        hours = 24 * days
        return f"{hours:.1f} hours" if hours >= 1 else f"{3600 * hours:.0f} seconds"
    text = f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days"
    return f"{text} ({days / DAYS_PER_YEAR:.1f} years)" if days > DAYS_PER_YEAR else text


def _in_recipes(chosen: Plan, plans: Sequence[Plan], request: Request) -> str:
    own = next((one for one in plans if one.runs_in_recipes), None)
    if own is None:
        return "No layout that `hfllm pretrain` runs is among those that fit: the files are for a script of your own."
    text = f"the fastest that it runs, {own.layout}, takes {duration(own.days)}"
    if own.headroom < HEADROOM:
        text += f", and leaves only {own.headroom:.1%} of the usable memory free"
    return f"`hfllm pretrain` does not run it, {_runner(chosen, request)}; {text}."


def _runner(chosen: Plan, request: Request) -> str:
    """Return the software for a layout not run by the recipes."""
    if request.precision == "fp8":
        return "nor anything in fp8"
    if chosen.layout.engine == MEGATRON:
        return "Megatron-LM does"
    return "but a script that loads its model for tensor parallelism"


def _faster(chosen: Plan, request: Request, target_days: float) -> str:
    ratio = chosen.days / target_days
    share = f"{1 / ratio:.2g} of the tokens" if ratio > 1.05 else "slightly fewer tokens"
    larger = larger_cluster(chosen, request, target_days)
    if larger is None:
        return f"For {target_days:g} days: {share}, or a smaller model; more devices alone would be too many to feed."
    rows = ""
    if larger.global_batch_size > request.global_batch_size:
        tokens = larger.global_batch_size * request.max_length
        size = f"{tokens / 1e6:,.0f}M" if tokens >= 1e6 else f"{tokens:,}"
        rows = f", with {larger.global_batch_size:,} rows per step ({size} tokens)"
    return (
        f"For {target_days:g} days: about {larger.layout.devices:,} {request.device.name} ({larger.layout}{rows}), "
        f"or {share}, or a smaller model."
    )


def larger_cluster(chosen: Plan, request: Request, target_days: float) -> Larger | None:
    """Return the smallest cluster of more replicas of the chosen layout for `target_days`.

    The batch grows where it must: replicas with few micro-batches wait for each other. `None` if no batch up to 64
    times as large helps.
    """
    least = math.ceil(chosen.layout.data * chosen.days / target_days)
    most = math.ceil(MOST_MORE * least)
    for times in LARGER_BATCHES:
        rows = math.ceil(times * request.global_batch_size)
        for data in range(least, most + 1, max(1, (most - least) // 25)):
            result = _with_replicas(chosen, request, data, rows)
            if result is not None and result.days <= target_days:
                return result
    return None


def _with_replicas(chosen: Plan, request: Request, data: int, rows: int) -> Larger | None:
    """Return so many replicas, on `rows` or the next number of rows divisible by them."""
    layout = replace(chosen.layout, data=data)
    layout = replace(layout, zero_stage=layout.zero_stage or int(layout.shards > 1 and layout.engine == MEGATRON))
    unit = data * layout.micro_batch * (layout.pipeline if layout.interleave > 1 else 1)
    batch = math.ceil(rows / unit) * unit
    if batch > 1.5 * rows or any(layout.problems(request.shape, layout.devices, batch)):
        return None
    options = request.attention, request.efficiency, request.overlap_experts, request.torch_compile
    dtype = request.dtype(layout)
    speed = estimate(request.shape, layout, dtype, request.device, request.max_length, batch, *options)
    days = request.tokens / speed.tokens_per_second / SECONDS_PER_DAY
    return Larger(layout, batch, days * speed.mfu / request.mfu if request.mfu else days)

"""What a plan means, in sentences: why this layout, how long it takes, and how many devices would take less."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hfllm.scaling.devices import GIB
from hfllm.scaling.flops import SECONDS_PER_DAY
from hfllm.scaling.layouts import MEGATRON, Layout
from hfllm.scaling.planner import HEADROOM, Plan, Request
from hfllm.scaling.speed import estimate

DAYS_PER_YEAR = 365.25
# A share of each step without work that needs a word.
MUCH_IDLE = 0.3
# ZeRO-3 over so many devices: the only published runs (Narayanan et al. 2021, table 2) took twice to thrice the plan.
MANY_SHARDS = 512
# What is planned are steps, one after the other, by the best layout and software. Published whole runs took so many
# times as long (the median over their sources), four of five of them between these (benchmarks/whole_runs.csv).
WHOLE_RUN, WHOLE_RUN_RANGE = 1.5, (1.0, 2.0)
# Times the batch that is tried for more devices, and how many devices more than in proportion are accepted.
LARGER_BATCHES, MOST_MORE = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), 1.25


@dataclass(frozen=True)
class Larger:
    """A larger cluster: its layout, rows per step, and the days that training takes on it."""

    layout: Layout
    global_batch_size: int
    days: float


def sentences(chosen: Plan, plans: Sequence[Plan], request: Request, target_days: float = 90.0) -> list[str]:
    """Return what to know of the chosen plan, a sentence or two per line."""
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
    """Return what runs a layout that the recipes do not run."""
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
    """Return the smallest cluster of more replicas of the chosen layout that takes `target_days`.

    The batch grows where it must: replicas with few micro-batches wait for each other. `None` if no batch up to 64
    times as large helps.
    """
    least = math.ceil(chosen.layout.data * chosen.days / target_days)
    most = math.ceil(MOST_MORE * least)
    for times in LARGER_BATCHES:
        rows = math.ceil(times * request.global_batch_size)
        for data in range(least, most + 1, max(1, (most - least) // 25)):
            found = _with_replicas(chosen, request, data, rows)
            if found is not None and found.days <= target_days:
                return found
    return None


def _with_replicas(chosen: Plan, request: Request, data: int, rows: int) -> Larger | None:
    """Return so many replicas, on `rows` or the next number of rows that they can divide."""
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

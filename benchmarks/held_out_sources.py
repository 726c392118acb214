"""The planner on sources that nothing was fitted to: steps of published runs, memory of their devices, whole runs.

    python benchmarks/held_out_sources.py --output benchmarks/results/held_out_sources.md     # two minutes

**Steps.** For each source the constants (shares of the peak, passes through memory, slowing of work by transfers) are
fitted to the dense runs of all others, by the sum of a Huber loss of the logarithms and a weak pull to values from
elsewhere, without which a constant that no run tells of would be anything. The H100 at 500 W is left out: it has one
source.

**Whole runs.** `whole_runs.csv` has the device hours that papers report for whole trainings. Each is planned as `hfllm
plan` would, by its model, devices, rows and batch, with the attention of its time and its recomputation where that is
published; the layout is the planner's. Hours hold restarts, evaluation, slow nodes, and software that is not the best.
`devices` is assumed where the last column does not say that it is published. The factor for whole runs is the median
over sources of each one's median; for a source it is that of the others.
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from published_runs import CLOSE, FOLDER, LIMITED, Run, read_runs

from hfllm.scaling import speed
from hfllm.scaling.devices import find_device
from hfllm.scaling.planner import Request, choose, plan
from hfllm.scaling.shapes import Shape

# Where the fit is pulled to, from outside of the runs. The first FlashAttention reaches 25 to 40% of an A100's peak
# (arXiv:2307.08691, section 1) in the half of the products that the mask leaves; on an H100, whose novelties it does
# not use, 1.6 times as much by clock and processors, of 3.2 times the peak.
PRIOR = {
    "a100": {"efficiency": 0.65, "attention_efficiency": 0.7, "flash1_efficiency": 0.5},
    "h100": {"efficiency": 0.65, "attention_efficiency": 0.7, "flash1_efficiency": 0.25},
}
START = {f"{family} {name}": value for family, shares in PRIOR.items() for name, value in shares.items()}
START |= {"traversals": 10.0, "contention": 0.7}
PULL, QUARTER = 0.02, 0.25
# Where the Huber loss becomes linear, and the steps of the search.
DELTA, STEPS = 0.1, (1.15, 1.06, 1.025)


@dataclass(frozen=True)
class WholeRun:
    """A training of which the device hours are published.

    Args:
        ratio: planned over published hours.
    """

    source: str
    model: str
    family: str
    ratio: float


# ---- steps ----


def ratio(run: Run, constants: Mapping[str, float]) -> float:
    """Return the expected over the published seconds of a step, by other constants than the planner's."""
    shares = {name: constants[f"{run.family} {name}"] for name in PRIOR[run.family]}
    kept = speed.TRAVERSALS, speed.COMPILED_TRAVERSALS, speed.CONTENTION
    speed.TRAVERSALS, speed.COMPILED_TRAVERSALS = constants["traversals"], constants["traversals"] / 2
    speed.CONTENTION = constants["contention"]
    try:
        return replace(run, device=replace(run.device, **shares)).ratio
    finally:
        speed.TRAVERSALS, speed.COMPILED_TRAVERSALS, speed.CONTENTION = kept


def _huber(error: float) -> float:
    size = abs(error)
    return size * size / 2 if size < DELTA else DELTA * (size - DELTA / 2)


def fit(runs: Sequence[Run]) -> dict[str, float]:
    """Return the constants that fit runs best, one after the other, each by ever smaller factors."""
    constants = dict(START)
    for step in STEPS:
        for _ in range(6):
            before = dict(constants)
            for name in constants:
                told = [run for run in runs if " " not in name or name.startswith(f"{run.family} ")]
                _improve(
                    constants,
                    name,
                    step,
                    lambda told=told: sum(_huber(math.log(ratio(run, constants))) for run in told),
                )
            if constants == before:
                break
    return constants


def _improve(constants: dict[str, float], name: str, step: float, loss: Callable[[], float]) -> None:
    def pulled() -> float:
        return loss() + PULL * (math.log(constants[name] / START[name]) / QUARTER) ** 2

    least, value = pulled(), constants[name]
    for factor in (step, 1 / step):
        constants[name] = value * factor
        if pulled() < least - 1e-6:
            return
    constants[name] = value


def held_out_steps(runs: Sequence[Run]) -> Iterator[tuple[str, list[tuple[Run, float]]]]:
    """Yield sources with the ratio of each of their runs, by constants that are fitted to the other sources."""
    runs = [run for run in runs if run.family != LIMITED]
    for source in dict.fromkeys(run.source for run in runs):
        constants = fit([run for run in runs if run.source != source and not run.shape.num_local_experts])
        yield source, [(run, ratio(run, constants)) for run in runs if run.source == source]


# ---- memory ----


def over_the_card(runs: Sequence[Run]) -> int:
    """Return how many runs, all of which ran, are planned to need more than all of their device's memory."""
    return sum(run.memory.peak > run.device.memory for run in runs)


# ---- whole runs ----


def whole_runs() -> list[WholeRun]:
    """Return the whole runs with what is planned for them, in the order of the file."""
    models = json.loads((FOLDER / "published_models.json").read_text(encoding="utf-8"))
    with (FOLDER / "whole_runs.csv").open(newline="", encoding="utf-8") as stream:
        return [_planned(row, models) for row in csv.DictReader(stream)]


def _planned(row: Mapping[str, str], models: Mapping[str, dict]) -> WholeRun:
    shape, length = Shape.from_config(models[row["model"]], row["model"]), int(row["sequence_length"])
    if shape.position_embedding_type == "learned":
        shape = replace(shape, max_position_embeddings=length)
    devices = int(row["devices"])
    request = Request(
        shape,
        find_device(row["device"]),
        num_devices=devices,
        max_length=length,
        global_batch_size=int(row["global_batch_size"]),
        tokens=float(row["tokens"]),
        attention=row["attention"],
        recompute=row["recompute"] or None,
    )
    hours = choose(plan(request)).days * 24 * devices
    return WholeRun(row["source"], row["model"], row["device"].split("-")[0], hours / float(row["device_hours"]))


def factor(runs: Sequence[WholeRun]) -> float:
    """Return how many times the plan whole runs take: each source counts once."""
    sources = dict.fromkeys(run.source for run in runs)
    return 1 / median(median(run.ratio for run in runs if run.source == source) for source in sources)


def held_out_whole_runs(runs: Sequence[WholeRun]) -> list[float]:
    """Return the planned over the published hours of each run, times the factor of the other sources."""
    others = {source: factor([run for run in runs if run.source != source]) for source in {run.source for run in runs}}
    return [run.ratio * others[run.source] for run in runs]


# ---- the report ----


def share(ratios: Sequence[float]) -> str:
    """Return the share of ratios within a quarter, and their number."""
    return f"{sum(abs(each - 1) <= CLOSE for each in ratios) / len(ratios):.0%} of {len(ratios)}"


def step_lines(runs: Sequence[Run]) -> list[str]:
    """Return the table of steps by held-out source."""
    lines = ["| steps of | runs | median ratio | within 25% |", "| - | - | - | - |"]
    found = list(held_out_steps(runs))
    for source, pairs in found:
        ratios = [each for _, each in pairs]
        lines.append(f"| {source} | {len(ratios)} | {median(ratios):.2f} | {share(ratios).split()[0]} |")
    every = [pair for _, pairs in found for pair in pairs]
    for family in ("a100", "h100"):
        own = [each for run, each in every if run.family == family]
        few = [each for run, each in every if run.family == family and "MosaicML" not in run.source]
        lines.append(f"| {family}, all | {len(own)} | {median(own):.2f} | {share(own).split()[0]} |")
        lines.append(f"| {family}, without MosaicML | {len(few)} | {median(few):.2f} | {share(few).split()[0]} |")
    return lines


def memory_lines(runs: Sequence[Run]) -> list[str]:
    """Return the table of runs that are planned over their card."""
    lines = ["| memory of | runs | planned over the card |", "| - | - | - |"]
    for source in dict.fromkeys(run.source for run in runs):
        own = [run for run in runs if run.source == source]
        lines.append(f"| {source} | {len(own)} | {over_the_card(own)} |")
    return [*lines, f"| all | {len(runs)} | {over_the_card(runs)} |"]


def whole_lines(runs: Sequence[WholeRun]) -> list[str]:
    """Return the table of whole runs."""
    lines = ["| whole run | model | planned over published hours | times the others' factor |", "| - | - | - | - |"]
    held_out = held_out_whole_runs(runs)
    for run, corrected in zip(runs, held_out, strict=True):
        lines.append(f"| {run.source} | {run.model} | {run.ratio:.2f} | {corrected:.2f} |")
    for family in ("a100", "h100"):
        own = [(run.ratio, each) for run, each in zip(runs, held_out, strict=True) if run.family == family]
        plain, corrected = zip(*own, strict=True)
        lines.append(f"| {family}, within 25% | | {share(plain)} | {share(corrected)} |")
    return [*lines, f"| factor of all | | | {factor(runs):.2f} |"]


def report() -> str:
    """Return the three tables."""
    runs = read_runs()
    parts = step_lines(runs), memory_lines(runs), whole_lines(whole_runs())
    return "\n\n".join("\n".join(lines) for lines in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = report()
    print(text)
    if args.output:
        args.output.write_text(
            f"# The planner on held-out sources\n\n`python {Path('benchmarks') / Path(__file__).name}`\n\n{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()

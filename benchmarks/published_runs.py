"""The planner's time and memory against published runs: `python benchmarks/planner.py --published`.

`published_runs.csv` has a run per line with its source, and `published_models.json` the models. Each third line (the
third, the sixth, ...) is held out: the constants of hfllm/scaling/speed.py and devices.py are fitted to the others
alone, without runs that have experts, on a grid by the sum of a Huber loss of the logarithms, and rounded.

What sources do not say is assumed for all rows of a source alike: micro-batches of Narayanan et al. 2021 (smaller for
larger models), one layer per chunk in Llama 3's interleaving, no recomputation where none is named. Activations that
some runs recomputed in part are planned as kept.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from hfllm.scaling.activations import PRECISIONS, Precision
from hfllm.scaling.devices import GIB, Device, find_device
from hfllm.scaling.layouts import MEGATRON, Layout
from hfllm.scaling.memory import Memory, device_memory
from hfllm.scaling.planner import USABLE
from hfllm.scaling.shapes import Shape
from hfllm.scaling.speed import Speed, estimate

FOLDER = Path(__file__).parent
# Meta's H100 of 96 GB with slower memory, limited to 500 of 700 W. Its source says that its peak is lower and unknown:
# these runs count for memory, and their times are shown apart from those of other H100.
LIMITED = "h100-500w"
FAMILIES = ("a100", "h100", LIMITED)
# A share within which an estimate is of use for a plan.
CLOSE = 0.25


@dataclass(frozen=True)
class Run:
    """A published run.

    Args:
        family: `a100`, `h100` with its relatives, or `LIMITED`.
        seconds: of a step, as published or from published tokens per second.
        memory_gib: as published, `None` for most.
        is_held_out: whether no constant is fitted to it.
    """

    source: str
    model: str
    shape: Shape
    layout: Layout
    precision: Precision
    device: Device
    family: str
    sequence_length: int
    global_batch_size: int
    attention: str
    overlap_experts: bool
    seconds: float
    published: str
    memory_gib: float | None
    is_held_out: bool

    @property
    def speed(self) -> Speed:
        """Return what the planner expects."""
        sizes = self.sequence_length, self.global_batch_size, self.attention
        return estimate(
            self.shape, self.layout, self.precision, self.device, *sizes, overlap_experts=self.overlap_experts
        )

    @property
    def ratio(self) -> float:
        """Return the expected over the published seconds of a step."""
        return self.speed.seconds / self.seconds

    @property
    def memory(self) -> Memory:
        """Return the memory that the planner expects."""
        passes = self.layout.micro_batches(self.global_batch_size)
        options = self.precision, self.sequence_length, passes, self.attention
        return device_memory(self.shape, self.layout, *options, runtime=self.device.runtime)

    @property
    def claimed_gib(self) -> float:
        """Return what the planner would set aside, GiB: the peak, and what `--usable_memory` leaves for fragments."""
        return (self.memory.peak + (1 - USABLE) * self.device.memory) / GIB


def read_runs() -> list[Run]:
    """Return the published runs, in the order of the file."""
    models = json.loads((FOLDER / "published_models.json").read_text(encoding="utf-8"))
    with (FOLDER / "published_runs.csv").open(newline="", encoding="utf-8") as stream:
        return [_run(row, models, number % 3 == 0) for number, row in enumerate(csv.DictReader(stream), start=1)]


def _run(row: dict[str, str], models: dict[str, dict], is_held_out: bool) -> Run:
    sizes = {name: int(row[name]) for name in ("tensor", "context", "pipeline", "expert", "interleave", "zero_stage")}
    devices, batch, length = int(row["devices"]), int(row["global_batch_size"]), int(row["sequence_length"])
    sizes |= {"data": devices // (sizes["tensor"] * sizes["context"] * sizes["pipeline"])}
    sizes |= {"micro_batch": int(row["micro_batch_size"])}
    layout = Layout(**sizes, recompute=row["recompute"], whole_rows=row["whole_rows"] == "yes")
    precision = row["precision"]
    if layout.engine == MEGATRON and "_" not in precision:
        precision += "_megatron"
    shape = Shape.from_config(models[row["model"]], row["model"])
    if shape.position_embedding_type == "learned":
        # MPT's tables have as many positions as rows have tokens.
        shape = replace(shape, max_position_embeddings=length)
    return Run(
        *(row["source"], row["model"], shape, layout, PRECISIONS[precision], _device(row["device"])),
        *(_family(row["device"]), length, batch, row["attention"]),
        row["overlap_experts"] == "yes",
        batch * length / (devices * float(row["tokens_per_second"])),
        row["published"],
        float(row["memory_gib"]) if row["memory_gib"] else None,
        is_held_out,
    )


def _family(device: str) -> str:
    return device if device == LIMITED else device.split("-")[0].replace("h800", "h100")


def _device(name: str) -> Device:
    if name == LIMITED:
        return replace(find_device("h100"), name=name, memory=96 * GIB, bandwidth=2.4e12)
    return find_device(name)


def summary(runs: Sequence[Run]) -> dict[str, float]:
    """Return the number of runs, the median ratio, the share of close ones, and the mean size of errors."""
    ratios = [run.ratio for run in runs]
    return {
        "runs": len(ratios),
        "median": median(ratios),
        "close": sum(abs(ratio - 1) <= CLOSE for ratio in ratios) / len(ratios),
        "error": math.exp(sum(abs(math.log(ratio)) for ratio in ratios) / len(ratios)) - 1,
    }


def groups(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """Yield families of devices, each whole, by fitted and held-out runs, and by source."""
    for family in FAMILIES:
        own = [run for run in runs if run.family == family]
        yield family, "all", own
        yield family, "fitted", [run for run in own if not run.is_held_out]
        yield family, "held out", [run for run in own if run.is_held_out]
        for source in dict.fromkeys(run.source for run in own):
            yield family, source, [run for run in own if run.source == source]


def report() -> str:
    """Return the tables of errors: by group, of memory, and of each run."""
    runs = read_runs()
    lines = ["| devices | runs of | runs | median ratio | within 25% | mean error |", "| - | - | - | - | - | - |"]
    for family, name, group in groups(runs):
        one = summary(group)
        cells = (family, name, one["runs"], f"{one['median']:.2f}", f"{one['close']:.0%}", f"{one['error']:.0%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| source | model | layout | row | published, GiB | planned peak | with a tenth of the device |"]
    lines += ["| - | - | - | - | - | - | - |"]
    for run in runs:
        if run.memory_gib is not None:
            sizes = f"{run.memory_gib:.1f} | {run.memory.peak / GIB:.1f} | {run.claimed_gib:.1f}"
            lines.append(f"| {run.source} | {run.model} | {run.layout} | {run.sequence_length} | {sizes} |")
    lines += ["", "| | source | model | devices | layout | row | micro-batch | recompute | published | ratio |"]
    lines += ["| - | - | - | - | - | - | - | - | - | - |"]
    for run in runs:
        cells = (
            "held out" if run.is_held_out else "",
            run.source,
            run.model,
            f"{run.layout.devices} {run.device.name}",
        )
        cells += (run.layout, run.sequence_length, run.layout.micro_batch, run.layout.recompute, run.published)
        lines.append(f"| {' | '.join(map(str, cells))} | {run.ratio:.2f} |")
    return "\n".join(lines)

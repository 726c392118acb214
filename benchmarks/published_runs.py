"""The planner's time and memory against published runs: `python benchmarks/planner.py --published`.

`published_runs.csv` has a run per line with its source, and `published_models.json` the models. Each third line (the
third, the sixth, ...) is held out: the constants of hfllm/scaling/speed.py and devices.py are fitted to the others
alone, without runs that have experts, on a grid by the sum of a Huber loss of the logarithms, and rounded.

The column `checked` says where a row's figure was read: `source: ...` is the source itself (a copy of a paper's text,
or files of the same authors), `quoted: ...` what others quote from it, and an empty one means that it was written from
memory.

What sources do not say is assumed for all rows of a source alike: micro-batches of Narayanan et al. 2021, table 1
(smaller for larger models), and no interleaving, since the paper uses it without naming its chunks; one layer per
chunk in Llama 3's interleaving; micro-batches of one row for MT-NLG, with ZeRO-1, GLM-130B and DeepSeek-V3; no
recomputation where none is named. Activations that some runs recomputed in part are planned as kept. Gigabytes that
BigScience read from nvidia-smi are taken as thousands of MiB. torchtitan's memory is what torch reserved, without the
process itself. By their software, MosaicML, torchtitan and Megatron-Bridge's ZeRO-3 shard by FSDP; MosaicML
(FlashAttention's kernel) and NVIDIA have fused losses, and NVIDIA's runs reduce gradients in 16 bits
(`grad_reduce_in_fp32` is off in those of its scripts that were read, and assumed to be in the others).

Tokens per second follow from what was published: FLOP/s with recomputation by equation 3 of Narayanan et al., those of
Llama 3 and GLM-130B without recomputation, attention counted with the mask for Llama 3 alone.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from hfllm.scaling.devices import GIB, Device, find_device
from hfllm.scaling.layouts import FSDP2, MEGATRON, Layout
from hfllm.scaling.memory import PRECISIONS, Memory, Precision, device_memory
from hfllm.scaling.shapes import Shape
from hfllm.scaling.speed import Speed, estimate

FOLDER = Path(__file__).parent
# An H100 with less power and slower memory is a device of its own.
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
        checked: where the row was read; empty if it was written from memory.
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
    torch_compile: bool
    seconds: float
    published: str
    memory_gib: float | None
    checked: str
    is_held_out: bool

    @property
    def is_from_source(self) -> bool:
        """Return whether the row was compared with the source itself, not with what others quote from it."""
        return self.checked.startswith("source:")

    @property
    def speed(self) -> Speed:
        """Return what the planner expects."""
        sizes = self.sequence_length, self.global_batch_size, self.attention
        how = {"overlap_experts": self.overlap_experts, "compiled": self.torch_compile}
        return estimate(self.shape, self.layout, self.precision, self.device, *sizes, **how)

    @property
    def ratio(self) -> float:
        """Return the expected over the published seconds of a step."""
        return self.speed.seconds / self.seconds

    @property
    def memory(self) -> Memory:
        """Return the memory that the planner expects."""
        passes = self.layout.micro_batches(self.global_batch_size)
        options = self.precision, self.sequence_length, passes, self.attention
        return device_memory(self.shape, self.layout, *options, device=self.device)

    @property
    def memory_ratio(self) -> float:
        """Return the planned peak over the published memory, which must be known."""
        return self.memory.peak / GIB / self.memory_gib


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
    kind = {name: row[name] == "yes" for name in ("whole_rows", "fsdp", "fused_loss")}
    layout = Layout(**sizes, recompute=row["recompute"], **kind)
    if layout.engine == FSDP2:
        layout = replace(layout, split_rows=row["whole_rows"] == "no")
    precision = row["precision"]
    if layout.engine == MEGATRON and "_" not in precision:
        precision += "_megatron"
    shape = Shape.from_config(models[row["model"]], row["model"])
    if shape.position_embedding_type == "learned":
        # MPT's tables have as many positions as rows have tokens.
        shape = replace(shape, max_position_embeddings=length)
    return Run(
        *(row["source"], row["model"], shape, layout, PRECISIONS[precision], find_device(row["device"])),
        *(_family(row["device"]), length, batch, row["attention"]),
        *(row["overlap_experts"] == "yes", row["torch_compile"] == "yes"),
        batch * length / (devices * float(row["tokens_per_second"])),
        row["published"],
        float(row["memory_gib"]) if row["memory_gib"] else None,
        row["checked"],
        is_held_out,
    )


def _family(device: str) -> str:
    return device if device == LIMITED else device.split("-")[0].replace("h800", "h100")


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


def provenance(runs: Sequence[Run]) -> list[str]:
    """Return what limits the table of errors: rows not read in their source, and what was seen beforehand."""
    others = [run for run in runs if not run.is_from_source]
    names = ", ".join(dict.fromkeys(run.source for run in others)) or "none"
    a100, h100 = ([run for run in runs if run.family == family] for family in FAMILIES[:2])
    checked = [[run for run in own if run.is_from_source] for own in (a100, h100)]
    few = [[run for run in own if "MosaicML" not in run.source] for own in (a100, h100)]
    return [
        f"Not compared with the paper, but with what others quote from it: {names}.",
        f"Medians and shares within 25% without these {len(others)} runs: {_both(*checked)}.",
        f"Without MosaicML's, of which there are most: {_both(*few)}.",
        "Errors of held-out runs were visible while the terms of the model were chosen.",
    ]


def _both(a100: Sequence[Run], h100: Sequence[Run]) -> str:
    return f"{_medians('a100', a100)}, {_medians('h100', h100)}"


def _medians(name: str, runs: Sequence[Run]) -> str:
    every, held_out = summary(runs), summary([run for run in runs if run.is_held_out])
    text = f"{name} {every['median']:.2f} and {every['close']:.0%}"
    return f"{text}, held out {held_out['median']:.2f} and {held_out['close']:.0%}"


def memory_summary(runs: Sequence[Run]) -> Iterator[tuple[str, int, float, float, float]]:
    """Yield groups of runs of known memory: name, number, and least, median and largest planned over published."""
    known = [run for run in runs if run.memory_gib is not None]
    yield "all", *_range(known)
    yield "fitted", *_range([run for run in known if not run.is_held_out])
    yield "held out", *_range([run for run in known if run.is_held_out])
    for source in dict.fromkeys(run.source for run in known):
        yield source, *_range([run for run in known if run.source == source])


def _range(runs: Sequence[Run]) -> tuple[int, float, float, float]:
    ratios = [run.memory_ratio for run in runs]
    return len(ratios), min(ratios), median(ratios), max(ratios)


def report() -> str:
    """Return the tables of errors: by group, with what limits them, of memory, and of each run."""
    runs = read_runs()
    lines = ["| devices | runs of | runs | median ratio | within 25% | mean error |", "| - | - | - | - | - | - |"]
    for family, name, group in groups(runs):
        one = summary(group)
        cells = (family, name, one["runs"], f"{one['median']:.2f}", f"{one['close']:.0%}", f"{one['error']:.0%}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *provenance(runs), ""]
    lines += ["| memory of | runs | least planned over published | median | largest |", "| - | - | - | - | - |"]
    for name, count, *ratios in memory_summary(runs):
        lines.append(f"| {name} | {count} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    lines += ["", "| | source | model | layout | row | micro-batch | published, GiB | planned peak | ratio |"]
    lines += ["| - | - | - | - | - | - | - | - | - |"]
    for run in runs:
        if run.memory_gib is not None:
            cells = ("held out" if run.is_held_out else "", run.source, run.model, run.layout, run.sequence_length)
            cells += (run.layout.micro_batch, run.memory_gib, f"{run.memory.peak / GIB:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {run.memory_ratio:.2f} |")
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

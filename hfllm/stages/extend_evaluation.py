"""What an extended model makes of long texts, beside the same model as it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from hfllm.data.packing import start_of
from hfllm.evaluation.long_texts import NeedleGrid, find_needles
from hfllm.generation.scoring import bits_by_range, edges_of, nats_by_position
from hfllm.outputs.report import Found, Plot, change_of, mean_of
from hfllm.runs.command_line import say
from hfllm.stages.extend import ExtendArguments
from hfllm.stages.extend_data import LongRows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How the figures of the model as it was, reading no more than it was trained on, are called.
CUT = "before, cut"
FILLERS = {"world": "needle", "text": "needle_text"}


@dataclass
class ExtendEvaluation:
    """Judges a model again and again on the same rows and the same needles.

    Args:
        script_args: the flags.
        tokenizer: the model's.
        rows: of the new length.
        original: tokens that the model was trained on.
        length: tokens that it is extended to.
    """

    script_args: ExtendArguments
    tokenizer: "PreTrainedTokenizerBase"
    rows: LongRows
    original: int
    length: int
    nats: "dict[str, torch.Tensor]" = field(default_factory=dict)
    grids: dict[str, dict[str, NeedleGrid]] = field(default_factory=dict)

    def judge(self, model: "PreTrainedModel", when: str, needles: bool = True) -> None:
        """Measure the loss by position, and what needles are found.

        Args:
            when: `before`, `extended` (but not yet trained) or `after`.
        """
        say(f"extend: {when}: loss by position{', needles' if needles else ''}")
        self.nats[when] = nats_by_position(model, self.rows.held_out)
        if when == "before":
            kept = len(start_of(self.tokenizer))
            self.nats[CUT] = nats_by_position(model, self.rows.held_out, window=self.original, kept=kept)
        if needles:
            lengths = self.lengths
            cases, seed = self.script_args.num_needles, self.script_args.world_seed
            self.grids[when] = {
                whose: find_needles(model, self.tokenizer, filler, lengths, cases, seed=seed)
                for whose, filler in self.rows.fillers.items()
            }

    @property
    def lengths(self) -> list[int]:
        """The lengths at which needles are asked for: half the original one, and from there on doubled."""
        lengths, place = [], max(self.original // 2, 64)
        while place < self.length:
            lengths.append(place)
            place *= 2
        return [*lengths, self.length]

    def bits(self, when: str, first: int, last: int) -> list[float]:
        """Return the bits per byte of each held-out row between two places."""
        return bits_by_range(self.nats[when], self.rows.held_out, self.tokenizer, first, last)

    def found(self) -> Found:
        """Return the figures, tables and plots of everything that was judged."""
        metrics: dict[str, float] = {}
        ranges = {"short": (1, self.original), "long": (self.original, self.length)}
        for name, (first, last) in ranges.items():
            by_time = {when: self.bits(when, first, last) for when in self.nats}
            metrics |= change_of(f"bits_per_byte_{name}", by_time["before"], by_time["after"])
            if "extended" in by_time:
                metrics |= mean_of(f"bits_per_byte_{name}_untrained", by_time["extended"])
            if name == "long":
                metrics |= mean_of("bits_per_byte_long_cut", by_time[CUT])
        tables, plots = {"Bits per byte by position": self._by_position()}, {"bits_by_position": self._plot()}
        for whose, name in FILLERS.items():
            if whose not in self.rows.fillers:
                continue
            metrics |= change_of(name, *(self.grids[when][whose].share() for when in ("before", "after")))
            metrics[f"{name}_chance"] = self.grids["after"][whose].chance
            for when in ("before", "after"):
                grid = self.grids[when][whose]
                title = f"Needles found in {'your text' if whose == 'text' else 'texts of the world'}, {when}"
                tables[title], plots[f"{name}_{when}"] = grid.rows(), grid.heatmap(title)
        return Found(metrics, self._summary(metrics), tables, plots)

    def _by_position(self) -> list[Mapping[str, str | float]]:
        edges = edges_of(self.original, self.length)
        return [
            {"tokens": f"{first} to {last}", **{when: _mean(self.bits(when, first, last)) for when in self.nats}}
            for first, last in pairwise(edges)
        ]

    def _plot(self) -> Plot:
        step = max(1, self.length // 32)
        edges = [1, *range(step, self.length, step), self.length]
        spans = [(first, last) for first, last in pairwise(edges) if last > first]
        places = [(first + last) / 2 for first, last in spans]
        return Plot(
            title=f"{self.script_args.rope_type}: {self.original} to {self.length} tokens",
            xlabel="position (tokens)",
            ylabel="bits per byte",
            lines={when: (places, [_mean(self.bits(when, *span)) for span in spans]) for when in self.nats},
        )

    def _summary(self, metrics: Mapping[str, float]) -> str:
        beyond, within = (
            [metrics[f"bits_per_byte_{name}_{when}"] for when in ("after", "before")] for name in ("long", "short")
        )
        needles = [metrics[f"needle_{name}"] for name in ("after", "before", "chance")]
        joined = " Short texts were joined for the long rows." if self.rows.are_joined else ""
        return (
            f"{self.script_args.rope_type}, {self.original} to {self.length} tokens. Bits per byte beyond "
            f"{self.original}: {beyond[0]:.3f}, before {beyond[1]:.3f}, and {metrics['bits_per_byte_long_cut']:.3f} "
            f"reading {self.original} tokens at most; up to there: {within[0]:.3f}, before {within[1]:.3f}. Needles "
            f"found: {needles[0]:.2f}, before {needles[1]:.2f}, by chance {needles[2]:.2f}.{joined}"
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

"""The plan of a pretraining run: which rows each optimizer step learns from, known before the first step.

A step's batch is a function of the step alone, so a run that resumes after an interruption gets the next batch
without reading earlier ones. Length curriculum and batch ramp are part of the plan: a callback could not change
either exactly, since the dataloader is a batch ahead of the trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from torch.utils.data import Dataset as TorchDataset

from hfllm.data.packing import batch_of
from hfllm.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Schedule:
    """A number that changes in steps over a run.

    Args:
        stages: (share of the run's tokens from which the number holds, number), with rising shares from 0.
    """

    stages: tuple[tuple[float, int], ...]

    @classmethod
    def parse(cls, text: str | int, flag: str) -> "Schedule":
        """Parse a number, or comma-separated `share:number` pairs, such as `0:128,0.2:256,0.5:512`.

        Raises:
            InputError: naming the flag and what is wrong.
        """
        try:
            pairs = [part.split(":") for part in str(text).split(",")]
            stages = [(0.0, int(pairs[0][0]))] if len(pairs[0]) == 1 else [(float(at), int(to)) for at, to in pairs]
        except ValueError:
            raise InputError(f"{flag} {text!r}: expected a number, or share:number,... as in 0:128,0.5:512") from None
        shares = [at for at, _ in stages]
        if shares[0] != 0 or sorted(set(shares)) != shares or shares[-1] >= 1 or min(to for _, to in stages) < 1:
            raise InputError(f"{flag} {text!r}: shares must rise from 0 to below 1, and numbers be at least 1")
        return cls(tuple(stages))

    def at(self, share: float) -> int:
        """Return the number that holds after this share of the run."""
        return next(number for begin, number in reversed(self.stages) if begin <= share)


class BatchPlan(TorchDataset):
    """The batches of a run, one per optimizer step; as a dataset its length is the number of steps.

    Args:
        sources: packed rows (`hfllm.data.packing.pack`), one dataset per source.
        weights: share of the rows that each source gives; a source that is used up starts again in another order.
        row_length: tokens per full row.
        total_rows: rows of the whole run.
        batch_rows: rows per step, over all processes; `tokens` of a schedule are divided by `row_length`.
        lengths: the length that rows are cut to.
        pad_token_id: for rows that are not full.
        seed: seed of the order.
        process, processes: this process and their number, which select its share of each batch.
        transform: function applied to each batch, such as masking, given one number per row that is unique
            in the whole run, whichever process has the row.

    Raises:
        InputError: for lengths that do not divide `row_length`, batches of fewer rows than processes, or weights that
            do not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence["Dataset"],
        row_length: int,
        total_rows: int,
        batch_tokens: Schedule,
        lengths: Schedule,
        pad_token_id: int,
        seed: int,
        weights: Sequence[float] | None = None,
        process: int = 0,
        processes: int = 1,
        transform: Callable[[dict[str, torch.Tensor], list[int]], dict[str, torch.Tensor]] | None = None,
    ):
        self.transform = transform
        self.sources, self.row_length, self.pad_token_id, self.seed = list(sources), row_length, pad_token_id, seed
        self.process, self.processes, self.total_rows = process, processes, total_rows
        for _, length in lengths.stages:
            if row_length % length:
                raise InputError(f"a curriculum length of {length} does not divide the row length of {row_length}")
        smallest = min(tokens for _, tokens in batch_tokens.stages) // row_length
        if smallest < processes:
            raise InputError(
                f"a batch of {min(tokens for _, tokens in batch_tokens.stages)} tokens has {smallest} rows of "
                f"{row_length} tokens, fewer than the {processes} process(es)"
            )
        self._order_of: dict[int, tuple[int, numpy.ndarray]] = {}
        self._mix(weights)
        self._steps: list[tuple[int, int, int]] = []
        first = 0
        while total_rows - first >= processes:
            share = first / total_rows
            rows = min(batch_tokens.at(share) // row_length, total_rows - first)
            # The same number on each process, since all must make the same number of passes.
            rows -= rows % processes
            self._steps.append((first, rows, lengths.at(share)))
            first += rows

    def _mix(self, weights: Sequence[float] | None) -> None:
        sizes = [len(source) for source in self.sources]
        if weights is None:
            weights = sizes
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise InputError(f"{len(weights)} weights for {len(sizes)} source(s); one above 0 for each is expected")
        shares = numpy.asarray(weights, dtype=float) / sum(weights)
        if len(sizes) == 1:
            self._source = numpy.zeros(self.total_rows, dtype=numpy.int16)
        else:
            rng = numpy.random.default_rng((self.seed, 1))
            self._source = rng.choice(len(sizes), size=self.total_rows, p=shares).astype(numpy.int16)
        # The index within its source of each row of the run, counted from the source's first.
        self._number = numpy.zeros(self.total_rows, dtype=numpy.int64)
        for index in range(len(sizes)):
            places = numpy.flatnonzero(self._source == index)
            self._number[places] = numpy.arange(len(places))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one step on this process, see `batch_of`."""
        first, rows, length = self._steps[step]
        places = numpy.array_split(numpy.arange(first, first + rows), self.processes)[self.process]
        rows = [self._row(int(place)) for place in places]
        cut = self.row_length // length
        batch = batch_of(rows, self.row_length, self.pad_token_id, cut)
        if self.transform is None:
            return batch
        starts = range(0, self.row_length, length)
        return self.transform(batch, [int(place) * self.row_length + start for place in places for start in starts])

    def _row(self, place: int) -> dict:
        index, number = int(self._source[place]), int(self._number[place])
        source = self.sources[index]
        epoch, within = divmod(number, len(source))
        kept = self._order_of.get(index)
        if kept is None or kept[0] != epoch:
            kept = epoch, numpy.random.default_rng((self.seed, 2, index, epoch)).permutation(len(source))
            self._order_of[index] = kept
        return source[int(kept[1][within])]

    def tokens_at(self, step: int) -> int:
        """Return the positions of all steps before `step`, over all processes."""
        first = self._steps[step][0] if step < len(self._steps) else self.total_rows
        return first * self.row_length

    def rows_by_source(self) -> list[int]:
        """Return the number of rows of the run from each source."""
        return [int((self._source == index).sum()) for index in range(len(self.sources))]

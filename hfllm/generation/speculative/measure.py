"""Measure the cost and speedup of speculative decoding on this machine, and compare with the formula."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from hfllm.generation.packed.model import unsupported_reason
from hfllm.generation.packed.ragged_model import padded_right, ragged_model
from hfllm.generation.speculative.acceptance import optimal_num_draft_tokens, read_options, speedup
from hfllm.generation.speculative.drafts import Draft, DraftLength, Rows
from hfllm.generation.speculative.speculative import Statistics, many_shapes, speculative_generate
from hfllm.outputs.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]


@dataclass
class Costs:
    """Times in runs of the target for one token.

    Attributes:
        target_seconds: seconds of such a run.
        draft: the paper's c, one drafted token.
        verification: one more token in a run of the target; the paper assumes 0.
    """

    target_seconds: float
    draft: float
    verification: float

    @property
    def per_draft(self) -> float:
        """Return the total cost of a drafted token; drafting pays if a larger share is accepted."""
        return self.draft + self.verification


class SpeedRow(TypedDict):
    """Greedy decoding with one draft length, compared with `generate`.

    Attributes:
        num_draft_tokens: the name of the draft length.
        drafted: mean number of drafted tokens.
        acceptance_rate, tokens_per_target_call: see `Statistics`.
        speedup: time of `generate` divided by ours, median over all rounds.
        speedup_se: the standard error of its mean over the rounds; `None` for one round.
        predicted: the same by the paper's formula.
        predicted_with_verification: the same, including the cost of verifying more tokens.
        seconds: total of all batches.
        tokens: generated tokens.
    """

    num_draft_tokens: str
    drafted: float
    acceptance_rate: float
    tokens_per_target_call: float
    speedup: float
    speedup_se: float | None
    predicted: float
    predicted_with_verification: float
    seconds: float
    tokens: int


@torch.no_grad()
def measure_costs(
    model: "PreTrainedModel",
    draft: Draft,
    batch: Batch,
    num_draft_tokens: int = 4,
    rounds: int = 15,
    compile: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    packed: bool | None = None,
) -> Costs:
    """Time single runs of the target, of the draft, and of the target over a draft, after the prompts of `batch`.

    Args:
        num_draft_tokens: tokens drafted at a time, at least 1.
        rounds: repetitions; the median is returned.
        compile: measure compiled models, as `speculative_generate(compile=True)` runs them.
        clock: returns seconds. On a busy machine the wall clock favors short runs, ending before they are interrupted;
            `time.process_time` does not, and is correct with one thread.
        packed: as in `speculative_generate`.
    """
    lengths = batch["attention_mask"].sum(1)
    capacity = -(-(int(lengths.max()) + num_draft_tokens + 2) // 128) * 128
    tokens = padded_right(batch["input_ids"], batch["attention_mask"], capacity)
    rows = Rows(tokens, lengths, lengths + num_draft_tokens, lengths.tolist())
    options = read_options(model, None, None, tokens.shape[1], max_new_tokens=1, do_sample=False)
    if packed is None:
        packed = not compile and unsupported_reason(model) is None
    target = ragged_model(model, capacity, compile, packed)
    target.prefill(tokens[:, : max(rows.sizes)], rows.lengths, rows.last, rows.sizes)
    draft.begin(target, rows, compile)

    def run(count: int) -> None:
        columns = lengths.unsqueeze(1) - 1 + torch.arange(count, device=tokens.device)
        level = rows.are_level and count == 1
        target(tokens.gather(1, columns), columns, rows.last, max(rows.sizes) - 1 + count, level=level)

    runs = {
        "one": lambda: run(1),
        "several": lambda: run(num_draft_tokens + 1),
        "draft": lambda: draft.propose(rows, num_draft_tokens, options.sampler),
    }
    with many_shapes() if compile else nullcontext():
        seconds = interleaved(runs, rounds, clock)
    one, several, drafting = (statistics.median(seconds[name]) for name in ("one", "several", "draft"))
    return Costs(one, drafting / num_draft_tokens / one, max(0.0, several / one - 1) / num_draft_tokens)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, after a warm-up round; the order rotates between rounds."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in progress(range(rounds), unit="round"):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            _wait()
            began = clock()
            runs[name]()
            _wait()
            seconds[name].append(clock() - began)
    return seconds


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def plain(model: "PreTrainedModel", batch: Batch, **options: Any) -> torch.Tensor:
    """Decode greedily with the target alone, by transformers' `generate`: options of drafting are left out."""
    ours = ("num_draft_tokens", "generator", "compile")
    shared = {name: value for name, value in options.items() if name not in ours}
    return model.generate(**batch, do_sample=False, **shared)


def speculative(
    model: "PreTrainedModel", draft: Draft | None, batches: Sequence[Batch], **options: Any
) -> tuple[list[torch.Tensor], Statistics]:
    """Return the sequences of all batches, and their joint statistics."""
    total, sequences = Statistics(), []
    for batch in batches:
        output = speculative_generate(model, draft, **batch, **options)
        sequences.append(output.sequences)
        total.include(output.statistics)
    return sequences, total


def identical_share(model: "PreTrainedModel", draft: Draft, batches: Sequence[Batch], **options: Any) -> float:
    """Return the share of prompts for which greedy speculative decoding gives exactly the tokens of `generate`."""
    same = total = 0
    for batch in batches:
        expected = plain(model, batch, **options)
        result = speculative_generate(model, draft, **batch, do_sample=False, **options).sequences
        total += len(expected)
        if result.shape == expected.shape:
            same += int((result == expected).all(1).sum())
        else:
            width = min(result.shape[1], expected.shape[1])
            pad = options["pad_token_id"]
            ended = (result[:, width:] == pad).all(1) & (expected[:, width:] == pad).all(1)
            same += int(((result[:, :width] == expected[:, :width]).all(1) & ended).sum())
    return same / total


def speed_by_num_draft_tokens(
    model: "PreTrainedModel",
    draft: Draft,
    batches: Sequence[Batch],
    draft_lengths: Mapping[str, "int | DraftLength"],
    costs: Costs,
    rounds: int = 3,
    **options: Any,
) -> tuple[float, list[SpeedRow]]:
    """Measure greedy decoding with every number of draft tokens against `generate`, in alternation.

    Args:
        draft_lengths: numbers of draft tokens, or objects for choosing them, by their names in the table.
        costs: measured costs for the predictions.
        options: arguments of `generate`, and `compile`.

    Returns:
        Seconds of `generate` for all batches, and one row per draft length.
    """
    stats: dict[str, Statistics] = {}

    def run(name: str) -> Callable[[], None]:
        def decode() -> None:
            settings = {**options, "do_sample": False, "num_draft_tokens": draft_lengths[name]}
            stats[name] = speculative(model, draft, batches, **settings)[1]

        return decode

    runs = {name: run(name) for name in draft_lengths}
    baseline = {"plain": lambda: [plain(model, batch, **options) for batch in batches]}
    seconds = interleaved({**baseline, **runs}, rounds)
    rows = []
    for name in draft_lengths:
        result, alpha = stats[name], stats[name].acceptance_rate
        mean = result.drafted / max(result.target_calls, 1)
        # The two runs of a round had the same machine load.
        ratios = [theirs / ours for theirs, ours in zip(seconds["plain"], seconds[name], strict=True)]
        rows.append(
            {
                "num_draft_tokens": name,
                "drafted": mean,
                "acceptance_rate": alpha,
                "tokens_per_target_call": result.tokens_per_target_call,
                "speedup": statistics.median(ratios),
                "speedup_se": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
                "predicted": speedup(alpha, mean, costs.draft),
                "predicted_with_verification": speedup(alpha, mean, costs.per_draft),
                "seconds": statistics.median(seconds[name]),
                "tokens": result.tokens,
            }
        )
    return statistics.median(seconds["plain"]), rows


def best_num_draft_tokens(alpha: float, costs: Costs, maximum: int = 16) -> int:
    """Return the best number of draft tokens by the formula, including the cost of verification; 0 means none."""
    return optimal_num_draft_tokens(alpha, costs.per_draft, maximum)

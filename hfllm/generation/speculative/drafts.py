"""Sources of drafted tokens, a model, the prompt, or the target's first layers, and how many are drafted.

Shapes: B rows, G drafted tokens, V vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from hfllm.errors import InputError, refuse_if
from hfllm.generation.packed.model import packed_model, unsupported_reason
from hfllm.generation.packed.ragged_model import (
    RaggedModel,
    check_context,
    check_model,
    compiled_forward,
    early_exit,
    ragged_model,
)
from hfllm.generation.speculative.acceptance import Sampler, check_same_vocabulary, optimal_num_draft_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# ---- drafts ----


@dataclass
class Rows:
    """The sequences to continue.

    Attributes:
        tokens: (B, C), each row from column 0 on; entries after its length are undefined.
        lengths: (B,), tokens per row.
        last: (B,), the rows' last allowed positions.
        sizes: the same lengths as Python numbers.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    last: torch.Tensor
    sizes: list[int]

    @property
    def are_level(self) -> bool:
        """Return whether all rows have the same length."""
        return min(self.sizes) == max(self.sizes)


@dataclass
class Proposal:
    """Drafted tokens.

    Attributes:
        tokens: (B, G).
        counts: (B,), their number per row; later entries are ignored.
        probs: (B, G, V), the distributions they were drawn from, or `None` when they were certain.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    probs: torch.Tensor | None = None


class Draft(Protocol):
    """A source of drafted tokens.

    Whether a row gets another token may depend on earlier tokens, never on the new token itself: otherwise samples
    would not follow the target's distribution.
    """

    def cost_ratio(self, target: "PreTrainedModel") -> float:
        """Estimate the time of one drafted token, in runs of the target for one token."""

    def begin(self, target: RaggedModel, rows: Rows, compiled: bool) -> None:
        """Prepare for new prompts. `compiled`: shapes must not change between calls."""

    def propose(self, rows: Rows, steps: int, sampler: Sampler) -> Proposal:
        """Draft up to `steps` tokens (at least 1) per row."""

    def keep(self, index: torch.Tensor) -> None:
        """Drop all rows but these, by their index."""


def weights_read(model: "PreTrainedModel") -> int:
    """Return the number of weights used by one token: all but the embedding, a look-up of rows."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    return sum(parameter.numel() for parameter in model.parameters() if tied or parameter is not embedding)


class ModelDraft:
    """A smaller causal language model with the target's tokenizer (Leviathan et al. 2023, section 2.1).

    Args:
        model: the draft model.

    Raises:
        InputError: when it is no causal model with a key-value cache, or at `begin` when it has too few positions.
    """

    def __init__(self, model: "PreTrainedModel"):
        check_model(model, "the draft model")
        self.model = model

    def cost_ratio(self, target: "PreTrainedModel") -> float:
        return weights_read(self.model) / weights_read(target)

    def begin(self, target: RaggedModel, rows: Rows, compiled: bool) -> None:
        check_same_vocabulary(target.model, self.model)
        check_context(self.model, int(rows.last.max()) + 1, "the draft model")
        # If the target must not pack its weights, neither does the draft.
        packed = target.packed is not None and unsupported_reason(self.model) is None
        self.runner = ragged_model(self.model, target.cache.capacity, compiled, packed)
        self.runner.prefill(rows.tokens[:, : max(rows.sizes)], rows.lengths, rows.last, rows.sizes)

    def propose(self, rows: Rows, steps: int, sampler: Sampler) -> Proposal:
        return draft_by(self.runner, rows, steps, sampler, catch_up=2)

    def keep(self, index: torch.Tensor) -> None:
        self.runner.cache.keep(index)


class _SelfDraft:
    """A draft by the target itself, in part or rounded, over its own cache."""

    runner: RaggedModel

    def propose(self, rows: Rows, steps: int, sampler: Sampler) -> Proposal:
        return draft_by(self.runner, rows, steps, sampler, catch_up=1)

    def keep(self, index: torch.Tensor) -> None:
        """Do nothing: the target drops the rows."""


class EarlyExitDraft(_SelfDraft):
    """Self-speculation: the target's first layers with its own norm and head (Zhang et al. 2024, arXiv:2309.08168).

    It needs no second model and no separate cache: the first layers' cache is the target's.

    Args:
        layers: number of layers; by default half of the target's.
    """

    def __init__(self, layers: int | None = None):
        self.layers = layers

    def cost_ratio(self, target: "PreTrainedModel") -> float:
        return weights_read(self._shortened(target)) / weights_read(target)

    def begin(self, target: RaggedModel, rows: Rows, compiled: bool) -> None:
        model = self._shortened(target.model)
        forward = compiled_forward(model) if compiled else None
        if target.packed:
            forward = target.packed.first(self._count(target.model))
        self.runner = RaggedModel(model, 0, forward, target.cache, compiled)

    def _shortened(self, target: "PreTrainedModel") -> "PreTrainedModel":
        # Return the same object again, to reuse its compiled code.
        if getattr(self, "_exit_of", None) is not target:
            self._exit_of, self._exit = target, early_exit(target, self._count(target))
        return self._exit

    def _count(self, target: "PreTrainedModel") -> int:
        total = target.config.get_text_config(decoder=True).num_hidden_layers
        return max(1, total // 2) if self.layers is None else self.layers


class Int8Draft(_SelfDraft):
    """Self-speculation: the target with its weights rounded to int8, a quarter of the bytes to read per token.

    Like `EarlyExitDraft` it shares the target's cache, so the prompt is read once. It needs no training, and is
    nearly always right; the target must be decoded over packed weights, in float32 on an x86 processor, and large
    enough for decoding to wait for its weights.
    """

    def cost_ratio(self, target: "PreTrainedModel") -> float:
        return 0.3

    def begin(self, target: RaggedModel, rows: Rows, compiled: bool) -> None:
        refuse_if(compiled, "the int8 draft cannot be combined with compile=True: leave that out")
        # It reads the target's cache, where a packed target stores the halves of keys in another order.
        refuse_if(target.packed is None, "the int8 draft cannot be combined with packed=False: leave that out")
        self.runner = RaggedModel(target.model, 0, packed_model(target.model, "int8"), target.cache)


def draft_by(runner: RaggedModel, rows: Rows, steps: int, sampler: Sampler, catch_up: int) -> Proposal:
    """Draft one token after the other with a model.

    Args:
        catch_up: tokens at a row's end that may be missing from the model's cache. The last always is, as is the one
            before it when a whole draft was accepted, since the draft model has not read that token. Reading a token
            again changes nothing.
    """
    width = min(catch_up, min(rows.sizes))
    offsets = torch.arange(-width, 0, device=rows.lengths.device)
    columns = rows.lengths.unsqueeze(1) + offsets
    tokens, drafted, distributions = rows.tokens.gather(1, columns), [], []
    for step in range(steps):
        level = rows.are_level and tokens.shape[1] == 1
        logits = runner(tokens, columns, rows.last, max(rows.sizes) + step, logits=1, level=level)[:, -1]
        token, probs = sampler.draft(logits)
        drafted.append(token)
        distributions.append(probs)
        tokens, columns = token.unsqueeze(1), columns[:, -1:] + 1
    counts = torch.full_like(rows.lengths, steps)
    probs = None if distributions[0] is None else torch.stack(distributions, dim=1)
    return Proposal(torch.stack(drafted, dim=1), counts, probs)


class PromptLookupDraft:
    """Draft the text after an earlier occurrence of the row's last tokens (Saxena 2023, "prompt lookup decoding").

    The longest n-gram wins, then its latest occurrence, in the prompt or the generated text. A draft reaching the
    row's end continues with its own beginning, to follow loops.

    Args:
        max_ngram: the longest n-gram to search for, in tokens.
        min_ngram: the shortest one.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1):
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(
                f"prompt lookup by n-grams of {min_ngram} to {max_ngram} tokens: expected 1 <= min_ngram <= max_ngram"
            )
        self.sizes = range(max_ngram, min_ngram - 1, -1)

    def cost_ratio(self, target: "PreTrainedModel") -> float:
        return 0.0

    def begin(self, target: RaggedModel, rows: Rows, compiled: bool) -> None:
        self.histories: list[list[int]] = [[] for _ in range(len(rows.lengths))]
        # n-gram -> where its latest occurrence ends, except the one at the row's end.
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in self.histories]

    def propose(self, rows: Rows, steps: int, sampler: Sampler) -> Proposal:
        self._read(rows)
        result = [self._continuation(*row, steps) for row in zip(self.histories, self.ends, strict=True)]
        counts = [len(tokens) for tokens in result]
        longest = max(counts)
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in result]
        make = rows.tokens.new_tensor
        return Proposal(make(padded).view(len(result), longest), make(counts))

    def keep(self, index: torch.Tensor) -> None:
        self.histories = [self.histories[row] for row in index.tolist()]
        self.ends = [self.ends[row] for row in index.tolist()]

    def _read(self, rows: Rows) -> None:
        """Read the tokens added since the last call."""
        first = min(map(len, self.histories))
        tokens = rows.tokens[:, first : max(rows.sizes)].tolist()
        for history, positions, new, length in zip(self.histories, self.ends, tokens, rows.sizes, strict=True):
            for token in new[len(history) - first : length - first]:
                end = len(history)
                for size in self.sizes:
                    if end >= size:
                        positions[tuple(history[end - size :])] = end
                history.append(token)

    def _continuation(self, history: list[int], ends: dict[tuple[int, ...], int], steps: int) -> Sequence[int]:
        end = len(history)
        for size in self.sizes:
            at = ends.get(tuple(history[end - size :])) if end >= size else None
            if at is not None:
                period = end - at
                return [history[at + index % period] for index in range(steps)]
        return []


# ---- draft length ----
#
# Choose how many tokens to draft before the target verifies them.


# Assumed cost to verify one more token, in runs of the target for one, if not measured. The arithmetic units of
# an accelerator are idle with a few tokens, a CPU's are not; `measure.measure_costs` measures it.
VERIFICATION_GUESS = {"cpu": 0.1}
VERIFICATION_GUESS_ELSEWHERE = 0.02
# The same with packed weights (`hfllm.generation.packed.model`), per row of the batch.
VERIFICATION_GUESS_PACKED = 0.04


class DraftLength(Protocol):
    """Interface for choosing the number of drafted tokens for a run of the target.

    Attributes:
        maximum: the largest result of `steps`.
    """

    maximum: int

    def steps(self) -> int:
        """Return the number of tokens to draft now."""

    def update(self, accepted: int, tested: int) -> None:
        """Record `accepted` right ones of `tested` drafted tokens.

        Tokens after a rejected one were not tested.
        """


class FixedDraftLength:
    """Always the same number of tokens; 0 means plain decoding."""

    def __init__(self, steps: int):
        refuse_if(steps < 0, f"num_draft_tokens {steps} is below 0: give a number of tokens to draft, or 'adaptive'")
        self.maximum = steps

    def steps(self) -> int:
        return self.maximum

    def update(self, accepted: int, tested: int) -> None:
        pass


class AdaptiveDraftLength:
    """The best number by the paper's formula for the recent acceptance rate (arXiv:2211.17192, section 3.5).

    It depends only on accepted tokens, not on measured times, so a seed gives the same samples again. When
    drafting does not pay, plain decoding continues, with one token drafted at intervals to notice when it does.

    Args:
        cost_ratio: time of a draft step plus the time of verifying one more token, in runs of the target for one
            token.
        minimum: the fewest tokens to draft.
        maximum: the most tokens to draft.
        memory: runs of the target after which an observation counts for 1/e of a new one.
        first_guess: initial acceptance rate, with the weight of one run.
        probe_every: runs between the single drafts when drafting does not pay.
    """

    def __init__(
        self,
        cost_ratio: float,
        minimum: int = 0,
        maximum: int = 12,
        memory: float = 16.0,
        first_guess: float = 0.7,
        probe_every: int = 12,
    ):
        if not 0 <= minimum <= maximum:
            raise InputError(
                f"draft tokens from {minimum} to {maximum}: the minimum must lie between 0 and the maximum"
            )
        refuse_if(cost_ratio < 0, f"cost_ratio {cost_ratio} is below 0: it is a ratio of two times")
        self.cost_ratio, self.minimum, self.maximum = cost_ratio, minimum, maximum
        self.decay, self.probe_every = 1 - 1 / memory, probe_every
        self.accepted, self.tested, self.idle = 4 * first_guess, 4.0, 0

    @property
    def alpha(self) -> float:
        """Return the recent acceptance rate."""
        return min(self.accepted / self.tested, 1.0)

    def steps(self) -> int:
        best = max(self.minimum, optimal_num_draft_tokens(self.alpha, self.cost_ratio, self.maximum))
        self.idle = 0 if best else self.idle + 1
        return min(1, self.maximum) if self.idle and self.idle % self.probe_every == 0 else best

    def update(self, accepted: int, tested: int) -> None:
        if tested:
            self.accepted = self.decay * self.accepted + accepted
            self.tested = self.decay * self.tested + tested


def as_draft_length(
    num_draft_tokens: "int | str | DraftLength", draft_cost: float, device: str = "cpu", packed_rows: int | None = None
) -> DraftLength:
    """Convert a number, `"adaptive"` or a `DraftLength` to a `DraftLength`.

    Args:
        draft_cost: time of a draft step in runs of the target; the verification time is estimated.
        device: the target's device type.
        packed_rows: rows of the batch if the target's weights are packed.

    Raises:
        InputError: for anything else.
    """
    if num_draft_tokens == "adaptive":
        verification = VERIFICATION_GUESS.get(device, VERIFICATION_GUESS_ELSEWHERE)
        if packed_rows is not None and device == "cpu":
            verification = VERIFICATION_GUESS_PACKED * packed_rows
        return AdaptiveDraftLength(draft_cost + verification)
    if isinstance(num_draft_tokens, int) and not isinstance(num_draft_tokens, bool):
        return FixedDraftLength(num_draft_tokens)
    if isinstance(num_draft_tokens, str) or not hasattr(num_draft_tokens, "steps"):
        raise InputError(
            f"num_draft_tokens {num_draft_tokens!r}: expected a number of tokens, 'adaptive' or a DraftLength"
        )
    return num_draft_tokens

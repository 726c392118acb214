"""Plain decoding over a ragged cache: a run of the model gives each running row one token.

Equal prompts, as several samples of a prompt are, are read once. While prompts wait, they take the places of ended
rows in the cache (continuous batching: Yu et al. 2022, "Orca", OSDI, section 3.1), once the rows computed for nothing
add up to one full run of the model. When none waits any more, ended rows leave the batch once the rows
computed in vain since the last time are as many as the ones that stay: dropping rows copies their cache, so this costs
at most twice what the best moments would.

Shapes: N prompts, B rows of the cache, S tokens of the longest prompt, R new tokens, E hidden_size, V vocabulary size.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch

from hfllm.generation.packed.model import RaggedCache
from hfllm.generation.packed.ragged_model import RaggedModel

# Takes the prompts (B,) of the rows of a cache that some of them leave now: it holds them until the call returns.
Leave = Callable[[torch.Tensor, RaggedCache], None]


class Draw(Protocol):
    """A function that chooses the next tokens."""

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return a token (B,) for each row.

        Args:
            logits: (B, V).
            rows: (B,), the prompts of the rows.
            steps: (B,), the indices of the tokens among the new ones of their rows; up to R where prompts wait.
        """


class Observer(Protocol):
    """A function called for every drawn token, also of rows that have ended."""

    def __call__(
        self,
        steps: torch.Tensor,
        rows: torch.Tensor,
        logits: torch.Tensor,
        states: torch.Tensor | None,
        tokens: torch.Tensor,
    ) -> None:
        """Note the tokens of a step.

        Args:
            steps: (B,), the indices of the tokens among the new ones of their rows; up to R where prompts wait.
            rows: (B,), the prompts of the rows.
            logits: (B, V), from which the tokens were drawn.
            states: (B, E), the input of the head; `None` if the model was not asked for them.
            tokens: (B,).
        """


class Continuations(NamedTuple):
    """The new tokens of all prompts.

    Args:
        tokens: (B, R), padded on the right.
        lengths: (B,), with the end token.
        has_ended: (B,), whether the last token is an end token.
        running: rows that got a token, for each run of the model.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    has_ended: torch.Tensor
    running: list[int]


@torch.no_grad()
def continue_prompts(
    target: RaggedModel,
    prompts: torch.Tensor,
    sizes: Sequence[int],
    draw: Draw,
    max_new_tokens: int,
    end_token_ids: Collection[int],
    pad_token_id: int,
    observe: Observer | None = None,
    known: Sequence[int] | None = None,
    leave: Leave | None = None,
    most_rows: int | None = None,
) -> Continuations:
    """Continue prompts until each has an end token, or `max_new_tokens` new ones.

    Args:
        target: the model, its cache of at least the longest prompt's and the new tokens' columns.
        prompts: (N, S), padded on the right.
        sizes: tokens of each prompt.
        pad_token_id: after the end of a response.
        known: tokens of each prompt that the cache has already; by default it is empty.
        leave: called with the rows that leave the cache.
        most_rows: rows of the cache; more prompts wait for a place. By default, and with `known` or `leave`, which go
            by the cache's rows, all have one.
    """
    places = most_rows if known is None and leave is None else None
    batch = _Batch(target, prompts, sizes, max_new_tokens, known, places)
    ends, running = prompts.new_tensor(sorted(end_token_ids)), []
    # Ended rows go on writing behind their end, at most into this extra column; both are cut below.
    tokens = prompts.new_full((len(sizes), max_new_tokens + 1), pad_token_id)
    counts = prompts.new_full((len(sizes),), max_new_tokens)
    while True:
        rows, steps = batch.rows, batch.steps
        drawn = draw(batch.logits, rows, steps)
        if observe is not None:
            observe(steps, rows, batch.logits, None if target.states is None else target.states[:, -1], drawn)
        running.append(batch.remaining)
        tokens[rows, steps] = drawn
        now_ended = torch.isin(drawn, ends).logical_or_(steps == max_new_tokens - 1).logical_and_(batch.is_running)
        if now_ended.any():
            counts[rows[now_ended]] = steps[now_ended] + 1
            batch.end(now_ended)
        if not batch.remaining and not batch.waiting:
            break
        drawn = batch.drop(drawn, leave)
        # When all have ended together, and each place is taken again, there is nothing to run.
        if batch.remaining or batch.waiting < len(rows):
            batch.run(drawn)
        batch.fill()
    if leave is not None:
        leave(batch.rows, target.cache)
    width = int(counts.max())
    is_after = torch.arange(width, device=tokens.device) >= counts.unsqueeze(1)
    tokens = tokens[:, :width].masked_fill_(is_after, pad_token_id)
    has_ended = torch.isin(tokens.gather(1, counts.unsqueeze(1) - 1).squeeze(1), ends)
    return Continuations(tokens, counts, has_ended, running)


class _Batch:
    """The rows of a cache, and the prompts that wait for a place in it; for the arguments see `continue_prompts`.

    Attributes:
        rows: (B,), their prompts.
        steps: (B,), new tokens of each, R at most.
        is_running, remaining: which have not ended (B,), and how many.
        waiting: prompts without a place yet, the last ones.
        logits: (B, V), of each row's next token.
    """

    def __init__(
        self,
        target: RaggedModel,
        prompts: torch.Tensor,
        sizes: Sequence[int],
        max_new_tokens: int,
        known: Sequence[int] | None,
        most_rows: int | None,
    ):
        self.target, self.prompts, self.sizes, self.max_new_tokens = target, prompts, sizes, max_new_tokens
        self.lengths = prompts.new_tensor(sizes)
        first = len(sizes) if most_rows is None else min(most_rows, len(sizes))
        self.waiting, self.in_vain = len(sizes) - first, 0
        self.rows = torch.arange(first, device=prompts.device)
        self.steps, self.is_running = torch.zeros_like(self.rows), torch.ones_like(self.rows, dtype=torch.bool)
        self.remaining = first
        lengths = self.lengths[:first]
        self.columns, self.last = lengths.unsqueeze(1), lengths + max_new_tokens - 1
        self.longest, self.is_level = max(sizes[:first]), min(sizes[:first]) == max(sizes[:first])
        self.logits = _read(target, prompts[:first, : self.longest], lengths, self.last, sizes[:first], known)

    def end(self, now_ended: torch.Tensor) -> None:
        """Note the rows (B,) that have ended."""
        self.is_running &= ~now_ended
        self.remaining = int(self.is_running.sum())

    def drop(self, drawn: torch.Tensor, leave: Leave | None) -> torch.Tensor:
        """Drop ended rows where none waits and it pays; return the drawn tokens of those that stay."""
        self.in_vain += len(self.rows) - self.remaining
        if self.waiting or self.in_vain < self.remaining or self.target.static:
            return drawn
        index, self.in_vain = self.is_running.nonzero().squeeze(1), 0
        if leave is not None:
            leave(self.rows, self.target.cache)
        self.target.cache.keep(index)
        for name in ("rows", "steps", "columns", "last", "is_running"):
            setattr(self, name, getattr(self, name)[index])
        self._look()
        return drawn[index]

    def run(self, drawn: torch.Tensor) -> None:
        """Give the model each row's drawn token (B,)."""
        cache = self.target.cache
        self.longest = min(self.longest + 1, cache.capacity)
        output = self.target(drawn.unsqueeze(1), self.columns, self.last, self.longest, level=self.is_level)
        # The cache has no column after a row's last.
        self.columns = (self.columns + 1).minimum(self.last.unsqueeze(1))
        self.steps = (self.steps + 1).clamp(max=self.max_new_tokens)
        self.logits = output[:, -1]

    def fill(self) -> None:
        """Let prompts that wait take the places of ended rows, if it pays."""
        if not self.waiting or (self.remaining and self.in_vain < len(self.rows)):
            return
        places = (~self.is_running).nonzero().squeeze(1)[: self.waiting]
        begin = len(self.sizes) - self.waiting
        new, sizes = slice(begin, begin + len(places)), self.sizes[begin : begin + len(places)]
        self.waiting, self.in_vain, self.remaining = self.waiting - len(places), 0, self.remaining + len(places)
        lengths, target = self.lengths[new], self.target
        self.rows = self.rows.index_copy(0, places, torch.arange(begin, begin + len(places), device=places.device))
        self.steps[places], self.is_running[places] = 0, True
        self.columns[places], self.last[places] = lengths.unsqueeze(1), lengths + self.max_new_tokens - 1
        cache, states = target.cache, target.states
        target.cache = RaggedCache(len(cache.layers), max(sizes))
        logits = _read(target, self.prompts[new, : max(sizes)], lengths, self.last[places], sizes, None)
        cache.put(places, target.cache)
        self.logits = self.logits.index_copy(0, places, logits)
        target.cache, target.states = cache, None if states is None else states.index_copy(0, places, target.states)
        self._look()

    def _look(self) -> None:
        """Note the longest row, and whether all are: rows have come, or left."""
        spread = self.columns.aminmax()
        self.longest, self.is_level = int(spread.max), bool(spread.min == spread.max)


def _read(
    target: RaggedModel,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    last: torch.Tensor,
    sizes: Sequence[int],
    known: Sequence[int] | None,
) -> torch.Tensor:
    """Read prompts into the cache, or what it does not know of them, equal ones once; return logits (B, V)."""
    if known is not None:
        counts = [size - own for size, own in zip(sizes, known, strict=True)]
        return target.read_more(prompts, lengths, last, counts)[:, -1]
    first: dict[tuple[int, ...], int] = {}
    texts = [tuple(row[:size]) for row, size in zip(prompts.tolist(), sizes, strict=True)]
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    if len(first) == len(texts):
        return target.prefill(prompts, lengths, last, sizes)[:, -1]
    number = {text: at for at, text in enumerate(first)}
    index, source = (prompts.new_tensor(each) for each in (list(first.values()), [number[text] for text in texts]))
    own_sizes = [sizes[row] for row in first.values()]
    logits = target.prefill(prompts[index], lengths[index], last[index], own_sizes)[:, -1]
    target.cache.keep(source)
    if target.states is not None:
        target.states = target.states[source]
    return logits[source]

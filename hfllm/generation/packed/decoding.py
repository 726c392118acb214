"""Plain decoding over a ragged cache: a run of the model gives each running row one token.

Equal prompts, as several samples of a prompt are, are read once. An ended row leaves the batch when the
rows computed in vain since the last time are as many as the ones that stay: dropping rows copies their cache, so this
costs at most twice what the best moments would.

Shapes: B rows, S tokens of the longest prompt, R new tokens, E hidden_size, V vocabulary size.
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

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Return a token (B,) for each row.

        Args:
            logits: (B, V).
            rows: (B,), the prompts of the rows.
            step: the index of the tokens among the new ones.
        """


class Observer(Protocol):
    """A function called for every drawn token, before it is known whether its row has ended before."""

    def __call__(
        self, step: int, rows: torch.Tensor, logits: torch.Tensor, states: torch.Tensor | None, tokens: torch.Tensor
    ) -> None:
        """Note the tokens of a step.

        Args:
            step: the index of the tokens among the new ones.
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
) -> Continuations:
    """Continue prompts until each has an end token, or `max_new_tokens` new ones.

    Args:
        target: the model, its cache of at least the longest prompt's and the new tokens' columns.
        prompts: (B, S), padded on the right.
        sizes: tokens of each prompt.
        pad_token_id: after the end of a response.
        known: tokens of each prompt that the cache has already; by default it is empty.
        leave: called with the rows that leave the cache.
    """
    device = prompts.device
    rows, ends = torch.arange(len(sizes), device=device), prompts.new_tensor(sorted(end_token_ids))
    lengths, counts = prompts.new_tensor(sizes), prompts.new_full((len(sizes),), max_new_tokens)
    tokens = prompts.new_full((len(sizes), max_new_tokens), pad_token_id)
    is_running = torch.ones_like(rows, dtype=torch.bool)
    last, longest, is_level = lengths + max_new_tokens - 1, max(sizes), min(sizes) == max(sizes)
    logits = _read(target, prompts[:, :longest], lengths, last, sizes, known)
    columns, in_vain, running, remaining = lengths.unsqueeze(1), 0, [], len(sizes)
    for step in range(max_new_tokens):
        drawn = draw(logits, rows, step)
        if observe is not None:
            observe(step, rows, logits, None if target.states is None else target.states[:, -1], drawn)
        running.append(remaining)
        now_ended = torch.isin(drawn, ends).logical_and_(is_running)
        tokens[rows, step] = drawn
        if now_ended.any():
            counts[rows[now_ended]] = step + 1
            is_running &= ~now_ended
            remaining = int(is_running.sum())
        if not remaining or step + 1 == max_new_tokens:
            break
        in_vain += len(rows) - remaining
        if in_vain >= remaining and not target.static:
            index, in_vain = is_running.nonzero().squeeze(1), 0
            if leave is not None:
                leave(rows, target.cache)
            target.cache.keep(index)
            rows, drawn, columns, last, is_running = (each[index] for each in (rows, drawn, columns, last, is_running))
            # Rows that have left may have been the longest ones.
            spread = columns.aminmax()
            longest, is_level = int(spread.max), bool(spread.min == spread.max)
        longest += 1
        logits = target(drawn.unsqueeze(1), columns, last, longest, level=is_level)[:, -1]
        columns = columns + 1
    if leave is not None:
        leave(rows, target.cache)
    width = int(counts.max())
    tokens = tokens[:, :width].masked_fill_(torch.arange(width, device=device) >= counts.unsqueeze(1), pad_token_id)
    has_ended = torch.isin(tokens.gather(1, counts.unsqueeze(1) - 1).squeeze(1), ends)
    return Continuations(tokens, counts, has_ended, running)


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

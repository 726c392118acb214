"""Long texts: whether a model finds one sentence at any depth, and the gain from a memory across segments.

The sentence says the color of somebody's thing; at the end the same sentence begins again, and the model's most likely
color is taken as its answer. Nothing has to be written or followed, so base models can do it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from hfllm.data.packing import start_of
from hfllm.data.world.vocabulary import COLOURS, PEOPLE, THINGS
from hfllm.errors import InputError, refuse_if
from hfllm.outputs.progress import progress

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from hfllm.outputs.report import Heatmap


# ---- one sentence at any depth ----


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE = "{person} has a {colour} {thing}."
QUESTION = "The {thing} of {person} is"
# Tokens of one forward pass.
BATCH_TOKENS = 16384


@dataclass(frozen=True)
class NeedleGrid:
    """The share of needles found, by length of the text and depth of the needle.

    Args:
        lengths: tokens of the texts.
        depths: 0 is the beginning of the text, 1 its end.
        right: (lengths, depths, cases) of 0 or 1.
        chance: the share found by guessing.
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    right: Sequence[Sequence[Sequence[int]]]
    chance: float

    def share(self, length: int | None = None) -> list[float]:
        """Return 0 or 1 of every case, of one length or of all."""
        rows = self.right if length is None else [self.right[list(self.lengths).index(length)]]
        return [float(each) for row in rows for cell in row for each in cell]

    def rows(self) -> list[dict[str, float]]:
        """Return the table: a row for each length, a column for each depth."""
        return [
            {
                "tokens": length,
                **{f"depth {depth:g}": _mean(cell) for depth, cell in zip(self.depths, row, strict=True)},
            }
            for length, row in zip(self.lengths, self.right, strict=True)
        ]

    def heatmap(self, title: str) -> "Heatmap":
        """Return the plot of these shares."""
        from hfllm.outputs.report import Heatmap

        return Heatmap(
            title=f"{title} (chance {self.chance:.2f})",
            xlabel="depth of the needle",
            ylabel="tokens",
            rows=[str(length) for length in self.lengths],
            columns=[f"{depth:g}" for depth in self.depths],
            values=[[_mean(cell) for cell in row] for row in self.right],
            lowest=0.0,
            highest=1.0,
        )


def _mean(cell: Sequence[int]) -> float:
    return sum(cell) / max(1, len(cell))


def find_needles(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[Sequence[int]],
    lengths: Sequence[int],
    cases: int = 8,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> NeedleGrid:
    """Ask for `cases` needles at each length and depth. The same seed gives the same questions to every model.

    Args:
        filler: rows of tokens, each at least as long as the longest text.
        lengths: tokens of the texts, needle and question included.
        depths: shares of the text before the needle.

    Raises:
        InputError: when a length has no room for a needle, or the tokenizer writes no two colors differently.
    """
    import torch

    from hfllm.generation.scoring import evaluating

    shared, answers = first_tokens(tokenizer)
    rng, right = random.Random(f"needle-{seed}"), []
    with evaluating(model), torch.inference_mode():
        for length in progress(lengths):
            row = []
            for depth in depths:
                drawn = [_case(tokenizer, filler, length, depth, list(answers), shared, rng) for _ in range(cases)]
                ids = torch.tensor([ids for ids, _ in drawn], device=model.device)
                parts = ids.split(max(1, BATCH_TOKENS // length))
                logits = torch.cat(
                    [model(input_ids=each, use_cache=False, logits_to_keep=1).logits[:, -1] for each in parts]
                )
                chosen = logits[:, list(answers.values())].argmax(-1).tolist()
                names = list(answers)
                row.append([int(names[pick] == colour) for pick, (_, colour) in zip(chosen, drawn, strict=True)])
            right.append(row)
    return NeedleGrid(list(lengths), list(depths), right, 1 / len(answers))


def first_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], dict[str, int]]:
    """Return the common first tokens of all colors after a word, such as a space, and each color's next token.

    Of colors with the same next token only the first is taken.

    Raises:
        InputError: when there are fewer than two.
    """
    tails: dict[str, list[int]] = {}
    for colour in COLOURS:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("is", f"is {colour}"))
        if after[: len(before)] == before:
            tails[colour] = after[len(before) :]
    shared = [tokens[0] for tokens in takewhile(lambda each: len({*each}) == 1, zip(*tails.values(), strict=False))]
    result: dict[int, str] = {}
    for colour, tail in tails.items():
        if len(tail) > len(shared):
            result.setdefault(tail[len(shared)], colour)
    refuse_if(len(result) < 2, "the needle test cannot be done: the tokenizer writes all colors with the same tokens")
    return shared, {colour: token for token, colour in result.items()}


def _case(
    tokenizer: "PreTrainedTokenizerBase",
    filler: Sequence[Sequence[int]],
    length: int,
    depth: float,
    colours: Sequence[str],
    shared: Sequence[int],
    rng: random.Random,
) -> tuple[list[int], str]:
    """Return the tokens of a text with its question, and the answer."""
    person, thing, colour = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(colours)
    words = {"person": person, "thing": thing, "colour": colour}
    needle = tokenizer(f" {NEEDLE.format(**words)} ", add_special_tokens=False)["input_ids"]
    question = [*tokenizer(f" {QUESTION.format(**words)}", add_special_tokens=False)["input_ids"], *shared]
    start, row = start_of(tokenizer), rng.choice(filler)
    row = row[len(start) :] if row[: len(start)] == start else row
    needed = len(start) + len(needle) + len(question)
    room = length - needed
    refuse_if(room < 1, f"the needle test needs more than {needed} tokens, got {length}")
    begin = rng.randrange(len(row) - room + 1)
    hay, index = list(row[begin : begin + room]), round(depth * room)
    return [*start, *hay[:index], *needle, *hay[index:], *question], colour


# ---- segments ----
#
# How much a model gains from earlier text: a long document, piece by piece, with and without a memory.


def nats_by_segment(
    model: "PreTrainedModel",
    ids: "torch.Tensor",
    segment_length: int,
    memory_length: int | None = None,
    cache: "Cache | None" = None,
) -> "torch.Tensor":
    """Return minus the log-probability of all tokens but the first, (B, S - 1), in nats.

    Args:
        ids: (B, S), a long document per row, read in pieces. The first token of a piece is predicted from the
            piece before, in each case.
        segment_length: tokens of a piece, at least 2.
        memory_length: of `SegmentMemory`; `None` reads every piece as if nothing had been before, the control.
        cache: another cache to read with, such as a `SinkCache`, in place of a memory.

    Raises:
        InputError: for invalid sizes.
    """
    import torch

    from hfllm.generation.caches import SegmentMemory
    from hfllm.generation.scoring import evaluating

    if segment_length < 2 or ids.shape[1] < 2:
        raise InputError(f"segment_length={segment_length} and {ids.shape[1]} tokens: expected at least 2 of each")
    memory = cache if memory_length is None else SegmentMemory(model, memory_length)
    result, last = [], None
    with evaluating(model), torch.inference_mode():
        for piece in ids.split(segment_length, dim=1):
            cache_options = {"use_cache": False} if memory is None else {"cache": memory, "use_cache": True}
            logits = model(input_ids=piece, **cache_options).logits.float()
            before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], dim=1)
            targets = piece[:, 1:] if last is None else piece
            losses = torch.nn.functional.cross_entropy(before.flatten(0, 1), targets.flatten(), reduction="none")
            result.append(losses.view_as(targets).cpu())
            last = logits[:, -1:]
    return torch.cat(result, dim=1)


def streams(ids: "torch.Tensor", batch: int, segment_length: int) -> "torch.Tensor":
    """Return the batches of a training with memory, (steps, batch, segment_length): row b goes on in the next batch.

    Args:
        ids: (S,), one long text; its end is cut.

    Raises:
        InputError: when it is shorter than one batch.
    """
    steps = len(ids) // (batch * segment_length)
    refuse_if(steps < 1, f"{len(ids)} tokens are fewer than {batch} rows of {segment_length}")
    rows = ids[: batch * steps * segment_length].view(batch, steps, segment_length)
    return rows.transpose(0, 1).contiguous()

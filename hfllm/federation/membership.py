"""What a trained model gives away about rows: canaries, random texts of which some were trained on and others not.

Carlini et al. 2019, "The Secret Sharer" (arXiv:1802.08232): the exposure of a canary is log2 of the number of possible
texts, less log2 of its rank among them by loss; here among those that were drawn and not trained on. A membership test
that looks at losses alone (Yeom et al. 2018, arXiv:1709.01604) has the area under its ROC curve as figure: 1/2 where
nothing can be told, which is also what a model shows that was trained on none of them: the control.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hfllm.errors import InputError
from hfllm.outputs.calibration import Interval, as_numbers, auroc_interval

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Canaries:
    """Random texts, drawn alike: those that one organisation trains on, and those that nobody does."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Leak:
    """What losses of canaries show.

    Args:
        auroc: of telling trained ones from held-out ones by lower loss, with its interval.
        exposure: mean over trained ones, in bits.
        most_exposure: of one that has a lower loss than all that were held out.
        no_exposure: mean exposure of a model that learned nothing of them.
    """

    auroc: Interval
    exposure: float
    most_exposure: float
    no_exposure: float


def make_canaries(trained: int, held_out: int, seed: int, length: int = 12, alphabet: str = LETTERS) -> Canaries:
    """Return distinct random texts, of which a seed always draws the same.

    Args:
        trained: number of texts to insert into the rows of an organisation.
        held_out: number of others, for the comparison.
        length: characters, in groups of four.
    """
    rng, texts = random.Random(f"canaries {seed}"), set()
    if trained < 1 or held_out < 1 or length < 1 or len(alphabet) ** length < 4 * (trained + held_out):
        raise InputError(
            f"canaries: {trained} trained and {held_out} held out, of {length} characters; expected 1 or more of "
            "each, and texts long enough to be rare"
        )
    ordered: list[str] = []
    while len(ordered) < trained + held_out:
        drawn = "".join(rng.choices(alphabet, k=length))
        text = " ".join(drawn[start : start + 4] for start in range(0, length, 4))
        if text not in texts:
            texts.add(text)
            ordered.append(text)
    return Canaries(tuple(ordered[:trained]), tuple(ordered[trained:]))


def measure_leak(trained: Sequence[float], held_out: Sequence[float], level: float = 0.95) -> Leak:
    """Return what the losses of canaries show.

    Args:
        trained: loss of each canary that was trained on; the same sum or mean for all.
        held_out: of each that was not.
        level: of the interval.

    Raises:
        InputError: for no losses, and NaN.
    """
    inside, outside = (
        as_numbers(trained, "losses of trained canaries"),
        as_numbers(held_out, "losses of held-out ones"),
    )
    losses = [*inside.tolist(), *outside.tolist()]
    labels = [0] * len(inside) + [1] * len(outside)
    count = len(outside)
    # The canary itself is one of those that it is ranked among; a tie counts half.
    ranks = [1 + float((outside < loss).sum()) + 0.5 * float((outside == loss).sum()) for loss in inside]
    exposures = [math.log2(count + 1) - math.log2(rank) for rank in ranks]
    chance = sum(math.log2(count + 1) - math.log2(rank) for rank in range(1, count + 2)) / (count + 1)
    return Leak(auroc_interval(losses, labels, level), sum(exposures) / len(exposures), math.log2(count + 1), chance)

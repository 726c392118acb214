"""Row-level differential privacy at an organisation: DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

It is meant for rows where organisations are too few for client-level privacy (`privacy`), and acts before the server
sees anything. Each step draws each row by chance of its own (Poisson sampling), which the accountant's bound needs;
each row's gradient is cut to norm C, and their sum gets Gaussian noise of standard deviation z C. It is divided by the
number of rows that a step *expects*: the number that was drawn, and the tokens of a batch, are data too.

Gradients by row are taken one row at a time: as slow as batches of one, right for every model whose rows do not mix.
Draws and noise are of the operating system's entropy. How long a step takes is not hidden.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hfllm.errors import InputError
from hfllm.federation.accountant import check_noise
from hfllm.federation.privacy import check_clip_norm, normal
from hfllm.federation.rounds import replace_tensors


@dataclass(frozen=True)
class RowPrivacy:
    """How rows are protected.

    Args:
        clip_norm: C, the longest gradient of a row over all tensors together.
        noise_multiplier: z; 0 clips alone.
        generator, rng: of tests and measurements; by default the operating system draws. A known seed takes the
            privacy away.

    Raises:
        InputError: for numbers out of range.
    """

    clip_norm: float
    noise_multiplier: float
    generator: torch.Generator | None = None
    rng: random.Random | None = None

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm, "row_clip_norm")
        check_noise(self.noise_multiplier, "row_noise_multiplier")

    def draw(self, num_rows: int, batch_size: int) -> list[int]:
        """Return the rows of a step: each by the chance `sampling_rate`, independently; maybe none."""
        rate, rng = sampling_rate(num_rows, batch_size), self.rng or random.SystemRandom()
        return [place for place in range(num_rows) if rng.random() < rate]


def sampling_rate(num_rows: int, batch_size: int) -> float:
    """Return the chance of each row to be in a step, of which `batch_size` rows are expected."""
    return min(1.0, batch_size / num_rows)


class RowSum:
    """Sum of the gradients of single rows of one step, each cut to a norm.

    Args:
        parameters: what is trained; their `grad` is read, cleared and in the end set.
        privacy: the norm and the noise.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], privacy: RowPrivacy):
        self.parameters, self.privacy = list(parameters), privacy
        # Apple's GPUs have no float64.
        devices = ["cpu" if each.device.type == "mps" else each.device for each in self.parameters]
        self._sums = [
            torch.zeros(each.shape, dtype=torch.float64, device=device)
            for each, device in zip(self.parameters, devices, strict=True)
        ]
        for each in self.parameters:
            # What a step that failed has left is another row's.
            each.grad = None

    @torch.no_grad()
    def take(self) -> None:
        """Add the gradient that the parameters hold, which is of one row, and clear it.

        One with infinite values or NaN adds nothing: it must not reach the others.
        """
        gradients = [
            None if each.grad is None else each.grad.to(total.device).double()
            for each, total in zip(self.parameters, self._sums, strict=True)
        ]
        squares = [value.square().sum() for value in gradients if value is not None]
        length = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        if 0 < length < float("inf"):
            factor = min(1.0, self.privacy.clip_norm / length)
            for total, value in zip(self._sums, gradients, strict=True):
                if value is not None:
                    total.add_(value, alpha=factor)
        for each in self.parameters:
            each.grad = None

    @torch.no_grad()
    def set_gradient(self, expected: float) -> None:
        """Set the parameters' gradient to the noisy sum over the rows that a step expects."""
        deviation = self.privacy.noise_multiplier * self.privacy.clip_norm
        for each, total in zip(self.parameters, self._sums, strict=True):
            noise = deviation * normal(each.shape, self.privacy.generator).to(total) if deviation else 0.0
            each.grad = ((total + noise) / expected).to(each)


class AnsweredRounds:
    """The last change that an organisation sent, in a file: a round is answered once, or again by the same bits.

    A round that is trained again has new noise: who sees both answers has less of it than the accountant counts.

    Args:
        path: of the file.
        num_rounds: those that were counted.
        settings: what their privacy was counted by, such as a hash of the flags and of the number of rows; rounds
            under others are refused.
    """

    def __init__(self, path: Path, num_rounds: int, settings: str = ""):
        self.path, self.num_rounds, self.settings = path, num_rounds, settings

    def load(self, number: int, question: str) -> dict[str, Tensor] | None:
        """Return the answer to a round that was answered, `None` for one that may be.

        Args:
            number: of the round.
            question: what the answer depends on, such as a hash of the weights and the settings.

        Raises:
            InputError: for a round that is not counted, or was answered to another question.
        """
        if not 1 <= number <= self.num_rounds:
            raise InputError(f"round {number}: the privacy of {self.num_rounds} rounds was counted, not of this one")
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as stream:
                known = json.loads((stream.metadata() or {})["answered"])
                answer = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            last, asked, settings = int(known["round"]), known["question"], known["settings"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path} is damaged ({' '.join(str(error).split())[:100]}), so that it is not known which rounds "
                "were answered: remove it to spend the privacy of a run anew"
            ) from None
        if number > last and settings == self.settings:
            return None
        if number == last and question == asked:
            return answer
        raise InputError(
            f"round {number}: round {last} was answered to other weights or settings, and a second answer would spend "
            f"privacy that is not counted; remove {self.path} to begin another run, whose privacy adds to this one's"
        )

    def keep(self, number: int, question: str, answer: Mapping[str, Tensor]) -> None:
        """Keep the answer to a round, before it is sent."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = {"round": number, "question": question, "settings": self.settings}
        replace_tensors(self.path, answer, {"answered": json.dumps(known)})

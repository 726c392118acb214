"""What a method must beat to be shown: the same model with random weights, and plants whose layer is known."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hfllm.evaluation.interpreting.hooks import Parts, parts_of
from hfllm.outputs.report import NOISE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A method is left out when random weights score at least this share of what the model's do, both above chance.
MOST_BY_CHANCE = 0.5
OWN_SEED = 7_000_000


def random_parts(parts: Parts, seed: int = 0) -> Parts:
    """Return the parts of a model of the same class and config that has learned nothing, on the same device."""
    from hfllm.models.devices import forked_random

    config = copy.deepcopy(parts.model.config)
    if getattr(config, "quantization_config", None) is not None:
        # Of the stored weights; new ones are of full precision.
        del config.quantization_config
    with forked_random(torch.device("cpu")):
        # Not the seed that a user's own model is likely to be made with.
        torch.manual_seed(OWN_SEED + seed)
        model: PreTrainedModel = type(parts.model)(config)
    return parts_of(model.to(parts.model.device, parts.model.dtype).eval())


@dataclass(frozen=True)
class Verdict:
    """Whether a method's figures say something of what a model has learned.

    Args:
        score, control: the mean of the method's score for the model, and for random weights.
        chance: what a method that sees nothing scores.
        found, plants: how many planted edits it has found, and of how many; 0 of 0 for one that names no place.
        error: the standard error of `score`, twice of which it must be above chance.
    """

    score: float
    control: float
    chance: float = 0.0
    found: int = 0
    plants: int = 0
    error: float = 0.0

    @property
    def left_out(self) -> str:
        """Why the method is not shown; empty where it is."""
        if self.found < self.plants:
            return f"it finds {self.found} of {self.plants} planted edits"
        above, by_chance = self.score - self.chance, self.control - self.chance
        if above <= NOISE * self.error or by_chance >= MOST_BY_CHANCE * above:
            return (
                f"it scores {self.control:.2f} on random weights and {self.score:.2f} on this model "
                f"(chance {self.chance:.2f}, error {self.error:.2f})"
            )
        return ""

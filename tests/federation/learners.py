"""Organisations of the tests: least squares, whose gradient is known in closed form."""

import os
import time

import torch
from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.updates import Update, changes

BASE = "0" * 64


def rows_of(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Inputs (count, 3) and targets (count,) of an organisation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator).double(), torch.randn(count, generator=generator).double()


def make_learner(organisation: str, settings: dict):
    """A learner that descends `steps` times on the mean square, or fails as `fault` says."""

    def learn(round: int, weights: dict[str, Tensor]) -> Update:
        fault = settings.get("fault") if round == settings.get("fault_round", round) else None
        print("what a learner prints is no answer", flush=True)
        if fault == "killed":
            os.kill(os.getpid(), 9)
        if fault == "late":
            time.sleep(60)
        if fault == "refused":
            raise InputError(f"organisation {organisation!r} has no rows")
        if fault == "wrong":
            raise ValueError("the row of Mrs. Miller is broken")
        inputs, targets = rows_of(settings["seed"], settings["count"])
        trained = {name: value.clone() for name, value in weights.items()}
        for _ in range(settings.get("steps", 1)):
            residual = inputs @ trained["w"][0].double() + trained["b"].double() - targets
            trained["w"] = trained["w"] - 0.1 * (2 * residual @ inputs / len(targets)).to(trained["w"].dtype)
            trained["b"] = trained["b"] - 0.1 * 2 * residual.mean().to(trained["b"].dtype)
        moved = changes(trained, weights)
        counts = (settings["count"], settings["count"])
        return Update(organisation, moved, *counts, settings.get("base", BASE), settings.get("answers"))

    return learn

"""Optimizers of the server, for which the organisations' mean change stands in place of a gradient.

Reddi et al. 2020, "Adaptive Federated Optimization" (arXiv:2003.00295), algorithm 2: with the mean change D and the
momentum m = b1 m + (1 - b1) D, the weights move by lr m / (sqrt(v) + tau), where v begins at tau squared and is

    FedAdagrad   v + D^2
    FedAdam      b2 v + (1 - b2) D^2
    FedYogi      v - (1 - b2) D^2 sign(v - D^2)

There is no correction of the first rounds' bias. FedAvg moves by lr D, `momentum` by lr m with m = b1 m + D (Hsu et
al. 2019, arXiv:1909.06335).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hfllm.errors import InputError

NAMES = ("fedavg", "momentum", "fedadagrad", "fedadam", "fedyogi")
# Rate that is used where none is given: an average is taken as it is, adaptive steps have the size of the rate.
LEARNING_RATES = {"fedavg": 1.0, "momentum": 1.0, "fedadagrad": 0.01, "fedadam": 0.01, "fedyogi": 0.01}


class ServerOptimizer:
    """Moves the common weights by the mean change of a round; see `server_optimizer`, which checks the settings.

    Args:
        name: one of `NAMES`.
        learning_rate: factor of the step.
        momentum: share of the former momentum that is kept, b1 above.
        beta2: share of the former second moment that is kept.
        tau: added to the root of the second moment: larger is less adaptive.
    """

    def __init__(self, name: str, learning_rate: float, momentum: float, beta2: float, tau: float):
        self.name, self.learning_rate, self.momentum, self.beta2, self.tau = name, learning_rate, momentum, beta2, tau
        self.round = 0
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def step(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the next round, each in its precision and place; computed in float64.

        Args:
            weights: those that the organisations began the round with.
            average: the mean of their changes, from `averaging` or `privacy`.

        Raises:
            InputError: when the two have other names.
        """
        if weights.keys() != average.keys():
            other = sorted(weights.keys() ^ average.keys())[0]
            raise InputError(f"the weights and the mean change differ in {other!r}: expected the same tensors")
        self.round += 1
        return {name: self._moved(name, value, average[name]) for name, value in weights.items()}

    def _moved(self, name: str, weight: Tensor, change: Tensor) -> Tensor:
        step = self._direction(name, change.to("cpu", torch.float64)) * self.learning_rate
        return (weight.detach().to("cpu", torch.float64) + step).to(weight.device, weight.dtype)

    def _direction(self, name: str, change: Tensor) -> Tensor:
        if self.name == "fedavg":
            return change
        zero = torch.zeros_like(change)
        share = 1.0 if self.name == "momentum" else 1 - self.momentum
        first = self._first[name] = self.momentum * self._first.get(name, zero) + share * change
        if self.name == "momentum":
            return first
        second, square = self._second.get(name, torch.full_like(change, self.tau**2)), change.square()
        if self.name == "fedadagrad":
            second = second + square
        elif self.name == "fedadam":
            second = self.beta2 * second + (1 - self.beta2) * square
        else:
            second = second - (1 - self.beta2) * square * torch.sign(second - square)
        self._second[name] = second
        return first / (second.sqrt() + self.tau)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next step needs, as tensors that safetensors can hold: a restored step has the same bits."""
        first = {f"first.{name}": value.clone() for name, value in self._first.items()}
        second = {f"second.{name}": value.clone() for name, value in self._second.items()}
        return {"round": torch.tensor(self.round), **first, **second}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            InputError: for anything else, and the state of another optimizer.
        """
        kinds = {name.partition(".")[0] for name in state}
        wanted = {"fedavg": set(), "momentum": {"first"}}.get(self.name, {"first", "second"})
        if "round" not in kinds or kinds - {"round"} not in (set(), wanted):
            raise InputError(f"the state of the server's optimizer holds {sorted(kinds)}; not one of {self.name!r}")
        self.round = int(state["round"])
        self._first = _part(state, "first.")
        self._second = _part(state, "second.")


def server_optimizer(
    name: str = "fedavg",
    learning_rate: float | None = None,
    momentum: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> ServerOptimizer:
    """Return an optimizer of the server by name.

    Args:
        name: fedavg, momentum, fedadagrad, fedadam or fedyogi.
        learning_rate: by default 1 for the first two and 0.01 for the others.
        momentum: by default 0.9, as in the paper; 0 for none. FedAvg has none.
        beta2: of FedAdam and FedYogi.
        tau: of the adaptive ones.

    Raises:
        InputError: for an unknown name, and numbers out of range.
    """
    if name not in NAMES:
        raise InputError(f"server_optimizer is {name!r}; expected one of {', '.join(NAMES)}")
    rate = LEARNING_RATES[name] if learning_rate is None else learning_rate
    for field, value in (("learning_rate", rate), ("tau", tau)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{field} of the server's optimizer is {value}; expected a number above 0")
    for field, value in (("momentum", momentum), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise InputError(f"{field} of the server's optimizer is {value}; expected 0 to below 1")
    return ServerOptimizer(name, rate, momentum, beta2, tau)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.clone() for name, value in state.items() if name.startswith(prefix)}

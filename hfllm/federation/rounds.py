"""The rounds of a federation: participants, the mean of their changes, the server's step, and the stored state.

After each round one file, replaced as a whole, holds everything for the next round: a server killed at any moment
resumes with its current round, to the same bits, if organisations train by round number only.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from hfllm.errors import InputError, check_choice, one_line, refuse_if
from hfllm.federation.settings import (
    AGGREGATIONS,
    LEARNING_RATES,
    MAX_NORM_RATIO,
    MEAN,
    MEDIAN,
    NORM_RATIOS,
    SERVER_OPTIMIZERS,
    TRIM,
    TRIMS,
    RoundSettings,
    check_settings,
    num_asked,
)
from hfllm.federation.transports import Transport
from hfllm.federation.updates import Expected, Failure, Update, read_tensors, replace_tensors
from hfllm.fingerprint import fingerprint
from hfllm.flags import check_number
from hfllm.outputs.report import CONTENTS, by_contents

# ---- averaging ----
#
# The average of organisations' updates, weighted by their target tokens.
#
# One step of gradient descent at every organisation, on a mean loss over its tokens, is then exactly the step
# on all rows at once: the gradient of the mean over all tokens is the mean of gradients weighted by tokens. Weighted
# by rows, it is another step wherever organizations' rows differ in length (McMahan et al. 2017, arXiv:1602.05629). A
# step of Adam is no linear function of the gradient: the mean of such steps is another one.
#
# Sums are held in float64 and added in the order of arrival: transports hand updates over in the order of the round's
# participants, so the same updates give the same bits.
#
# A single update can move a mean by any length. `RobustSum` bounds every update by the median length of its round, and
# has the median and the trimmed mean, coordinate by coordinate, in place of the mean (Yin et al. 2018,
# arXiv:1803.01650).


class WeightedSum:
    """Running sum of updates, with FedAvg's mean by tokens (McMahan et al. 2017, arXiv:1602.05629).

    A server holds a single update, however many organisations there are.

    Args:
        expected: the required form of every update; by default the form of the first.
    """

    def __init__(self, expected: Expected | None = None):
        self.expected = expected
        self.organisations: list[str] = []
        self.num_tokens = 0
        self.num_rows = 0
        self._sums: dict[str, Tensor] = {}
        self._squares = 0.0

    def add(self, update: Update) -> None:
        """Add an update.

        Raises:
            InputError: see `check`. The sum is then as before.
        """
        self.check(update)
        for name, tensor in update.tensors.items():
            value = tensor.to("cpu", torch.float64)
            self._squares += update.num_tokens * float(value.square().sum())
            if name in self._sums:
                self._sums[name].add_(value, alpha=update.num_tokens)
            else:
                self._sums[name] = value * update.num_tokens
        self.organisations.append(update.organisation)
        self.num_tokens += update.num_tokens
        self.num_rows += update.num_rows

    def check(self, update: Update) -> None:
        """Refuse an unsuitable update; the first accepted one sets the form of the others.

        Raises:
            InputError: in one line with the organization's name: a second update of it, NaN, other names, shapes,
                precision or base model, no tokens.
        """
        if update.organisation in self.organisations:
            raise InputError(f"organisation {update.organisation!r} sent two updates in a round")
        expected = self.expected or Expected.of(update.tensors, update.base_sha256)
        expected.check(update)
        self.expected = expected

    def average(self) -> dict[str, Tensor]:
        """Return the mean by tokens, in float64.

        Raises:
            InputError: before any update was added.
        """
        refuse_if(not self.organisations, "no organisation sent an update that can be averaged; at least 1 is needed")
        return {name: total / self.num_tokens for name, total in self._sums.items()}

    def drift(self) -> float:
        """Return how far organisations moved apart: the root of the mean squared distance to the mean, by tokens.

        It is 0 when all sent the same change. No second pass: it is the mean of squares less the square of the mean.
        """
        mean = self.average()
        return math.sqrt(max(self._squares / self.num_tokens - norm(mean) ** 2, 0.0))


class RobustSum:
    """Updates of a round, bounded before averaging: one organization by itself does not own the mean.

    An update longer than `max_norm_ratio` times the typical length, over all tensors together, is scaled to this limit
    (norm bounding, Sun et al. 2019, arXiv:1911.07963). Typical is the median of the round's lengths, of an even
    number the smaller one in the middle. If the median is 0, the typical length is `earlier_norm`, or without one the
    median of the nonzero lengths. Of two updates it is the middle one of both and `earlier_norm`, or without one the
    shorter; a single update is measured by `earlier_norm` only, and by nothing without it. Where no update is too long
    the mean has the bits of `WeightedSum`.

    All updates of the round are held in memory, in their precision.

    Args:
        expected: the required form of every update; by default the form of the first.
        aggregation: mean (by tokens), or by coordinate, organizations counting alike, median or trimmed_mean.
        trim: share of the updates left out of the trimmed mean at each end; of three or more at least one.
        max_norm_ratio: see above; 0 bounds nothing.

    Attributes:
        earlier_norm: the typical length of the round before, 0, the default, if none is known.
        bounded: for every organization with too long an update, its length and the bound, in words; once averaged.
        typical_norm: the typical length of the bounded updates, 0 where unknown; once averaged.

    Raises:
        InputError: for settings out of range.
    """

    def __init__(
        self,
        expected: Expected | None = None,
        aggregation: str = MEAN,
        trim: float = TRIM,
        max_norm_ratio: float = MAX_NORM_RATIO,
    ):
        check_robust(aggregation, trim, max_norm_ratio)
        self.aggregation, self.trim, self.max_norm_ratio = aggregation, trim, max_norm_ratio
        self.earlier_norm = 0.0
        self.bounded: dict[str, str] = {}
        self.typical_norm = 0.0
        self._total, self._updates = WeightedSum(expected), []
        self._norms: list[float] = []
        self._drift = 0.0

    def add(self, update: Update) -> None:
        """Add an update; see `WeightedSum.check` for refused updates."""
        self._total.check(update)
        self._total.organisations.append(update.organisation)
        self._updates.append(update)
        self._norms.append(six_digits(norm(update.tensors)))

    def average(self) -> dict[str, Tensor]:
        """Return the mean, median or trimmed mean of the bounded updates, in float64.

        Raises:
            InputError: before any update was added.
        """
        factors = self._factors()
        if self.aggregation == MEAN or not self._updates:
            total = WeightedSum()
            for update, factor in zip(self._updates, factors, strict=True):
                total.add(replace(update, tensors={name: _scaled(update, name, factor) for name in update.tensors}))
            average = total.average()
            self._drift = total.drift()
            return average
        average, squares = {}, 0.0
        for name in self._updates[0].tensors:
            values = torch.stack(list(map(_scaled, self._updates, repeat(name), factors)))
            average[name] = self._middle(values)
            squares += float((values - average[name]).square().sum())
        self._drift = math.sqrt(squares / len(factors))
        return average

    def drift(self) -> float:
        """Return how far the bounded updates lie from the average: the root of the mean square; once averaged."""
        return self._drift

    def _factors(self) -> list[float]:
        """Return the factor of every update: 1 where it is not too long."""
        typical = typical_norm(self._norms, self.earlier_norm)
        most = math.inf if typical is None or not self.max_norm_ratio else self.max_norm_ratio * typical
        self.typical_norm = typical_norm([min(length, most) for length in self._norms]) or 0.0
        lengths = dict(zip((update.organisation for update in self._updates), self._norms, strict=True))
        self.bounded = {
            name: f"a norm of {length:.3g}, scaled to {most:.3g}" for name, length in lengths.items() if length > most
        }
        return [most / length if length > most else 1.0 for length in self._norms]

    def _middle(self, values: Tensor) -> Tensor:
        """Return the median or trimmed mean over the first axis."""
        count = len(values)
        cut = (count - 1) // 2 if self.aggregation == MEDIAN else max(int(self.trim * count), int(count > 2))
        return values.sort(0).values[cut : count - cut].mean(0)


def _scaled(update: Update, name: str, factor: float) -> Tensor:
    return factor * update.tensors[name].to("cpu", torch.float64)


def typical_norm(norms: Sequence[float], earlier: float = 0.0) -> float | None:
    """Return the length for measuring the updates of a round, `None` where it is unknown; see `RobustSum`.

    Args:
        norms: of all updates.
        earlier: the typical length of the round before, 0 if there is none.
    """
    lengths = sorted(norms)
    if len(lengths) < 3 or not lengths[(len(lengths) - 1) // 2]:
        # Zeros give no bound for the length of the others.
        lengths = [each for each in lengths if each > 0]
        if earlier and lengths:
            lengths = sorted([*lengths, earlier]) if len(norms) == len(lengths) == 2 else [earlier]
    return lengths[(len(lengths) - 1) // 2] if lengths else None


def check_robust(aggregation: str, trim: float, max_norm_ratio: float) -> None:
    """Refuse settings outside of the range of robust averages."""
    check_choice(f"--aggregation {aggregation!r}: expected one of", aggregation, AGGREGATIONS)
    check_number("trim", trim, TRIMS)
    check_number("max_norm_ratio", max_norm_ratio, NORM_RATIOS)


def weighted_average(updates: Iterable[Update], expected: Expected | None = None) -> dict[str, Tensor]:
    """Return the mean of updates by their target tokens, in float64; see `WeightedSum`.

    Raises:
        InputError: for no updates, and for an update that cannot be averaged.
    """
    total = WeightedSum(expected)
    for update in updates:
        total.add(update)
    return total.average()


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all values together."""
    return math.sqrt(sum(float(tensor.to(torch.float64).square().sum()) for tensor in tensors.values()))


def six_digits(value: float) -> float:
    """Return a figure without the digits affected by the memory layout of tensors."""
    return float(f"{value:.6g}")


def distances(updates: Iterable[Update], average: Mapping[str, Tensor]) -> dict[str, float]:
    """Return every organisation's distance to the mean, by name."""
    return {
        update.organisation: norm({name: tensor.double() - average[name] for name, tensor in update.tensors.items()})
        for update in updates
    }


# ---- server optimizers ----
#
# Optimizers of the server, with the organisations' mean change in place of a gradient.
#
# Reddi et al. 2020, "Adaptive Federated Optimization" (arXiv:2003.00295), algorithm 2: with the mean change D and the
# momentum m = b1 m + (1 - b1) D, the weights move by lr m / (sqrt(v) + tau), where v begins at tau squared and is
#
#     FedAdagrad   v + D^2
#     FedAdam      b2 v + (1 - b2) D^2
#     FedYogi      v - (1 - b2) D^2 sign(v - D^2)
#
# There is no correction of the first rounds' bias. FedAvg moves by lr D, `momentum` by lr m with m = b1 m + D (Hsu et
# al. 2019, arXiv:1909.06335).


class ServerOptimizer:
    """Moves the common weights by the mean change of a round, from `WeightedSum`; `server_optimizer` checks settings.

    Args:
        name: one of `SERVER_OPTIMIZERS`.
        learning_rate: factor of the step.
        momentum: kept share of the former momentum, b1 above.
        beta2: kept share of the former second moment.
        tau: added to the root of the second moment: larger is less adaptive.
    """

    def __init__(self, name: str, learning_rate: float, momentum: float, beta2: float, tau: float):
        self.name, self.learning_rate, self.momentum, self.beta2, self.tau = name, learning_rate, momentum, beta2, tau
        self.round = 0
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def step(self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the next round, all in their precision and place; computed in float64.

        Args:
            weights: the organisations' weights at the beginning of the round.
            average: the mean of their changes, from `WeightedSum`, `RobustSum` or `privacy.ClippedSum`.

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
        """Return the state for the next step, as tensors for safetensors: a restored step has the same bits."""
        first = {f"first.{name}": value.clone() for name, value in self._first.items()}
        second = {f"second.{name}": value.clone() for name, value in self._second.items()}
        return {"round": torch.tensor(self.round), **first, **second}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`.

        Raises:
            InputError: for anything else, and the state of another optimizer.
        """
        kinds = {name.partition(".")[0] for name in state}
        expected = {"fedavg": set(), "momentum": {"first"}}.get(self.name, {"first", "second"})
        if "round" not in kinds or kinds - {"round"} not in (set(), expected):
            raise InputError(f"the state of the server's optimizer holds {sorted(kinds)}; not one of {self.name!r}")
        self.round = int(state["round"])
        self._first, self._second = (
            {name: value.clone() for name, value in _part(state, prefix).items()} for prefix in ("first.", "second.")
        )


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
    check_choice(f"server_optimizer is {name!r}; expected one of", name, SERVER_OPTIMIZERS)
    rate = LEARNING_RATES[name] if learning_rate is None else learning_rate
    for name_of, value in (("learning_rate", rate), ("tau", tau)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name_of} of the server's optimizer is {value}; expected a number above 0")
    for name_of, value in (("momentum", momentum), ("beta2", beta2)):
        refuse_if(not 0 <= value < 1, f"{name_of} of the server's optimizer is {value}; expected 0 to below 1")
    return ServerOptimizer(name, rate, momentum, beta2, tau)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# ---- rounds ----


STATE_FILE = "federation.safetensors"
WEIGHT, SERVER = "weight.", "server."

Weights = Mapping[str, Tensor]


class Sum(Protocol):
    """A sum of the updates of a round, such as `RobustSum`."""

    def add(self, update: Update) -> None: ...

    def average(self) -> Mapping[str, Tensor]: ...

    def drift(self) -> float: ...


@dataclass
class RoundRecord:
    """The record of one round.

    Args:
        number: from 1.
        participants: the asked organisations.
        left_out: organisations without a usable update, and why.
        num_tokens: target tokens of the others' training.
        bytes_down, bytes_up: bytes sent and received by the server.
        update_norm: Euclidean norm of the mean change.
        drift: distance of the changes to their mean (root of the mean square, by tokens), over `update_norm`.
        evaluation: figures of the weights after the round; empty where they were not measured.
        bounded: organisations with too long an update, and its length before and after.
        typical_norm: the measure for the lengths of the next round's updates, if they are few.
    """

    number: int
    participants: list[str]
    left_out: dict[str, str]
    num_tokens: int
    bytes_down: int
    bytes_up: int
    update_norm: float
    drift: float
    evaluation: dict[str, float] = field(default_factory=dict)
    bounded: dict[str, str] = field(default_factory=dict)
    typical_norm: float = 0.0


@dataclass
class FederationState:
    """The common weights after some rounds, the state of the server's optimizer, and the rounds so far.

    Weights are held in float32 at least: in bfloat16, a server's moves of less than 1/256 of a weight would be lost.
    """

    weights: dict[str, Tensor]
    server: dict[str, Tensor]
    records: list[RoundRecord] = field(default_factory=list)


def participants_of(names: Sequence[str], number: int, settings: RoundSettings) -> list[str]:
    """Return the organisations asked in a round, in their usual order: at least `min_organisations`."""
    count = num_asked(len(names), settings)
    if settings.is_private:
        return draw_participants(names, count / len(names))
    chosen = set(random.Random(f"participants-{settings.seed}-{number}").sample(range(len(names)), count))
    return [name for index, name in enumerate(names) if index in chosen]


def run_rounds(
    transport: Transport,
    names: Sequence[str],
    weights: Weights,
    server: ServerOptimizer,
    settings: RoundSettings,
    folder: Path,
    identity: Mapping[str, Any],
    evaluate: Callable[[int, Weights], dict[str, float]] = lambda number, weights: {},
    new_sum: Callable[[int], Sum] = lambda number: RobustSum(),
    announce: Callable[[RoundRecord], None] = lambda record: None,
) -> FederationState:
    """Run the missing rounds, and return the state after the last one.

    Args:
        transport: carries weights and updates.
        names: of all organisations.
        weights: the weights at the beginning of the first round.
        server: the server's optimizer.
        settings: see there.
        folder: where the state is kept.
        identity: JSON values that distinguish this run from others.
        evaluate: returns figures of the weights after a round, given its number.
        new_sum: returns the sum for a round's updates, given its number; by default a mean of bounded updates.
        announce: called with the record of every round when it is kept.

    Raises:
        InputError: when the folder holds the rounds of another run, too few organisations sent an update, or the
            round's weights or figures are not finite. The kept state is as before: the same command tries that round
            again.
    """
    check_settings(settings, len(names))
    precisions = {name: value.dtype for name, value in weights.items()}
    state = load_state(folder, identity) or FederationState(
        {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in weights.items()}, {}
    )
    if state.server:
        server.load_state_dict(state.server)
    for number in range(len(state.records) + 1, settings.num_rounds + 1):
        state = _next_state(transport, names, state, server, settings, number, new_sum(number), precisions)
        figures = state.records[-1].evaluation = evaluate(number, state.weights)
        for name, value in figures.items():
            if not math.isfinite(value):
                raise InputError(f"round {number}: {name} is {value} with its weights, which are not kept")
        save_state(folder, state, identity)
        announce(state.records[-1])
    return state


def _next_state(
    transport: Transport,
    names: Sequence[str],
    state: FederationState,
    server: ServerOptimizer,
    settings: RoundSettings,
    number: int,
    total: Sum,
    precisions: Mapping[str, torch.dtype],
) -> FederationState:
    participants, before = participants_of(names, number, settings), (transport.bytes_sent, transport.bytes_received)
    sent = {name: value.to(precisions[name]) for name, value in state.weights.items()}
    if isinstance(total, RobustSum):
        total.earlier_norm = next((each.typical_norm for each in reversed(state.records) if each.typical_norm), 0.0)
    left_out, norms, num_tokens = _added_up(total, transport.run_round(number, sent, participants))
    missing = settings.min_organisations - (len(participants) - len(left_out))
    # Privacy asks for no number of updates; but pure noise must not be trained because a network is down.
    if missing > 0 and (not settings.is_private or (participants and len(left_out) == len(participants))):
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            f"round {number}: {len(participants) - len(left_out)} of {len(participants)} organisations sent an "
            f"update, and --min_organisations is {settings.min_organisations} ({why})"
        )
    average = total.average()
    moved = norm(average)
    record = RoundRecord(
        *(number, participants, left_out, num_tokens),
        bytes_down=transport.bytes_sent - before[0],
        bytes_up=transport.bytes_received - before[1],
        update_norm=six_digits(moved),
        drift=six_digits(total.drift() / moved if moved else 0.0),
    )
    if isinstance(total, RobustSum):
        record.bounded, record.typical_norm = total.bounded, total.typical_norm
    if settings.is_private:
        # Who took part must stay unknown, also from a file or by the number of bytes.
        record = RoundRecord(number, [], {}, 0, 0, 0, record.update_norm, 0.0)
    weights = server.step(state.weights, average)
    _check_finite(number, weights, precisions, norms)
    return FederationState(weights, dict(server.state_dict()), [*state.records, record])


def _added_up(total: Sum, answers: Iterable[Update | Failure]) -> tuple[dict[str, str], dict[str, float], int]:
    """Add updates to a sum; return why others are left out, the norms of the added ones, and their tokens."""
    left_out, norms, num_tokens = {}, {}, 0
    for answer in answers:
        if isinstance(answer, Failure):
            left_out[answer.organisation] = answer.reason
            continue
        try:
            total.add(answer)
        except InputError as error:
            left_out[answer.organisation] = str(error)
        else:
            num_tokens += answer.num_tokens
            norms[answer.organisation] = norm(answer.tensors)
    return left_out, norms, num_tokens


def _check_finite(
    number: int, weights: Weights, precisions: Mapping[str, torch.dtype], norms: Mapping[str, float]
) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value.to(precisions[name])).all():
            largest = sorted(norms, key=lambda each: -norms[each])[:5]
            who = ", ".join(f"{each} {norms[each]:.3g}" for each in largest)
            raise InputError(
                f"round {number}: {name} would be infinite or NaN; the weights before are kept. Largest norms of "
                f"updates: {who}. --max_norm_ratio and --clip_norm bound them"
            )


# ---- what is kept ----


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a digest of the values that distinguish runs: files by their contents, not by when they were written."""
    return fingerprint(by_contents(identity), "what tells the rounds of this run from others")


def _earlier_digest(identity: Mapping[str, Any]) -> str | None:
    """Return the digest of earlier versions, by the times of files; `None` for rounds unknown to them.

    Their mean had no bound, and they had no flags for one.
    """
    named = {name: value for name, value in identity.items() if not name.endswith(CONTENTS)}
    aggregation, ratio, _ = named.pop("aggregation", MEAN), named.pop("max_norm_ratio", 0), named.pop("trim", None)
    if aggregation != MEAN or (ratio and named.get("clip_norm") is None):
        return None
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


def save_state(folder: Path, state: FederationState, identity: Mapping[str, Any]) -> None:
    """Replace the state in a folder as a whole: whoever reads it finds the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {WEIGHT + name: value for name, value in state.weights.items()}
    tensors |= {SERVER + name: value for name, value in state.server.items()}
    metadata = {
        "identity": identity_digest(identity),
        "records": json.dumps([asdict(record) for record in state.records]),
    }
    replace_tensors(folder / STATE_FILE, tensors, metadata)


def load_state(folder: Path, identity: Mapping[str, Any]) -> FederationState | None:
    """Return the state in a folder, `None` if there is none.

    Raises:
        InputError: when it is another run's, or damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
        records = [RoundRecord(**each) for each in json.loads(metadata["records"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({one_line(error, 100)}): remove it to begin again") from None
    if metadata.get("identity", "") not in (identity_digest(identity), _earlier_digest(identity)):
        raise InputError(
            f"{path} holds rounds of another run: remove it to begin again, or choose another --output_dir"
        )
    return FederationState(_part(tensors, WEIGHT), _part(tensors, SERVER), records)


# ---- who takes part ----


def draw_participants(
    organisations: Sequence[str], sampling_rate: float, rng: random.Random | None = None
) -> list[str]:
    """Return who takes part in a round: all with this probability, independently, as the accountant assumes.

    Args:
        rng: by default the operating system's. Who takes part must stay unknown for the bound to hold.
    """
    rng = rng or random.SystemRandom()
    return [name for name in organisations if rng.random() < sampling_rate]

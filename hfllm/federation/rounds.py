"""The rounds of a federation: who takes part, the mean of their changes, the server's step, and what is kept of it.

After each round everything that the next one needs is in one file, which is replaced whole: a server that is killed at
any moment resumes with the round that it was in, to the same bits, if organisations train by round number alone.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfllm import durable
from hfllm.errors import InputError
from hfllm.federation.averaging import MEAN, RobustSum, norm, six_digits
from hfllm.federation.privacy import draw_participants
from hfllm.federation.server_optimizers import ServerOptimizer
from hfllm.federation.transports import Transport
from hfllm.federation.updates import Failure, Update
from hfllm.fingerprint import fingerprint
from hfllm.outputs.report import CONTENTS, by_contents

STATE_FILE = "federation.safetensors"
WEIGHT, SERVER = "weight.", "server."

Weights = Mapping[str, Tensor]


class Sum(Protocol):
    """What updates of a round are added to; `averaging.RobustSum` is one."""

    def add(self, update: Update) -> None: ...

    def average(self) -> Mapping[str, Tensor]: ...

    def drift(self) -> float: ...


@dataclass(frozen=True)
class RoundSettings:
    """How many rounds there are, and who takes part.

    Args:
        num_rounds: rounds in all.
        participation: share of the organisations that a round asks, drawn by `seed` and the round's number.
        min_organisations: updates without which a round is not taken.
        seed: of the draws.
        is_private: each organisation takes part by chance of its own, which nobody knows, as the accountant assumes.
            A round that asked nobody is taken, one in which all that were asked have failed is not; a round that is
            done again is another one. Records then say nothing of who took part.
    """

    num_rounds: int
    participation: float = 1.0
    min_organisations: int = 1
    seed: int = 0
    is_private: bool = False


@dataclass
class RoundRecord:
    """What is known of one round.

    Args:
        number: from 1.
        participants: the organisations that were asked.
        left_out: those without an update that could be averaged, and why.
        num_tokens: target tokens that the others trained on.
        bytes_down, bytes_up: what the server sent and received.
        update_norm: Euclidean norm of the mean change.
        drift: distance of the changes to their mean (root of the mean square, by tokens), over `update_norm`.
        evaluation: figures of the weights after the round; empty where they were not measured.
        bounded: those whose update was too long, and how long it was and was made.
        typical_norm: what the lengths of the next round's updates are measured by, if they are few.
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
    """Return the organisations that a round asks, in their usual order: at least `min_organisations`."""
    count = num_asked(len(names), settings)
    if settings.is_private:
        return draw_participants(names, count / len(names))
    chosen = set(random.Random(f"participants-{settings.seed}-{number}").sample(range(len(names)), count))
    return [name for place, name in enumerate(names) if place in chosen]


def expected_participants(num_organisations: int, participation: float) -> int:
    """Return how many organisations a round asks, or with privacy asks on average."""
    return min(max(math.ceil(participation * num_organisations), 1), num_organisations)


def num_asked(num_organisations: int, settings: RoundSettings) -> int:
    """Return how many organisations a round asks by its settings: with privacy on average."""
    count = expected_participants(num_organisations, settings.participation)
    return count if settings.is_private else max(settings.min_organisations, count)


def check_settings(settings: RoundSettings, num_organisations: int) -> None:
    """Refuse settings that no federation of so many can follow.

    Raises:
        InputError: naming the flag.
    """
    if not 0 < settings.participation <= 1:
        raise InputError(f"--participation {settings.participation}: expected a share above 0, at most 1")
    if not 1 <= settings.min_organisations <= num_organisations:
        raise InputError(
            f"--min_organisations {settings.min_organisations}: expected 1 to {num_organisations}, of which there are "
            "organisations"
        )


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
    """Run the rounds that are missing, and return the state after the last one.

    Args:
        transport: carries weights and updates.
        names: of all organisations.
        weights: those that the first round begins with.
        server: the server's optimizer.
        settings: see there.
        folder: where the state is kept.
        identity: what tells this run from others, as JSON values.
        evaluate: returns figures of the weights after a round, given its number.
        new_sum: returns what a round's updates are added to, given its number; by default a mean whose updates are
            bounded.
        announce: told of each round when it is kept.

    Raises:
        InputError: when the folder holds the rounds of another run, too few organisations sent an update, or the
            round's weights or figures are not finite. What was kept is as before: the same command tries that round
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
        if broken := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise InputError(
                f"round {number}: {broken[0]} is {figures[broken[0]]} with its weights, which are not kept"
            )
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
    asked, before = participants_of(names, number, settings), (transport.bytes_sent, transport.bytes_received)
    sent = {name: value.to(precisions[name]) for name, value in state.weights.items()}
    if isinstance(total, RobustSum):
        total.earlier_norm = next((each.typical_norm for each in reversed(state.records) if each.typical_norm), 0.0)
    left_out, norms, num_tokens = _added_up(total, transport.run_round(number, sent, asked))
    missing = settings.min_organisations - (len(asked) - len(left_out))
    # Privacy asks for no number of updates; but noise alone must not be trained because a network is down.
    if missing > 0 and (not settings.is_private or (asked and len(left_out) == len(asked))):
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            f"round {number}: {len(asked) - len(left_out)} of {len(asked)} organisations sent an update, and "
            f"--min_organisations is {settings.min_organisations} ({why})"
        )
    average = total.average()
    moved = norm(average)
    record = RoundRecord(
        *(number, asked, left_out, num_tokens),
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
    """Add updates to a sum; return why others are left out, the norm of each that is not, and their tokens."""
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
    """Return a digest of what tells runs apart: files by their contents, not by when they were written."""
    return fingerprint(by_contents(identity), "what tells the rounds of this run from others")


def _earlier_digest(identity: Mapping[str, Any]) -> str | None:
    """Return the digest that earlier versions wrote, by the times of files; `None` for rounds that they had not.

    Their mean had no bound, and no flags that say so.
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
    """Return the state that a folder holds, `None` where there is none.

    Raises:
        InputError: when it is another run's, or damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        records = [RoundRecord(**each) for each in json.loads(metadata["records"])]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({' '.join(str(error).split())[:100]}): remove it to begin again"
        ) from None
    if metadata.get("identity", "") not in (identity_digest(identity), _earlier_digest(identity)):
        raise InputError(
            f"{path} holds rounds of another run: remove it to begin again, or choose another --output_dir"
        )
    weights, server = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (WEIGHT, SERVER)
    )
    return FederationState(weights, server, records)


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under another name, to the disk, and rename."""
    unfinished = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, unfinished, metadata)
    durable.replace(unfinished, path)

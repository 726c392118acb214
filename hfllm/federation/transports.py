"""How weights reach organisations and their updates come back: here within one process.

Whatever a learner raises leaves its organization out of the round. An `InputError` says why in its own words; of
another error the server is told the type only, since its message may show words of a row, and the traceback is in the
organization's own log.

Every transport carries the same bytes (`wire`) and hands updates over in the order of the participants, so that the
same round gives the same bits in one process (`InProcess`), in several (`processes.SeveralProcesses`) and between
machines (`flower.FlowerTransport`).
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.updates import Expected, Failure, Update
from hfllm.federation.wire import from_bytes, size_limit, to_bytes, weights_from_bytes, weights_to_bytes

LOG = logging.getLogger(__name__)

# Trains on the rows of one organisation in round `round`, from these weights, and returns what changed.
Learner = Callable[[int, dict[str, Tensor]], Update]


class Transport(Protocol):
    """What the loop of rounds needs of a way to reach organisations.

    `bytes_sent` and `bytes_received` count what the server sent and received so far, messages that were refused too.
    `max_tokens` and `terms` are the loop's to set; see `Receiver`.
    """

    bytes_sent: int
    bytes_received: int
    max_tokens: int | None
    terms: Mapping[str, str | int]

    def run_round(
        self, round: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        """Let participants train from these weights; yield what each sent, or why there is nothing, in their order."""
        ...


class Receiver:
    """What a server accepts, how much of it, and how many bytes it saw: the part that all transports share.

    Args:
        base_sha256: of the base model; an update of another is refused.
        any_rank: accept adapters of other ranks, for the average `stacked`.
        max_bytes: most bytes of a message; by default what an honest one has, 16 times that with `any_rank`.

    Attributes:
        max_tokens: most target tokens of an update; by default any number.
        terms: of the run, such as its local steps: they go with each request to other machines, whose flags are their
            own, and a learner there may refuse them.
    """

    def __init__(self, base_sha256: str, any_rank: bool = False, max_bytes: int | None = None):
        self.base_sha256, self.any_rank, self.max_bytes = base_sha256, any_rank, max_bytes
        self.max_tokens: int | None = None
        self.terms: Mapping[str, str | int] = {}
        self.bytes_sent = self.bytes_received = 0

    def expected(self, weights: Mapping[str, Tensor], round: int | None = None) -> Expected:
        """Return what updates of these weights, in this round, look like."""
        expected = Expected.of(weights, self.base_sha256, self.any_rank)
        return replace(expected, max_tokens=self.max_tokens, round=round)

    def limit(self, expected: Expected) -> int:
        """Return the most bytes that are read of one message."""
        return self.max_bytes or size_limit(expected, 16.0 if self.any_rank else 1.0)

    def receive(self, data: bytes, organisation: str, expected: Expected) -> Update | Failure:
        """Return the update that an organisation sent, or why it is refused."""
        self.bytes_received += len(data)
        try:
            return from_bytes(data, self.limit(expected), expected, organisation)
        except InputError as error:
            return Failure(organisation, str(error))


def failed_by(error: Exception, organisation: str, where: str) -> str:
    """Return why there is no update after an error of a learner, in one line without the error's message.

    Args:
        where: what holds the traceback.
    """
    return f"the learner of organisation {organisation!r} failed by {type(error).__name__}; {where} has the traceback"


def check_participants(participants: Sequence[str], known: Collection[str]) -> None:
    """Refuse a round of an unknown organisation, or of one twice.

    Raises:
        InputError: naming it.
    """
    for place, name in enumerate(participants):
        if name not in known or name in participants[:place]:
            raise InputError(f"organisation {name!r} takes part; expected each at most once of {list(known)}")


class InProcess(Receiver):
    """Organisations as functions of this process, one after the other: a simulation, through the same bytes.

    Args:
        learners: by organisation.
        compression: of updates, none or int8.
        others: see `Receiver`.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        base_sha256: str,
        compression: str = "none",
        any_rank: bool = False,
        max_bytes: int | None = None,
    ):
        super().__init__(base_sha256, any_rank, max_bytes)
        self.learners, self.compression = learners, compression

    def run_round(
        self, round: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        """Train at each participant in turn; an error of one is a `Failure`, with its traceback in the log."""
        check_participants(participants, self.learners)
        expected, message = self.expected(weights, round), weights_to_bytes(weights)
        for name in participants:
            self.bytes_sent += len(message)
            try:
                data = to_bytes(self.learners[name](round, weights_from_bytes(message)), self.compression, round)
            except InputError as error:
                yield Failure(name, str(error))
                continue
            except Exception as error:
                LOG.exception("round %d: the learner of organisation %r failed", round, name)
                yield Failure(name, failed_by(error, name, "the log above"))
                continue
            yield self.receive(data, name, expected)

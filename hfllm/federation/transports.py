"""How weights reach organisations and their updates come back: within one process, or in processes.

An error of a learner, of any kind, leaves its organization out of the round. An `InputError` gives the reason in its
own words; of another error the server is told only the type, since its message may show words of a row, and the
traceback is in the organization's own log.

All transports carry the same bytes (`updates.to_bytes`) and hand updates over in the order of the participants, so
the same round gives the same bits in one process (`InProcess`), in several (`SeveralProcesses`) and between machines
(`flower.FlowerTransport`).
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.updates import (
    Expected,
    Failure,
    Update,
    from_bytes,
    read_update,
    size_limit,
    to_bytes,
    weights_from_bytes,
    weights_to_bytes,
)

# ---- one process ----


LOG = logging.getLogger(__name__)

# Trains on the rows of one organisation in round `round`, from these weights, and returns the changes.
Learner = Callable[[int, dict[str, Tensor]], Update]


class Transport(Protocol):
    """The interface of the loop of rounds to a way of reaching organisations.

    `bytes_sent` and `bytes_received` count the bytes sent and received by the server so far, also of refused messages.
    `max_tokens` and `terms` are the loop's to set; see `Receiver`.
    """

    bytes_sent: int
    bytes_received: int
    max_tokens: int | None
    terms: Mapping[str, str | int]

    def run_round(
        self, round: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        """Let participants train from these weights; yield their updates, or reasons for none, in their order."""
        ...


class Receiver:
    """Accepted updates, their largest size, and the server's count of bytes: the common part of all transports.

    Args:
        base_sha256: of the base model; an update of another is refused.
        any_rank: accept adapters of other ranks, for the average `stacked`.
        max_bytes: most bytes of a message; by default the size of an honest one, 16 times as much with `any_rank`.

    Attributes:
        max_tokens: most target tokens of an update; by default any number.
        terms: of the run, such as its local steps: they go with every request to other machines, whose flags are their
            own, and a learner there may refuse them.
    """

    def __init__(self, base_sha256: str, any_rank: bool = False, max_bytes: int | None = None):
        self.base_sha256, self.any_rank, self.max_bytes = base_sha256, any_rank, max_bytes
        self.max_tokens: int | None = None
        self.terms: Mapping[str, str | int] = {}
        self.bytes_sent = self.bytes_received = 0

    def expected(self, weights: Mapping[str, Tensor], round: int | None = None) -> Expected:
        """Return the required form of updates of these weights, in this round."""
        expected = Expected.of(weights, self.base_sha256, self.any_rank)
        return replace(expected, max_tokens=self.max_tokens, round=round)

    def limit(self, expected: Expected) -> int:
        """Return the maximum of bytes to read of one message."""
        return self.max_bytes or size_limit(expected, 16.0 if self.any_rank else 1.0)

    def receive(self, data: bytes, organisation: str, expected: Expected) -> Update | Failure:
        """Return an organisation's update, or the reason for its refusal."""
        self.bytes_received += len(data)
        try:
            return from_bytes(data, self.limit(expected), expected, organisation)
        except InputError as error:
            return Failure(organisation, str(error))


def failed_by(error: Exception, organisation: str, where: str) -> str:
    """Return why there is no update after an error of a learner, in one line without the error's message.

    Args:
        where: the place of the traceback.
    """
    return f"the learner of organisation {organisation!r} failed by {type(error).__name__}; {where} has the traceback"


def check_participants(participants: Sequence[str], organisations: Collection[str]) -> None:
    """Refuse a round of an unknown organisation, or of one twice."""
    for index, name in enumerate(participants):
        if name not in organisations or name in participants[:index]:
            raise InputError(f"organisation {name!r} takes part; expected each at most once of {list(organisations)}")


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
        """Train at all participants in turn; an error of one is a `Failure`, with its traceback in the log."""
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


# ---- processes ----
#
# Organisations as processes of this machine, training at the same time and exchanging files in a folder.
#
# Every one runs `python -m hfllm.federation.worker` and stays from round to round, to load its model only once. A
# process that dies, reports a failure, or is late becomes a `Failure` with its name, and is started again for the next
# round.


# Seconds between two looks at a process.
PAUSE = 0.05


class SeveralProcesses(Receiver):
    """One process per organisation; a context manager, which ends them.

    Args:
        learner: `module:function`, called in the process as `function(organisation, settings)`; returns a
            `transports.Learner`.
        settings: by organisation, plain JSON values: paths and numbers, not rows.
        folder: for weights, updates and the log of every process.
        timeout: seconds of an organisation for a round, loading included; `None` for no end.
        max_parallel: organisations training at a time; by default one per core.
        others: see `Receiver` and `InProcess`.
    """

    def __init__(
        self,
        learner: str,
        settings: Mapping[str, Mapping[str, Any]],
        folder: str | Path,
        base_sha256: str,
        timeout: float | None = None,
        max_parallel: int | None = None,
        compression: str = "none",
        any_rank: bool = False,
        max_bytes: int | None = None,
    ):
        super().__init__(base_sha256, any_rank, max_bytes)
        self.learner, self.settings, self.folder = learner, settings, Path(folder)
        self.timeout, self.compression = timeout, compression
        self.max_parallel = max_parallel or os.cpu_count() or 1
        self._workers: dict[str, _Worker] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # Left by a killed server.
        for path in self.folder.glob("round-*"):
            path.unlink(missing_ok=True)

    def run_round(
        self, round: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        """Train at all participants, `max_parallel` at a time; see `transports.Transport`."""
        check_participants(participants, self.settings)
        expected, message = self.expected(weights, round), weights_to_bytes(weights)
        path = self.folder / f"round-{round}.safetensors"
        path.write_bytes(message)
        waiting, ended = list(participants), {}
        running: dict[str, float] = {}
        try:
            for name in participants:
                while name not in ended:
                    while waiting and len(running) < self.max_parallel:
                        each = waiting.pop(0)
                        self.bytes_sent += len(message)
                        running[each] = time.monotonic()
                        self._worker(each).ask(round, path, self._update_path(round, each))
                    self._collect(running, ended)
                    if name not in ended:
                        time.sleep(PAUSE)
                yield self._handed_over(round, name, ended.pop(name), expected)
        finally:
            path.unlink(missing_ok=True)
            for name in running:
                # The round was left early: their present training is of no use.
                self._workers.pop(name).end()

    def _collect(self, running: dict[str, float], ended: dict[str, str]) -> None:
        """Move finished organisations from `running` to `ended`, with the reason why they failed, or none."""
        for name, since in list(running.items()):
            worker = self._workers[name]
            reason = worker.answer()
            if reason is None and self.timeout is not None and time.monotonic() - since > self.timeout:
                reason = f"organisation {name!r} was not ready after {self.timeout:g} seconds"
                self._workers.pop(name).end()
            elif reason is not None and not worker.is_alive():
                self._workers.pop(name).end()
            if reason is not None:
                ended[name] = reason
                del running[name]

    def _handed_over(self, round: int, name: str, reason: str, expected: Expected) -> Update | Failure:
        path = self._update_path(round, name)
        try:
            if reason:
                return Failure(name, reason)
            self.bytes_received += path.stat().st_size
            return read_update(path, self.limit(expected), expected, name)
        except InputError as error:
            return Failure(name, str(error))
        except OSError as error:
            return Failure(name, f"the update of organisation {name!r} cannot be read: {error.strerror or error}")
        finally:
            path.unlink(missing_ok=True)

    def _update_path(self, round: int, name: str) -> Path:
        # By index: a name may not be a valid file name.
        return self.folder / f"round-{round}-{list(self.settings).index(name)}.safetensors"

    def _worker(self, name: str) -> "_Worker":
        if name not in self._workers:
            log = self.folder / f"organisation-{list(self.settings).index(name)}.log"
            about = {"learner": self.learner, "organisation": name, "settings": dict(self.settings[name])}
            about |= {"compression": self.compression, "log": str(log)}
            self._workers[name] = _Worker(name, about, log)
        return self._workers[name]

    def close(self) -> None:
        """End all processes."""
        while self._workers:
            self._workers.popitem()[1].end()

    def __enter__(self) -> "SeveralProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Worker:
    """The process of one organisation."""

    def __init__(self, name: str, about: Mapping[str, Any], log: Path):
        self.name, self.log = name, log
        self._log: IO[bytes] = log.open("ab")
        command = [sys.executable, "-m", "hfllm.federation.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._output = b""
        self._tell(about)

    def _tell(self, message: Mapping[str, Any]) -> None:
        # A dead one is known by its `answer`.
        with suppress(OSError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def ask(self, round: int, weights: Path, update: Path) -> None:
        """Let it train from the weights in a file, and write the update into another."""
        self._tell({"round": round, "weights": str(weights.absolute()), "update": str(update.absolute())})

    def answer(self) -> str | None:
        """Return why it failed, an empty text if it did not, and `None` while it trains."""
        is_alive = self.is_alive()
        self._output += self._process.stdout.read() or b""
        if b"\n" in self._output:
            line, _, self._output = self._output.partition(b"\n")
            return json.loads(line)["reason"]
        if is_alive:
            return None
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"the process of organisation {self.name!r} {how}; its log is {self.log}"

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError):
                stream.close()

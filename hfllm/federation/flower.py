"""Organisations on other machines, reached by Flower's SuperLink and SuperNodes (flwr 1.42).

Flower carries the bytes of `updates` and knows who is connected; averages, checks and privacy are ours and the same as
in one process. `docs/guides/federation.md` has the commands. Import this in a process started by Flower, as
`server_app` does.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from hfllm.errors import InputError, refuse_if
from hfllm.federation.transports import Receiver, check_participants
from hfllm.federation.updates import Failure, Update, weights_to_bytes

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

# Name of the record in a message, seconds between two looks at arrivals, and to wait for a lost organisation.
RECORD, PAUSE, LOST_WAIT = "hfllm", 0.5, 30.0
LOG = logging.getLogger(__name__)


class FlowerTransport(Receiver):
    """Organisations with a SuperNode started with `organisation="NAME"` in its --node-config.

    Args:
        grid: Flower's, given to a ServerApp.
        num_organisations: to wait for before the first round; fewer take part after `timeout`.
        timeout: seconds for organisations to appear, and for a round; `None` for no end.
        lost_wait: seconds of a round's wait for an organisation seen before, once for every loss; a returning one
            takes part again.
        others: see `Receiver`. Too large a message is refused once Flower has received it.
    """

    def __init__(
        self,
        grid: "Grid",
        base_sha256: str,
        num_organisations: int = 1,
        timeout: float | None = None,
        any_rank: bool = False,
        max_bytes: int | None = None,
        lost_wait: float = LOST_WAIT,
    ):
        super().__init__(base_sha256, any_rank, max_bytes)
        self.grid, self.num_organisations, self.timeout, self.lost_wait = grid, num_organisations, timeout, lost_wait
        # In the order of finding, so the last node of a name is the newest.
        self._names: dict[int, str] = {}
        self._absent: set[str] = set()

    def organisations(self) -> list[str]:
        """Return the names of the connected organisations, in order, once there are as many as expected.

        Raises:
            InputError: when two have one name, or none is there in time.
        """
        since = time.monotonic()
        while True:
            self._look()
            names = sorted(self._names.values())
            for one, other in pairwise(names):
                refuse_if(one == other, f"two SuperNodes are of the organisation {one!r}: expected a name for each")
            is_late = self.timeout is not None and time.monotonic() - since > self.timeout
            if len(names) >= self.num_organisations or (is_late and names):
                return names
            if is_late:
                raise InputError(f"no organisation was connected after {self.timeout:g} seconds; expected some")
            time.sleep(PAUSE)

    def run_round(
        self, round: int, weights: Mapping[str, Tensor], participants: Sequence[str]
    ) -> Iterator[Update | Failure]:
        """Train at all participants at the same time; see `transports.Transport`."""
        check_participants(participants, participants)
        expected, data = self.expected(weights, round), weights_to_bytes(weights)
        nodes = self._nodes_of(participants)
        values = {"round": round, "weights": data, "terms": json.dumps(dict(self.terms))}
        messages = {nodes[name]: self._message("train", values, nodes[name]) for name in participants if name in nodes}
        self.bytes_sent += len(messages) * len(data)
        replies = dict(self._replies(messages, self.timeout))
        for name in participants:
            if name not in nodes:
                yield Failure(name, f"organisation {name!r} is not connected")
                continue
            reply = replies.pop(nodes[name])
            if isinstance(reply, str):
                yield Failure(name, f"organisation {name!r} {reply}")
                continue
            record = _record(reply)
            if isinstance(record.get("update"), bytes):
                yield self.receive(record["update"], name, expected)
            else:
                reason = record.get("reason") or (reply.error.reason if reply.has_error() else "no update")
                yield Failure(name, f"organisation {name!r}: {' '.join(str(reason).split())[:300]}")

    def _look(self) -> None:
        """Forget disconnected nodes, and ask new ones for their organisations."""
        nodes = set(self.grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in nodes}
        messages = {node: self._message("query", {}, node) for node in sorted(nodes - self._names.keys())}
        for node, reply in self._replies(messages, self.lost_wait):
            name = None if isinstance(reply, str) else _record(reply).get("organisation")
            if name is not None:
                self._names[node] = str(name)

    def _nodes_of(self, participants: Sequence[str]) -> dict[str, int]:
        """Return the nodes of the organisations present now: a restarted SuperNode is another node."""
        since = time.monotonic()
        while True:
            self._look()
            nodes: dict[str, int] = {}
            for node, name in self._names.items():
                if name in nodes:
                    LOG.warning("two SuperNodes are of the organisation %r: the newest, %d, takes part", name, node)
                nodes[name] = node
            missing = {name for name in participants if name not in nodes}
            self._absent &= missing
            if missing <= self._absent or time.monotonic() - since > self.lost_wait:
                self._absent |= missing
                return nodes
            time.sleep(PAUSE)

    def _replies(
        self, messages: "Mapping[int, Message]", timeout: float | None
    ) -> "Iterator[tuple[int, Message | str]]":
        """Send messages; yield the reply of every node, or why there is none."""
        ids = list(self.grid.push_messages(messages.values())) if messages else []
        # Flower returns nothing, or an empty id, for unsendable messages.
        ids += [""] * (len(messages) - len(ids))
        waiting = {id: node for id, node in zip(ids, messages, strict=False) if id}
        yield from (
            (node, "could not be asked: the SuperLink took no message") for node in messages.keys() - waiting.values()
        )
        since = time.monotonic()
        while waiting:
            for reply in self._pulled(waiting):
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if waiting and timeout is not None and time.monotonic() - since > timeout:
                yield from ((node, f"was not ready after {timeout:g} seconds") for node in waiting.values())
                return
            if waiting:
                time.sleep(PAUSE)

    def _pulled(self, waiting: Mapping[str, int]) -> "Iterable[Message]":
        replies = [
            reply for reply in self.grid.pull_messages(list(waiting)) if reply.metadata.reply_to_message_id in waiting
        ]
        return {reply.metadata.reply_to_message_id: reply for reply in replies}.values()

    def _message(self, kind: str, values: Mapping[str, int | bytes], node: int) -> "Message":
        from flwr.app import Message

        return Message(content=record_of(values), message_type=kind, dst_node_id=node)


def is_true(config: Mapping[str, object], name: str) -> bool:
    """Return a true-or-false setting of a run, by default false; as text too, the form of --config.

    Raises:
        InputError: for anything else.
    """
    text = str(config.get(name, False)).lower()
    if text not in ("true", "false"):
        raise InputError(f"{name} is {config[name]!r}; expected true or false")
    return text == "true"


def _record(reply: "Message") -> Mapping[str, object]:
    """Return the contents of a reply: nothing, if it has no record of ours."""
    return reply.content.get(RECORD) or {} if reply.has_content() else {}


def record_of(values: Mapping[str, int | str | bytes]) -> "RecordDict":
    """Return the content of a message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({RECORD: ConfigRecord(dict(values))})

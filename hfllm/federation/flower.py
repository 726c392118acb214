"""Organisations on other machines, reached by Flower's SuperLink and SuperNodes (flwr 1.42).

Flower carries the bytes of `wire` and knows who is connected; averages, checks and privacy are ours and the same as in
one process. `docs/federation.md` has the commands. Import this in a process that Flower started: `server_app` does.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from hfllm.errors import InputError
from hfllm.federation.transports import Receiver, check_participants
from hfllm.federation.updates import Failure, Update
from hfllm.federation.wire import weights_to_bytes

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

# Name of the record in a message, and seconds between two looks at what came.
RECORD, PAUSE = "hfllm", 0.5


class FlowerTransport(Receiver):
    """Organisations that run a SuperNode with `organisation="NAME"` in its --node-config.

    Args:
        grid: Flower's, which a ServerApp is given.
        num_organisations: to wait for, at the begin of each round too; fewer take part after `timeout`.
        timeout: seconds for organisations to appear, and for a round; `None` for no end.
        others: see `Receiver`. A message that is too large is refused once Flower has received it.
    """

    def __init__(
        self,
        grid: "Grid",
        base_sha256: str,
        num_organisations: int = 1,
        timeout: float | None = None,
        any_rank: bool = False,
        max_bytes: int | None = None,
    ):
        super().__init__(base_sha256, any_rank, max_bytes)
        self.grid, self.num_organisations, self.timeout = grid, num_organisations, timeout
        self._names: dict[int, str] = {}

    def organisations(self) -> list[str]:
        """Return the names of those that are connected, in order, once there are as many as expected.

        Raises:
            InputError: when two have one name, or none is there in time.
        """
        since = time.monotonic()
        while True:
            nodes = set(self.grid.get_node_ids())
            self._names = {node: name for node, name in self._names.items() if node in nodes}
            asked = {node: self._message("query", {}, node) for node in nodes - self._names.keys()}
            for node, reply in self._replies(asked):
                if reply is not None and not reply.has_error():
                    self._names[node] = str(reply.content[RECORD]["organisation"])
            names = sorted(self._names.values())
            for first, second in pairwise(names):
                if first == second:
                    raise InputError(f"two SuperNodes are of the organisation {first!r}: expected a name for each")
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
        expected, data = self.expected(weights), weights_to_bytes(weights)
        nodes = {name: node for node, name in self._names.items()}
        if any(name not in nodes for name in participants):
            self.organisations()
            nodes = {name: node for node, name in self._names.items()}
        asked = {nodes[name]: {"round": round, "weights": data} for name in participants if name in nodes}
        self.bytes_sent += len(asked) * len(data)
        replies = dict(self._replies({node: self._message("train", each, node) for node, each in asked.items()}))
        for name in participants:
            reply = replies.pop(nodes[name], None) if name in nodes else None
            record = reply.content.get(RECORD, {}) if reply is not None and reply.has_content() else {}
            if isinstance(record.get("update"), bytes):
                yield self.receive(record["update"], name, expected)
            elif name not in nodes:
                yield Failure(name, f"organisation {name!r} is not connected")
            elif reply is None:
                yield Failure(name, f"organisation {name!r} was not ready after {self.timeout:g} seconds")
            else:
                said = record.get("reason") or (reply.error.reason if reply.has_error() else "no update")
                yield Failure(name, f"organisation {name!r}: {' '.join(str(said).split())[:300]}")

    def _replies(self, asked: "Mapping[int, Message]") -> "Iterator[tuple[int, Message | None]]":
        """Send messages; yield what each node replied, `None` where it was late."""
        waiting = dict(zip(self.grid.push_messages(asked.values()), asked, strict=True)) if asked else {}
        since = time.monotonic()
        while waiting:
            for reply in self._pulled(waiting):
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if waiting and self.timeout is not None and time.monotonic() - since > self.timeout:
                yield from ((node, None) for node in waiting.values())
                return
            if waiting:
                time.sleep(PAUSE)

    def _pulled(self, waiting: Mapping[str, int]) -> "Iterable[Message]":
        known = [
            reply for reply in self.grid.pull_messages(list(waiting)) if reply.metadata.reply_to_message_id in waiting
        ]
        return {reply.metadata.reply_to_message_id: reply for reply in known}.values()

    def _message(self, kind: str, values: Mapping[str, int | bytes], node: int) -> "Message":
        from flwr.app import Message

        return Message(content=record_of(values), message_type=kind, dst_node_id=node)


def record_of(values: Mapping[str, int | str | bytes]) -> "RecordDict":
    """Return the content of a message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({RECORD: ConfigRecord(dict(values))})

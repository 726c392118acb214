"""The transport between machines against a pretended grid: who fails, is late or is not there is named."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from learners import BASE, make_learner
from test_transports import SETTINGS, WEIGHTS, in_process, run_rounds

from hfllm.errors import InputError
from hfllm.federation import flower
from hfllm.federation.flower import RECORD, FlowerTransport, is_true
from hfllm.federation.updates import (
    Expected,
    Failure,
    Update,
    from_bytes,
    to_bytes,
    weights_from_bytes,
    weights_to_bytes,
)


class PretendedGrid:
    """Nodes that answer at once, in reverse order, each as its organisation's fault says."""

    # What the SuperLink does not take, and how many rounds ago nodes were asked what they answer.
    refused, late = None, 0

    def __init__(self, settings, names=None):
        self.settings, self.names = settings, names or dict(enumerate(settings, 100))
        self.nodes, self.sent, self.pulls = list(self.names), {}, 0

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        ids = [f"message {len(self.sent) + number}" for number, _ in enumerate(messages)]
        self.sent |= dict(zip(ids, messages, strict=True))
        if self.refused is not None and any(message.kind == "train" for message in messages):
            return self.refused(ids)
        return ids

    def pull_messages(self, ids):
        self.pulls += 1
        found = [self.reply(each, self.sent[each]) for each in reversed(ids)]
        return [each for each in found if each is not None]

    def reply(self, number, message):
        name = self.names[message.node]
        if message.kind == "query":
            return self.replied(number, {"organisation": name} if name else None)
        fault = self.settings[name].get("fault")
        if fault == "late":
            return None
        if fault == "raised":
            error = SimpleNamespace(reason="Traceback\n  ZeroDivisionError")
            no = SimpleNamespace(reply_to_message_id=number)
            return SimpleNamespace(metadata=no, has_content=lambda: False, has_error=lambda: True, error=error)
        if fault == "says":
            return self.replied(number, {"reason": "has no rows"})
        if fault == "junk":
            return self.replied(number, {"update": 7})
        if fault == "no record":
            return self.replied(number, None)
        self.terms = message.values["terms"]
        learner = make_learner("org9" if fault == "another's name" else name, {**self.settings[name], "fault": None})
        weights, asked = weights_from_bytes(message.values["weights"]), message.values["round"]
        return self.replied(number, {"update": to_bytes(learner(asked, weights), round=asked - self.late)})

    @staticmethod
    def replied(number, values):
        about = SimpleNamespace(reply_to_message_id=number)
        content = {} if values is None else {RECORD: values}
        return SimpleNamespace(metadata=about, content=content, has_content=lambda: True, has_error=lambda: False)


@pytest.fixture
def connect(monkeypatch):
    monkeypatch.setattr(flower, "PAUSE", 0.001)
    monkeypatch.setattr(
        FlowerTransport,
        "_message",
        lambda self, kind, values, node: SimpleNamespace(kind=kind, values=values, node=node),
    )

    def make(settings=SETTINGS, names=None, **options):
        grid = PretendedGrid(settings, names)
        return grid, FlowerTransport(
            grid, BASE, **{"num_organisations": len(grid.names), "lost_wait": 0.02, **options}
        )

    return make


def test_rounds_are_those_of_one_process(connect):
    _, transport = connect()
    assert transport.organisations() == list(SETTINGS)
    one = in_process()
    (ours, failures), (theirs, _) = run_rounds(transport), run_rounds(one)
    assert not failures and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (transport.bytes_sent, transport.bytes_received) == (one.bytes_sent, one.bytes_received)


FAULTS = {
    "late": "organisation 'org1' was not ready after 0.05 seconds",
    "raised": "organisation 'org1': Traceback ZeroDivisionError",
    "says": "organisation 'org1': has no rows",
    "junk": "organisation 'org1': no update",
    "no record": "organisation 'org1': no update",
    "another's name": "organisation 'org1' sent bytes that are not an update: it is in the name of 'org9'",
}


def test_answers_to_another_round_are_refused(connect):
    grid, transport = connect()
    transport.organisations()
    grid.late = 1
    replies = list(transport.run_round(2, WEIGHTS, list(SETTINGS)))
    assert [each.reason for each in replies] == [
        f"organisation {name!r} sent an update of round 1; expected one of round 2" for name in SETTINGS
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_goes_on_without_an_organisation(connect, fault):
    _, transport = connect({**SETTINGS, "org1": {**SETTINGS["org1"], "fault": fault}}, timeout=0.05)
    transport.organisations()
    replies = list(transport.run_round(1, WEIGHTS, list(SETTINGS)))
    assert [type(each) for each in replies] == [Update, Failure, Update]
    assert replies[1] == Failure("org1", FAULTS[fault])


def test_one_that_is_not_connected_is_named_and_one_that_returns_takes_part(connect):
    grid, transport = connect(timeout=0.02)
    grid.nodes = [100, 102]
    assert transport.organisations() == ["org0", "org2"]
    replies = list(transport.run_round(1, WEIGHTS, list(SETTINGS)))
    assert replies[1] == Failure("org1", "organisation 'org1' is not connected")
    grid.nodes = [100, 101, 102]
    assert all(isinstance(each, Update) for each in transport.run_round(2, WEIGHTS, list(SETTINGS)))
    # Nor is one that left still there.
    grid.nodes = [101]
    assert transport.organisations() == ["org1"]


def test_a_node_that_was_restarted_takes_part_again(connect):
    grid, transport = connect()
    transport.organisations()
    list(transport.run_round(1, WEIGHTS, list(SETTINGS)))
    # Flower gives it another number.
    grid.names[7] = "org1"
    grid.nodes = [100, 7, 102]
    assert all(isinstance(each, Update) for each in transport.run_round(2, WEIGHTS, list(SETTINGS)))


def test_of_two_nodes_of_one_name_the_newest_takes_part(connect, caplog):
    grid, transport = connect(timeout=0.05)
    transport.organisations()
    # The former one is still counted, and answers no more.
    grid.settings = {**SETTINGS, "org1": {**SETTINGS["org1"], "fault": "late"}}
    reply = grid.reply
    grid.names[7], grid.nodes = "org1", [*grid.nodes, 7]

    def of_the_new_one(number, message):
        if message.node == 7:
            grid.settings = {**SETTINGS, "org1": SETTINGS["org1"]}
        return reply(number, message)

    grid.reply = of_the_new_one
    assert all(isinstance(each, Update) for each in transport.run_round(1, WEIGHTS, list(SETTINGS)))
    assert "two SuperNodes are of the organisation 'org1': the newest, 7, takes part" in caplog.text


def test_a_lost_organisation_is_waited_for_once(connect, monkeypatch):
    grid, transport = connect(lost_wait=5.0)
    transport.organisations()
    grid.nodes, now, waited = [100, 102], [0.0], []
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: (waited.append(1), now.append(now.pop() + 1))
    )
    monkeypatch.setattr(flower, "time", clock)
    for number in (1, 2):
        replies = list(transport.run_round(number, WEIGHTS, list(SETTINGS)))
        assert [type(each) for each in replies] == [Update, Failure, Update] and len(waited) == 6


@pytest.mark.parametrize("refused", [lambda ids: [], lambda ids: ["" for _ in ids], lambda ids: [ids[0], "", ids[2]]])
def test_what_the_superlink_does_not_take_is_a_failure(connect, refused):
    grid, transport = connect()
    transport.organisations()
    grid.refused = refused
    replies = list(transport.run_round(1, WEIGHTS, list(SETTINGS)))
    assert replies[1] == Failure("org1", "organisation 'org1' could not be asked: the SuperLink took no message")
    assert [each.organisation for each in replies] == list(SETTINGS)


def test_a_node_that_does_not_say_whose_it_is_is_none(connect):
    _, transport = connect(names={**dict(enumerate(SETTINGS, 100)), 5: None}, num_organisations=3)
    assert transport.organisations() == list(SETTINGS)


def test_the_terms_of_the_run_go_with_each_request(connect):
    grid, transport = connect()
    transport.terms = {"local_steps": 3}
    transport.organisations()
    list(transport.run_round(1, WEIGHTS, list(SETTINGS)))
    assert grid.terms == '{"local_steps": 3}'


def test_settings_of_a_run_that_are_true_or_false():
    assert [is_true({"any-rank": value}, "any-rank") for value in (True, "true", False, "false")] == [1, 1, 0, 0]
    assert not is_true({}, "any-rank")
    with pytest.raises(InputError, match="any-rank is 'no'; expected true or false"):
        is_true({"any-rank": "no"}, "any-rank")


def test_nobody_and_two_of_one_name_are_refused(connect):
    grid, transport = connect(timeout=0.02)
    grid.nodes = []
    with pytest.raises(InputError, match=r"no organisation was connected after 0\.02 seconds"):
        transport.organisations()
    _, transport = connect(names={1: "org0", 2: "org0"})
    with pytest.raises(InputError, match="two SuperNodes are of the organisation 'org0'"):
        transport.organisations()


# ---- at an organisation ----


@pytest.fixture
def train(monkeypatch):
    """What a SuperNode does with a request, with as much of Flower as it asks for."""

    class ClientApp:
        def query(self):
            return lambda function: function

        train = query

    def message(content, reply_to):
        return SimpleNamespace(content=content, reply_to=reply_to)

    app = SimpleNamespace(ConfigRecord=dict, RecordDict=dict, Context=object, Message=message)
    modules = {"flwr": SimpleNamespace(), "flwr.app": app, "flwr.clientapp": SimpleNamespace(ClientApp=ClientApp)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hfllm.federation.client_app", raising=False)
    client_app = importlib.import_module("hfllm.federation.client_app")
    monkeypatch.delitem(sys.modules, "hfllm.federation.client_app")

    def make(folder, round, **settings):
        (folder / "settings.json").write_text(json.dumps({**SETTINGS["org1"], **settings}))
        node = {"organisation": "org1", "settings": str(folder / "settings.json")}
        context = SimpleNamespace(run_config={"learner": "learners:make_learner"}, node_config=node, node_id=7)
        request = {RECORD: {"round": round, "weights": weights_to_bytes(WEIGHTS), "terms": "{}"}}
        return client_app.train(SimpleNamespace(content=request), context).content[RECORD]

    return make


def test_an_organisation_says_which_round_it_answers_and_why_it_does_not(train, tmp_path, caplog):
    update = train(tmp_path, 5)["update"]
    expected = Expected.of(WEIGHTS, BASE)
    assert from_bytes(update, 10_000, expected, "org1").round == 5
    assert train(tmp_path, 5, fault="refused") == {"reason": "organisation 'org1' has no rows"}
    reason = "the learner of organisation 'org1' failed by ValueError; its own log has the traceback"
    assert train(tmp_path, 5, fault="wrong") == {"reason": reason}
    assert "ValueError: the row of Mrs. Miller is broken" in caplog.text

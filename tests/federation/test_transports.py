"""Rounds in one process and in several: the same bits, and organisations that fail are named and left out."""

import functools
import os
import time

import pytest
import torch
from learners import BASE, make_learner, rows_of

from hfllm.errors import InputError
from hfllm.federation.rounds import server_optimizer, weighted_average
from hfllm.federation.transports import InProcess, SeveralProcesses
from hfllm.federation.updates import Failure, Update, weights_to_bytes

SETTINGS = {f"org{n}": {"seed": n, "count": 3 + 4 * n, "steps": 1 + n} for n in range(3)}
WEIGHTS = {"w": torch.zeros(1, 3), "b": torch.zeros(1)}


def in_process(settings=SETTINGS, **options):
    learners = {name: make_learner(name, each) for name, each in settings.items()}
    return InProcess(learners, BASE, **options)


def run_rounds(transport, rounds=2, weights=WEIGHTS, names=tuple(SETTINGS)):
    optimizer, failures = server_optimizer("momentum"), []
    for number in range(1, rounds + 1):
        replies = list(transport.run_round(number, weights, names))
        failures += [each for each in replies if isinstance(each, Failure)]
        weights = optimizer.step(weights, weighted_average(each for each in replies if isinstance(each, Update)))
    return weights, failures


def faulty(**fields):
    return {**SETTINGS, "org1": {**SETTINGS["org1"], **fields}}


def test_one_step_of_all_is_the_central_step():
    settings = {name: {**each, "steps": 1} for name, each in SETTINGS.items()}
    weights = {name: value.double() for name, value in WEIGHTS.items()}
    average = weighted_average(in_process(settings).run_round(1, weights, list(settings)))
    data = [rows_of(each["seed"], each["count"]) for each in settings.values()]
    inputs, targets = (torch.cat([each[part] for each in data]) for part in (0, 1))
    torch.testing.assert_close(average["w"][0], 0.2 * targets @ inputs / len(targets), rtol=0, atol=1e-12)


def test_bytes_are_counted_each_way():
    transport = in_process()
    list(transport.run_round(1, WEIGHTS, ["org0", "org2"]))
    assert 16 <= transport.bytes_sent / 2 <= 400 and 16 <= transport.bytes_received / 2 <= 800


FAULTS = {
    "refused": ({"fault": "refused"}, "'org1' has no rows"),
    "wrong": ({"fault": "wrong"}, "the learner of organisation 'org1' failed by ValueError; the log above has the"),
    "of a round before": ({"answers": 3}, "organisation 'org1' sent an update of round 3; expected one of round 4"),
    "another base": ({"base": "f" * 64}, "'org1' began from another base model"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_round_goes_on_without_an_organisation(case):
    fields, message = FAULTS[case]
    replies = list(in_process(faulty(**fields)).run_round(4, WEIGHTS, list(SETTINGS)))
    assert [type(each) for each in replies] == [Update, Failure, Update]
    assert replies[1].organisation == "org1" and message in replies[1].reason
    assert replies[0].round == replies[2].round == 4


def test_what_a_learner_raises_is_in_the_log_and_not_in_what_is_sent(caplog):
    reply = next(in_process(faulty(fault="wrong")).run_round(1, WEIGHTS, ["org1"]))
    assert "Miller" not in reply.reason and "ValueError: the row of Mrs. Miller is broken" in caplog.text


def test_a_message_above_the_limit_is_refused_and_named():
    replies = list(in_process(max_bytes=100).run_round(1, WEIGHTS, ["org0"]))
    assert "organisation 'org0' sent" in replies[0].reason and "at most 100 are read" in replies[0].reason


def test_unknown_and_repeated_participants_are_refused(tmp_path):
    transports = (in_process(), SeveralProcesses("learners:make_learner", SETTINGS, tmp_path, BASE))
    for transport in transports:
        for names in (["org0", "org9"], ["org0", "org0"]):
            with pytest.raises(InputError, match=f"organisation '{names[1]}' takes part"):
                list(transport.run_round(1, WEIGHTS, names))


@pytest.fixture
def several(tmp_path, monkeypatch):
    # The processes find the learners of the tests.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
    make = functools.partial(SeveralProcesses, "learners:make_learner", folder=tmp_path, base_sha256=BASE)
    opened = []

    def open_one(settings, **options):
        opened.append(make(settings=settings, **options))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_what_a_killed_server_left_is_removed(several, tmp_path):
    left = [tmp_path / name for name in ("round-7.safetensors", "round-7-0.safetensors", "round-7-1.partial")]
    for path in left:
        path.write_bytes(b"")
    several(SETTINGS)
    assert not any(path.exists() for path in left)


def test_an_update_that_is_gone_is_a_failure(several):
    reply = several(SETTINGS)._handed_over(1, "org1", "", None)
    assert reply == Failure("org1", "the update of organisation 'org1' cannot be read: No such file or directory")


@pytest.mark.slow
def test_a_worker_ends_at_once_when_its_server_is_gone(several, tmp_path):
    """In the middle of a round: it would train on otherwise, and write into the folder of the next server's."""
    transport = several(faulty(fault="late"))
    weights = tmp_path / "weights"
    weights.write_bytes(weights_to_bytes(WEIGHTS))
    worker = transport._worker("org1")
    worker.ask(1, weights, tmp_path / "update")
    # It says so in its log when it begins; then it sleeps for a minute.
    since = time.monotonic()
    while "no answer" not in worker.log.read_text() and time.monotonic() - since < 120:
        time.sleep(0.1)
    # As the system does for a server that is killed.
    worker._process.stdin.close()
    assert worker._process.wait(30) == 0 and not (tmp_path / "update").exists()


@pytest.mark.slow
def test_several_processes_give_the_bits_of_one(several, tmp_path):
    transport = several(SETTINGS, max_parallel=2)
    ours, failures = run_rounds(transport)
    one = in_process()
    theirs, _ = run_rounds(one)
    assert not failures and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (transport.bytes_sent, transport.bytes_received) == (one.bytes_sent, one.bytes_received)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.slow
def test_processes_that_die_or_are_late_are_left_out_for_a_round(several):
    settings = {
        "org0": SETTINGS["org0"],
        "org1": {**SETTINGS["org1"], "fault": "killed", "fault_round": 1},
        "org2": {**SETTINGS["org2"], "fault": "refused", "fault_round": 2},
    }
    _, failures = run_rounds(several(settings))
    assert [each.organisation for each in failures] == ["org1", "org2"]
    assert "was killed by signal 9; its log is" in failures[0].reason and failures[1].reason.endswith("has no rows")


@pytest.mark.slow
def test_a_learner_that_raises_is_left_out_for_a_round_by_its_process(several):
    transport = several(faulty(fault="wrong", fault_round=1))
    worker = transport._worker("org1")
    _, failures = run_rounds(transport)
    assert [each.organisation for each in failures] == ["org1"]
    assert failures[0].reason.endswith(f"failed by ValueError; {worker.log} has the traceback")
    assert "ValueError: the row of Mrs. Miller is broken" in worker.log.read_text()
    # It is the same process.
    assert transport._worker("org1") is worker


@pytest.mark.slow
@pytest.mark.turn(6)
def test_processes_that_are_late_are_left_out(several):
    late = several(faulty(fault="late"), timeout=40.0)
    _, failures = run_rounds(late, rounds=1)
    assert [each.reason for each in failures] == ["organisation 'org1' was not ready after 40 seconds"]

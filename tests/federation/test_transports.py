"""Rounds in one process and in several: the same bits, and organisations that fail are named and left out."""

import functools
import os

import pytest
import torch
from learners import BASE, make_learner, rows_of

from hfllm.errors import InputError
from hfllm.federation.averaging import weighted_average
from hfllm.federation.processes import SeveralProcesses
from hfllm.federation.server_optimizers import server_optimizer
from hfllm.federation.transports import InProcess
from hfllm.federation.updates import Failure, Update

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
    "another base": ({"base": "f" * 64}, "'org1' began from another base model"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_round_goes_on_without_an_organisation(case):
    fields, message = FAULTS[case]
    replies = list(in_process(faulty(**fields)).run_round(1, WEIGHTS, list(SETTINGS)))
    assert [type(each) for each in replies] == [Update, Failure, Update]
    assert replies[1].organisation == "org1" and message in replies[1].reason


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
    late = several(faulty(fault="late"), timeout=40.0)
    _, failures = run_rounds(late, rounds=1)
    assert [each.reason for each in failures] == ["organisation 'org1' was not ready after 40 seconds"]

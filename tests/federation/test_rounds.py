"""The loop of rounds on plain tensors: who is asked, what is kept, and a server that is killed while it writes."""

import os

import pytest
import torch
from safetensors.torch import load_file

from hfllm.errors import InputError
from hfllm.federation import rounds as rounds_file
from hfllm.federation.rounds import STATE_FILE, RoundSettings, load_state, participants_of, run_rounds
from hfllm.federation.server_optimizers import server_optimizer
from hfllm.federation.transports import InProcess
from hfllm.federation.updates import Update

NAMES = ("a", "b", "c", "d")
TARGETS = {name: torch.randn(5, generator=torch.Generator().manual_seed(place)) for place, name in enumerate(NAMES)}


def learner(name):
    """A step towards the organisation's own target, with noise by the round."""

    def learn(number, weights):
        noise = torch.randn(5, generator=torch.Generator().manual_seed(1000 * number + ord(name)))
        return Update(name, {"w": 0.5 * (TARGETS[name] - weights["w"]) + 0.01 * noise}, 1 + ord(name) % 3, 1, "base")

    return learn


def run(folder, num_rounds=6, server="fedadam", learners=None, identity=("x",), evaluate=None, **more):
    settings = RoundSettings(num_rounds, **{"participation": 0.6, "seed": 3, **more})
    transport = InProcess(learners or {name: learner(name) for name in NAMES}, "base")
    figures = evaluate or (lambda number, weights: {"norm": float(weights["w"].norm())})
    optimizer = server_optimizer(server, 0.1)
    return run_rounds(
        transport, NAMES, {"w": torch.zeros(5)}, optimizer, settings, folder, {"flags": identity}, figures
    )


def bits(state):
    return state.weights["w"].numpy().tobytes(), [vars(record) for record in state.records]


def test_who_is_asked_depends_on_the_seed_and_the_round_alone():
    settings = RoundSettings(9, participation=0.5, seed=1)
    asked = [tuple(participants_of(NAMES, number, settings)) for number in range(1, 60)]
    assert asked == [tuple(participants_of(NAMES, number, settings)) for number in range(1, 60)]
    assert {len(names) for names in asked} == {2} and len(set(asked)) == 6
    assert all(list(names) == sorted(names) for names in asked)
    assert participants_of(NAMES, 1, RoundSettings(9, participation=0.01, min_organisations=3)) != []
    assert len(participants_of(NAMES, 1, RoundSettings(9, participation=0.01, min_organisations=3))) == 3


@pytest.mark.parametrize("server", ["fedavg", "momentum", "fedadam"])
@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_a_server_that_is_killed_around_a_write_resumes_to_the_same_bits(tmp_path, monkeypatch, server, moment):
    whole = bits(run(tmp_path / "whole", server=server))
    replace, written = os.replace, []

    def killed(source, target):
        written.append(target)
        if len(written) == 3:
            if moment == "while":
                # What was written so far is cut off.
                with open(source, "r+b") as stream:
                    stream.truncate(40)
            if moment == "after":
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(rounds_file.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", server=server)
    monkeypatch.setattr(rounds_file.os, "replace", replace)
    kept = load_state(tmp_path / "killed", {"flags": ("x",)})
    assert len(kept.records) == (3 if moment == "after" else 2)
    assert bits(run(tmp_path / "killed", server=server)) == whole


def test_a_round_that_was_not_taken_is_tried_again(tmp_path):
    learners = {name: learner(name) for name in NAMES}
    whole = bits(run(tmp_path / "whole", participation=1.0, min_organisations=4))

    def broken(number, weights):
        if number == 4:
            raise InputError("the power is out")
        return learner("b")(number, weights)

    with pytest.raises(InputError, match=r"round 4: 3 of 4 .* --min_organisations is 4 \(b: the power is out\)"):
        run(tmp_path / "out", participation=1.0, min_organisations=4, learners=learners | {"b": broken})
    assert len(load_state(tmp_path / "out", {"flags": ("x",)}).records) == 3
    assert bits(run(tmp_path / "out", participation=1.0, min_organisations=4)) == whole


def test_the_round_without_an_organisation_is_the_mean_of_the_others(tmp_path):
    def diverged(number, weights):
        return Update("c", {"w": torch.full((5,), float("nan"))}, 5, 1, "base")

    learners = {name: learner(name) for name in NAMES} | {"c": diverged}
    found = run(tmp_path, num_rounds=1, server="fedavg", learners=learners, participation=1.0)
    assert list(found.records[0].left_out) == ["c"] and "NaN" in found.records[0].left_out["c"]
    sent = {name: learner(name)(1, {"w": torch.zeros(5)}) for name in "abd"}
    total = sum(each.num_tokens for each in sent.values())
    mean = sum(each.tensors["w"].double() * each.num_tokens for each in sent.values()) / total
    assert torch.allclose(found.weights["w"].double(), 0.1 * mean, atol=1e-7)
    assert found.records[0].num_tokens == total
    squares = sum(each.num_tokens * (each.tensors["w"].double() - mean).square().sum() for each in sent.values())
    assert found.records[0].drift == pytest.approx(float((squares / total).sqrt() / mean.norm()), rel=1e-5)


def test_rounds_of_another_run_and_damage_are_refused(tmp_path):
    run(tmp_path, num_rounds=2)
    with pytest.raises(InputError, match="holds rounds of another run"):
        run(tmp_path, identity=("y",))
    before = load_file(tmp_path / STATE_FILE)
    assert {"weight.w", "server.round"} <= before.keys()
    (tmp_path / STATE_FILE).write_bytes((tmp_path / STATE_FILE).read_bytes()[:50])
    with pytest.raises(InputError, match="is damaged") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"), [({"participation": 1.5}, "--participation 1.5"), ({"min_organisations": 5}, "1 to 4")]
)
def test_settings_that_no_federation_can_follow(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **more)

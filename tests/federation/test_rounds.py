"""The loop of rounds on plain tensors: who is asked, what is kept, and a server that is killed while it writes."""

import hashlib
import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hfllm.errors import InputError
from hfllm.federation import rounds as rounds_file
from hfllm.federation.privacy import ClippedSum
from hfllm.federation.rounds import (
    STATE_FILE,
    FederationState,
    RobustSum,
    RoundSettings,
    WeightedSum,
    load_state,
    num_asked,
    participants_of,
    run_rounds,
    save_state,
    server_optimizer,
)
from hfllm.federation.transports import InProcess
from hfllm.federation.updates import Update, replace_tensors

NAMES = ("a", "b", "c", "d")
TARGETS = {name: torch.randn(5, generator=torch.Generator().manual_seed(place)) for place, name in enumerate(NAMES)}


def learner(name):
    """A step towards the organisation's own target, with noise by the round."""

    def learn(number, weights):
        noise = torch.randn(5, generator=torch.Generator().manual_seed(1000 * number + ord(name)))
        return Update(name, {"w": 0.5 * (TARGETS[name] - weights["w"]) + 0.01 * noise}, 1 + ord(name) % 3, 1, "base")

    return learn


def run(folder, num_rounds=6, server="fedadam", learners=None, identity=("x",), evaluate=None, sum=RobustSum, **more):
    settings = RoundSettings(num_rounds, **{"participation": 0.6, "seed": 3, **more})
    transport = InProcess(learners or {name: learner(name) for name in NAMES}, "base")
    figures = evaluate or (lambda number, weights: {"norm": float(weights["w"].norm())})
    optimizer = server_optimizer(server, 0.1)
    rounds = (transport, NAMES, {"w": torch.zeros(5)}, optimizer, settings, folder, {"flags": identity}, figures)
    return run_rounds(*rounds, new_sum=lambda number: sum())


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

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", server=server)
    monkeypatch.setattr("os.replace", replace)
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
    found = run(tmp_path, num_rounds=1, server="fedavg", learners=learners, participation=1.0, sum=WeightedSum)
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


def test_rounds_are_known_by_what_files_hold_and_those_of_earlier_versions_by_their_times(tmp_path):
    def identity(time, contents):
        return {"files changed at": time, "files contents": contents, "rate": 0.1}

    state = FederationState({"w": torch.ones(2)}, {})
    save_state(tmp_path, state, identity(1, "a"))
    assert load_state(tmp_path, identity(2, "a")) is not None
    for other in (identity(1, "b"), identity(1, "a") | {"rate": 0.2}, {"files changed at": 1, "rate": 0.1}):
        with pytest.raises(InputError, match="holds rounds of another run"):
            load_state(tmp_path, other)
    # An earlier version wrote this.
    text = json.dumps({"files changed at": 1, "rate": 0.1}, sort_keys=True)
    metadata = {"identity": hashlib.sha256(text.encode()).hexdigest(), "records": "[]"}
    replace_tensors(tmp_path / STATE_FILE, {"weight.w": torch.ones(2)}, metadata)
    assert load_state(tmp_path, identity(1, "b")) is not None
    with pytest.raises(InputError, match="holds rounds of another run"):
        load_state(tmp_path, identity(2, "b"))


@pytest.mark.parametrize(
    ("flags", "is_known"),
    [
        ({"aggregation": "mean", "trim": 0.2, "max_norm_ratio": 0.0, "clip_norm": None}, True),
        ({"aggregation": "mean", "trim": 0.2, "max_norm_ratio": 2.0, "clip_norm": 1.0}, True),
        ({"aggregation": "mean", "trim": 0.2, "max_norm_ratio": 2.0, "clip_norm": None}, False),
        ({"aggregation": "median", "trim": 0.2, "max_norm_ratio": 0.0, "clip_norm": None}, False),
    ],
)
def test_rounds_of_a_version_without_bounds_are_known_where_there_is_none(tmp_path, flags, is_known):
    text = json.dumps({"clip_norm": flags["clip_norm"], "files changed at": 1}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    identity = {**flags, "files changed at": 1, "files contents": "a"}
    replace_tensors(tmp_path / STATE_FILE, {"weight.w": torch.ones(2)}, {"identity": digest, "records": "[]"})
    if is_known:
        assert load_state(tmp_path, identity) is not None
    for metadata in ({"records": "[]"}, {"identity": digest, "records": "[]"}):
        replace_tensors(tmp_path / STATE_FILE, {"weight.w": torch.ones(2)}, metadata)
        with pytest.raises(InputError, match="holds rounds of another run"):
            load_state(tmp_path, identity if not is_known or "identity" not in metadata else {**identity, "rate": 1})


@pytest.mark.parametrize(
    ("more", "message"), [({"participation": 1.5}, "--participation 1.5"), ({"min_organisations": 5}, "1 to 4")]
)
def test_settings_that_no_federation_can_follow(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **more)


def moving(change, tokens=1, count=1):
    """Organisations that send the same change in every round."""
    return {
        name: lambda number, weights, name=name: Update(name, {"w": change.clone()}, tokens, 1, "base")
        for name in NAMES[:count]
    }


def rounds_of(folder, learners, num_rounds, begun, server="fedavg", rate=1.0, transport=None, sum=None, **more):
    settings = RoundSettings(num_rounds, **more)
    transport = transport or InProcess(learners, "base")
    optimizer = server_optimizer(server, rate)
    rounds = (transport, list(learners), {"w": begun}, optimizer, settings, folder, {})
    return run_rounds(*rounds, **({} if sum is None else {"new_sum": lambda number: sum()}))


def test_moves_that_bfloat16_cannot_hold_add_up(tmp_path):
    change, sent = torch.full((4,), 0.003, dtype=torch.bfloat16), []
    learners = moving(change)
    send = learners["a"]

    def seen(number, weights):
        sent.append(weights["w"])
        return send(number, weights)

    begun = torch.ones(4, dtype=torch.bfloat16)
    # With an interruption: what is kept is not rounded either.
    rounds_of(tmp_path, {"a": seen}, 10, begun)
    state = rounds_of(tmp_path, {"a": seen}, 40, begun)
    expected = 1 + 40 * float(change[0])
    assert state.weights["w"].dtype == torch.float32 and state.weights["w"][0].item() == pytest.approx(expected, 1e-6)
    assert {each.dtype for each in sent} == {torch.bfloat16} and sent[-1][0].item() == pytest.approx(1.12, abs=0.01)


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    learners = {"a": moving(torch.full((5,), 0.5))["a"], "b": moving(torch.full((5,), 3e38), count=2)["b"]}
    with pytest.raises(InputError, match=r"round 2: w would be infinite .* norms of updates: b 6\.7\de\+38, a 1\.12"):
        rounds_of(tmp_path, learners, 9, torch.zeros(5), server="momentum", sum=WeightedSum)
    kept = load_state(tmp_path, {})
    assert len(kept.records) == 1 and kept.weights["w"].isfinite().all()


def test_figures_that_are_not_finite_are_not_kept(tmp_path):
    with pytest.raises(InputError, match="round 1: loss is nan"):
        run(tmp_path, evaluate=lambda number, weights: {"loss": float("nan")})
    assert load_state(tmp_path, {"flags": ("x",)}) is None


def test_an_organisation_cannot_claim_more_tokens_than_a_round_has(tmp_path):
    learners = {**moving(torch.ones(5), tokens=96), "b": moving(torch.full((5,), 9.0), 97, 2)["b"]}
    transport = InProcess(learners, "base")
    transport.max_tokens = 96
    state = rounds_of(tmp_path, learners, 1, torch.zeros(5), transport=transport)
    assert state.records[0].left_out == {"b": "organisation 'b': num_tokens is 97; a round has at most 96"}
    assert state.weights["w"].tolist() == [1] * 5


def private_rounds(folder, learners, draws, monkeypatch, num_rounds):
    monkeypatch.setattr(rounds_file, "draw_participants", lambda names, rate: draws.pop(0))
    settings, transport = RoundSettings(num_rounds, participation=0.5, is_private=True), InProcess(learners, "base")
    begun = {"w": torch.zeros(5)}
    return run_rounds(
        *(transport, list(learners), begun, server_optimizer(), settings, folder, {}),
        new_sum=lambda number: ClippedSum(1.0, 0.0, 2, begun, "base"),
    )


def test_private_rounds_ask_whom_chance_names_and_tell_nobody(tmp_path, monkeypatch):
    learners = moving(torch.tensor([2.0, 0, 0, 0, 0]), count=4)
    state = private_rounds(tmp_path, learners, [[], ["b"], ["a", "c", "d"]], monkeypatch, 3)
    # Clipped to 1 and divided by 2, whoever came: 0, 1 and 3 of them.
    assert state.weights["w"].tolist() == [2.0, 0, 0, 0, 0]
    for record in state.records:
        about = (record.participants, record.left_out, record.num_tokens, record.bytes_down, record.bytes_up)
        assert about == ([], {}, 0, 0, 0)
    assert [record.update_norm for record in state.records] == [0, 0.5, 1.5]


def test_noise_alone_is_not_trained_when_all_that_were_asked_fail(tmp_path, monkeypatch):
    def out(number, weights):
        raise InputError("the power is out")

    learners = moving(torch.ones(5)) | {"b": out}
    with pytest.raises(InputError, match=r"round 2: 0 of 1 organisations .*b: the power is out"):
        private_rounds(tmp_path, learners, [["a", "b"], ["b"]], monkeypatch, 2)
    assert len(load_state(tmp_path, {}).records) == 1


def test_a_round_asks_as_many_as_it_needs():
    for participation, needed, is_private, count in ((0.5, 3, False, 3), (0.5, 1, False, 2), (0.5, 1, True, 2)):
        settings = RoundSettings(1, participation, needed, is_private=is_private)
        assert num_asked(4, settings) == count
        if not is_private:
            assert len(participants_of(NAMES, 1, settings)) == count


def targets(hostile=None):
    """Six organisations that step towards targets near each other; the last one may send 1e30."""
    goals = {f"org{place}": 1 + 0.1 * torch.arange(5.0) + 0.2 * place for place in range(6)}

    def of(name):
        def learn(number, weights):
            change = 0.5 * (goals[name] - weights["w"])
            if hostile and name == "org5":
                change = hostile(number, change)
            return Update(name, {"w": change}, 10, 1, "base")

        return learn

    return {name: of(name) for name in goals}, torch.stack([goals[f"org{place}"] for place in range(5)]).mean(0)


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_by_default_one_organisation_does_not_own_the_weights(tmp_path, compression):
    learners, honest = targets(lambda number, change: torch.full((5,), 1e30))
    transport = InProcess(learners, "base", compression)
    state = rounds_of(tmp_path / "bounded", learners, 12, torch.zeros(5), transport=transport)
    # It holds the others off by its share of twice a step, which is about the width of their targets.
    assert (state.weights["w"] - honest).abs().max() < 0.5
    assert all("org5" in record.bounded for record in state.records)
    assert re.fullmatch(r"a norm of 2\.24e\+30, scaled to \d.*", state.records[0].bounded["org5"])
    owned = rounds_of(tmp_path / "not", learners, 1, torch.zeros(5), transport=transport, sum=WeightedSum)
    assert owned.weights["w"].min() > 1e28


def test_what_is_measured_by_rounds_before_survives_an_interruption(tmp_path):
    """Later rounds hear of the hostile one only."""

    def learners(out_from):
        found, _ = targets(lambda number, change: torch.full((5,), 1e6) if number > 2 else change)

        def of(name, learn):
            def out(number, weights):
                if number > out_from and name != "org5":
                    raise InputError("the power is out")
                return learn(number, weights)

            return out

        return {name: of(name, learn) for name, learn in found.items()}

    whole = bits(rounds_of(tmp_path / "whole", learners(2), 4, torch.zeros(5)))
    rounds_of(tmp_path / "parts", learners(2), 2, torch.zeros(5))
    assert bits(rounds_of(tmp_path / "parts", learners(2), 4, torch.zeros(5))) == whole
    records = whole[1]
    assert list(records[2]["bounded"]) == ["org5"] and len(records[2]["left_out"]) == 5
    assert records[2]["update_norm"] == pytest.approx(2 * records[1]["typical_norm"], rel=1e-5)


def test_an_update_that_is_sent_again_is_left_out_and_named(tmp_path):
    kept = {}

    def replayed(number, weights):
        return kept.setdefault("first", replace(learners["a"](number, weights), round=number))

    learners = moving(torch.ones(5), count=3)
    state = rounds_of(tmp_path, {**learners, "a": replayed}, 2, torch.zeros(5))
    assert [record.left_out for record in state.records] == [
        {},
        {"a": "organisation 'a' sent an update of round 1; expected one of round 2"},
    ]

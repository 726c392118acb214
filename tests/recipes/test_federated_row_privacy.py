"""Row-level privacy in the federated recipe: counted, of its size, answered once, and the same for every node."""

import pytest
import torch
from test_federated_machines import frozen_learner, zeros_of
from test_federated_recipe import Stopped, flags, moved_by, nothing_held, run, table_text  # noqa: F401

from hfllm.errors import InputError
from hfllm.federation.privacy import epsilon_of
from hfllm.runs.lock import release_all

PRIVATE = {"row_clip_norm": 0.5, "row_noise_multiplier": 0.7, "delta": 0.01}


@pytest.mark.slow
def test_epsilon_is_counted_and_a_round_that_is_done_again_sends_the_same(flags, tmp_path, monkeypatch):  # noqa: F811
    from hfllm.federation.learner import LocalLearner

    learn, calls = LocalLearner.learn, []

    def stopping(self, *args, **kwargs):
        calls.append(args[4])
        if len(calls) == 5:
            raise Stopped
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(LocalLearner, "learn", stopping)
    more = {**PRIVATE, "rounds": 2, "average": "lora_frozen_a", "lora_r": 2, "compression": "int8"}
    with pytest.raises(Stopped):
        run(flags(**more))
    release_all()
    answers = {path.name: path.read_bytes() for path in (tmp_path / "out" / "answered").iterdir()}
    metrics = run(flags(**more))
    # The first organisation of the second round had answered, the second had not.
    assert calls == [f"42-{name}" for name in ("shop", "school", "farm", "shop", "school", "school", "farm")]
    assert (tmp_path / "out" / "answered" / "shop.safetensors").read_bytes() == answers["shop.safetensors"]
    # The hash of its prompt holds out one of the school's five rows.
    rows = {"shop": 4, "school": 4, "farm": 2}
    expected = {name: epsilon_of(min(1, 2 / count), 0.7, 4, 0.01) for name, count in rows.items()}
    assert metrics["row_epsilon"] == expected["farm"] > expected["school"] and "epsilon" not in metrics
    text = table_text(tmp_path / "out")
    assert "What all rounds reveal of one row (delta 0.01)" in text and "row-level epsilon of at most" in text
    for name, count in rows.items():
        assert f"| {name} | {count} | {expected[name]:.4g}"[:18] in text
    assert "drift" in metrics and "bytes_up" in metrics


@pytest.mark.slow
def test_what_was_answered_outlives_the_rounds(flags, tmp_path):  # noqa: F811
    from hfllm.federation.rounds import STATE_FILE

    more = {**PRIVATE, "rounds": 1, "local_steps": 1, "average": "lora_frozen_a", "lora_r": 2}
    run(flags(**more))
    for path in [*(tmp_path / "out").glob("*.json"), tmp_path / "out" / STATE_FILE]:
        path.unlink()
    release_all()
    with pytest.raises(InputError, match=r"round 1 was answered to other weights or settings.*remove .*answered"):
        run(flags(**more, learning_rate=0.02))


@pytest.mark.slow
def test_noise_is_of_its_size_and_organisations_count_alike(flags, saved, tmp_path, monkeypatch):  # noqa: F811
    from hfllm.stages.federated.build import Server

    updates, new_sum = [], Server.new_sum

    def watching(*args):
        total = new_sum(*args)
        add = total.add
        total.add = lambda update: (updates.append(update), add(update))
        return total

    monkeypatch.setattr(Server, "new_sum", watching)
    once = {"rounds": 1, "local_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
    run(flags(**once, row_clip_norm=0.01, row_noise_multiplier=20.0, delta=0.01, lr_scheduler_type="constant"))
    moved, values = moved_by(tmp_path / "out", saved)
    # Of three organisations, each of which expects 2 rows in a step.
    deviation = 0.5 * 0.01 * 20 * (3 * (1 / 2) ** 2) ** 0.5 / 3
    assert moved == pytest.approx(deviation * values**0.5, rel=0.03)
    assert [(each.num_tokens, each.num_rows) for each in updates] == [(1, 1)] * 3


@pytest.mark.slow
def test_a_node_of_other_privacy_refuses_and_counts_its_own(saved, tmp_path, capsys):
    make = frozen_learner(saved, tmp_path, "a", **PRIVATE, max_epsilon=50)
    learner = make(row_clip_norm=0.5, row_noise_multiplier=0.7)
    assert "federated: a: a row-level epsilon of" in capsys.readouterr().out
    client = next(cell.cell_contents for cell in learner.__closure__ if callable(cell.cell_contents))
    weights = zeros_of(client)
    first, again = (learner(1, weights) for _ in range(2))
    assert first.num_tokens == 1
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    for name, value in {"row_clip_norm": 1.0, "row_noise_multiplier": 0.0}.items():
        with pytest.raises(InputError, match=rf"--{name} is .* here and {value} at the server"):
            make(**{name: value})
    with pytest.raises(InputError, match="row-level epsilon of organisation 'a' would be"):
        frozen_learner(saved, tmp_path, "a", **PRIVATE, max_epsilon=0.1)()


@pytest.mark.slow
@pytest.mark.turn(7)
def test_processes_answer_once_too(flags, tmp_path):  # noqa: F811
    metrics = run(flags(**PRIVATE, processes=2))
    assert metrics["row_epsilon"] > 0 and metrics["updates_left_out"] == 0
    assert len(list((tmp_path / "out" / "answered").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"row_noise_multiplier": 1}, "--row_noise_multiplier"),
        ({"row_clip_norm": 0}, "row_clip_norm is 0"),
        ({"row_clip_norm": 1, "row_noise_multiplier": -1}, "row_noise_multiplier is -1"),
        ({"row_clip_norm": 1, "max_epsilon": 1}, "--max_epsilon"),
        ({"row_clip_norm": 1, "delta": 0.01}, "--delta"),
        ({**PRIVATE, "max_epsilon": 1}, "row-level epsilon of organisation 'farm' would be"),
        ({**PRIVATE, "delta": 0.9}, "expected below 1 / rows"),
    ],
)
def test_bad_flags_of_row_privacy_are_refused_in_a_line(flags, more, message):  # noqa: F811
    with pytest.raises(InputError) as error:
        run(flags(**more))
    assert message in str(error.value) and "\n" not in str(error.value)

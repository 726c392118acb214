"""The federated recipe between machines, but for the machines: what nodes and server must have in common."""

import json

import pytest
from test_federated_recipe import WORDS, row, run

from hfllm.errors import InputError


def frozen_learner(saved, folder, name, **more):
    from hfllm.stages.federated.build import worker_learner

    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(word)) + "\n" for word in WORDS[0]))
    flags = {"model_name_or_path": str(saved), "organisation_names": ["a", "b"], "output_dir": str(folder / name)}
    flags |= {"average": "lora_frozen_a", "lora_r": 4, "rounds": 1, "local_steps": 1, "max_length": 64, **more}
    (folder / f"{name}.yaml").write_text(json.dumps({**flags, "controls": ["none"]}))
    settings = {"flags": str(folder / f"{name}.yaml"), "base": str(saved), "rows": str(folder / f"{name}.jsonl")}
    return lambda **terms: worker_learner(name, {**settings, "terms": terms})


@pytest.mark.slow
def test_a_frozen_factor_or_a_scale_that_differs_is_another_base(saved, tmp_path):
    from hfllm.federation.transports import InProcess
    from hfllm.federation.updates import Failure

    first = frozen_learner(saved, tmp_path, "a")()
    base, weights = first(1, zeros_of(first)).base_sha256, zeros_of(first)
    for more in ({"seed": 43}, {"lora_alpha": 64}, {}):
        other = frozen_learner(saved, tmp_path, "b", **more)()
        replies = list(InProcess({"a": first, "b": other}, base).run_round(1, weights, ["a", "b"]))
        assert not isinstance(replies[0], Failure) and isinstance(replies[1], Failure) == bool(more)
        if more:
            assert "'b' began from another base model" in replies[1].reason


def zeros_of(learner):
    """Weights that a learner of the tests takes: those of its adapter."""
    local = next(cell.cell_contents for cell in learner.__closure__ if hasattr(cell.cell_contents, "weights"))
    return local.weights()


def test_a_node_refuses_the_terms_of_another_run(saved, tmp_path):
    make = frozen_learner(saved, tmp_path, "a")
    make(local_steps=1, rounds=1, average="lora_frozen_a", compression="none", seed=42)
    for name, value in {"local_steps": 2, "rounds": 2, "average": "full", "compression": "int8", "seed": 7}.items():
        with pytest.raises(InputError, match=f"--{name} is .* here and {value} at the server"):
            make(**{name: value})


def test_the_app_and_the_flags_must_have_one_compression(saved, tmp_path):
    from hfllm.stages.federated.build import loop

    file = tmp_path / "server.yaml"
    file.write_text(json.dumps({"model_name_or_path": str(saved), "organisation_names": ["a"], "compression": "none"}))
    with pytest.raises(InputError, match="--compression int8 of the app, none of"):
        loop(None, {"flags": str(file), "compression": "int8"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "2"], "--processes"),
        (["--round_timeout", "9"], "--round_timeout"),
        (["--organisation_names", "a", "b", "a"], "--organisation_names: 'a' comes twice"),
    ],
)
def test_bad_flags_between_machines_are_refused_in_a_line(saved, tmp_path, more, message):
    words = ["--model_name_or_path", saved, "--output_dir", tmp_path / "out", "--controls", "none"]
    with pytest.raises(InputError, match=message):
        run([*words, "--organisation_names", "a", "b", *more])

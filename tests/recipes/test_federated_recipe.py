"""The federated recipe in miniature: exact against a step on pooled rows, resumed, with organisations that fail."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import federated
import kill_run
import pytest
import torch
import yaml
from killed import Killed
from safetensors.torch import load_file
from tiny_stages import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfllm.errors import InputError
from hfllm.federation.rounds import STATE_FILE
from hfllm.runs import schedule
from hfllm.runs.lock import LOCK_FILE, release_all

WORDS = (("red", "blue", "one", "two"), ("three", "four", "five", "six", "red and blue"), ("white", "black and red"))
NAMES = ("shop", "school", "farm")
ROUNDS = "hfllm.federation.rounds"


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


def row(word):
    return {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}


@pytest.fixture
def flags(saved, tmp_path):
    """The words of a tiny run of three organisations on files, with more flags."""
    for name, words in zip(NAMES, WORDS, strict=True):
        text = "".join(json.dumps(row(word)) + "\n" for word in words)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def make(**more):
        values = {
            "model_name_or_path": saved,
            "output_dir": tmp_path / "out",
            **{"average": "full", "rounds": 3, "local_steps": 2, "per_device_train_batch_size": 2, "max_length": 64},
            **{"controls": "none", "learning_rate": 0.01, **more},
        }
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        return ["--organisation_files", *(str(tmp_path / f"{name}.jsonl") for name in NAMES), *words]

    return make


def run(words):
    schedule._job = None
    return federated.main(*federated.parse(list(map(str, words))))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def table_text(folder):
    return " ".join((folder / "report.md").read_text().split())


def weights_of(folder):
    return load_file(next(iter(sorted(folder.glob("*model.safetensors")))))


def digest(folder):
    return hashlib.sha256(next(iter(sorted(folder.glob("*model.safetensors")))).read_bytes()).hexdigest()


def central_step(folder, rows, rate):
    """One step of gradient descent on the mean over all targets of all rows, written out."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    total, count = 0.0, 0
    for each in rows:
        prompt = tokenizer.apply_chat_template(each["messages"][:1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(each["messages"], tokenize=False).rstrip("\n")
        ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
        begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        logits = model(ids).logits[0, begin - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, begin:], reduction="sum")
        count += len(ids[0]) - begin
    (total / count).backward()
    return {name: (value - rate * value.grad).detach() for name, value in model.named_parameters()}


@pytest.mark.slow
def test_one_round_of_one_step_is_the_step_on_pooled_rows(flags, saved, tmp_path, monkeypatch):
    # Nothing held out, and each organisation's rows are one batch.
    monkeypatch.setattr("hfllm.stages.federated.build.hold_out", all_learned)
    one_step = {"rounds": 1, "local_steps": 1, "optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5}
    run(flags(**one_step, lr_scheduler_type="constant", per_device_train_batch_size=2, gradient_accumulation_steps=1))
    # Batches of two: the first two rows of each order; with all rows the order does not count.
    run(flags(**one_step, lr_scheduler_type="constant", per_device_train_batch_size=8, output_dir=tmp_path / "all"))
    expected = central_step(saved, [row(word) for words in repeated(WORDS, 8) for word in words], 0.5)
    found = weights_of(tmp_path / "all")
    begun = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    moved = max((expected[name] - begun[name]).abs().max() for name in found if name in expected)
    worst = max((found[name] - expected[name]).abs().max() for name in found if name in expected)
    assert moved > 0.01 and worst < 1e-5 * moved + 1e-6
    # Another batch is another step.
    assert max((weights_of(tmp_path / "out")[name] - found[name]).abs().max() for name in found) > 1e-3


def all_learned(name, rows, seed, is_private):
    from hfllm.federation.organisations import Organisation

    return Organisation(name, list(rows), [])


def repeated(words, size):
    """What a batch of `size` rows has of few rows: passes one after the other, here in whole and part by the order."""
    from hfllm.federation.learner import row_indices

    return [
        [each[index] for index in row_indices(len(each), size, 0, f"42-{name}")]
        for name, each in zip(NAMES, words, strict=True)
    ]


class Stopped(BaseException):
    """In place of SIGKILL."""


@pytest.mark.slow
@pytest.mark.parametrize("average", ["full", "lora_frozen_a"])
def test_a_run_that_was_stopped_within_a_round_resumes_to_the_same_bits(flags, tmp_path, monkeypatch, capsys, average):
    from hfllm.federation.learner import LocalLearner

    more = {"average": average, "keep_optimizer": True, "server_optimizer": "fedadam", "participation": 0.6}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    metrics = run(flags(**more, output_dir=whole))
    learn, calls = LocalLearner.learn, []

    def stopping(self, *args, **kwargs):
        calls.append(args)
        # The second organisation of the second round and, later, the first of the third.
        if len(calls) in (4, 7):
            raise Stopped
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(LocalLearner, "learn", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            run(flags(**more, output_dir=stopped))
        release_all()
        # As a copy, an editor or `touch` does: what the files hold is the same.
        for path in tmp_path.glob("*.jsonl"):
            os.utime(path, ns=(1, 1))
    capsys.readouterr()
    assert run(flags(**more, output_dir=stopped)) == metrics
    printed = capsys.readouterr().out
    assert "round 3/3" in printed and "round 1/3" not in printed and "round 2/3" not in printed
    assert digest(stopped) == digest(whole)
    assert load_file(stopped / STATE_FILE).keys() == load_file(whole / STATE_FILE).keys()
    for name, value in load_file(whole / STATE_FILE).items():
        assert torch.equal(value, load_file(stopped / STATE_FILE)[name]), name


@pytest.mark.slow
def test_a_process_that_is_killed_resumes_to_the_same_bits(flags, tmp_path, processes):
    more = {"server_optimizer": "momentum", "keep_optimizer": True, "compression": "int8"}
    run(flags(**more, output_dir=tmp_path / "whole"))
    killed = flags(**more, output_dir=tmp_path / "killed")
    for place, number in (("hfllm.federation.learner:LocalLearner.learn", 6), (f"{ROUNDS}:save_state", 1)):
        processes.run(Path(kill_run.__file__), place, number, "federated", *killed, code=-signal.SIGKILL)
    processes.run(Path(kill_run.__file__), "none", 0, "federated", *killed)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert report_of(tmp_path / "killed")["metrics"] == report_of(tmp_path / "whole")["metrics"]


@pytest.mark.slow
def test_a_server_without_rows_comes_to_the_same_bits(flags, saved, tmp_path):
    """As between machines, but for the machines: organisations know their own rows, the server none."""
    from hfllm.federation.transports import InProcess
    from hfllm.stages.federated.build import loop, worker_learner

    run(flags(rounds=2, output_dir=tmp_path / "one"))
    common = {"model_name_or_path": str(saved), "average": "full", "rounds": 2, "local_steps": 2, "max_length": 64}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "controls": ["none"]}
    for name in ("server", "node"):
        there = {"organisation_names": list(NAMES), "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | there))

    def connect(base_sha256):
        settings = {"flags": str(tmp_path / "node.yaml"), "base": str(saved)}
        own = {name: {**settings, "rows": str(tmp_path / f"{name}.jsonl")} for name in NAMES}
        return InProcess({name: worker_learner(name, own[name]) for name in NAMES}, base_sha256)

    schedule._job = None
    loop(connect, {"flags": str(tmp_path / "server.yaml")})
    assert digest(tmp_path / "server") == digest(tmp_path / "one")
    with pytest.raises(InputError, match="'shop' has no rows here"):
        worker_learner("shop", {"flags": str(tmp_path / "node.yaml"), "base": str(saved)})
    with pytest.raises(InputError, match="names no file of flags"):
        loop(connect, {})


@pytest.mark.slow
@pytest.mark.turn(6)
def test_several_processes_come_to_the_same_bits(flags, tmp_path):
    run(flags(compression="int8", output_dir=tmp_path / "one"))
    run(flags(compression="int8", output_dir=tmp_path / "several", processes=2))
    assert digest(tmp_path / "one") == digest(tmp_path / "several")


@pytest.mark.slow
def test_organisations_that_fail_or_send_nan_are_left_out_and_named(flags, tmp_path, monkeypatch):
    from hfllm.stages.federated import build as federated_build

    clients_of = federated_build.clients_of

    def failing(*args):
        clients = clients_of(*args)
        shop, school, farm = (clients[name] for name in NAMES)

        def wrong(number, weights):
            if number == 1:
                raise ValueError("not of InputError's kind")
            return farm(number, weights)

        def late(number, weights):
            if number == 2:
                raise InputError("the power is out")
            update = shop(number, weights)
            # Two steps of two rows of at most 64 tokens.
            return replace(update, num_tokens=257) if number == 3 else update

        def diverged(number, weights):
            update = school(number, weights)
            if number == 3:
                next(iter(update.tensors.values()))[0] = float("nan")
            return update

        return clients | {"shop": late, "school": diverged, "farm": wrong}

    monkeypatch.setattr(federated_build, "clients_of", failing)
    metrics = run(flags())
    assert metrics["updates_left_out"] == 4
    text = table_text(tmp_path / "out")
    assert "| 1 | farm | the learner of organisation 'farm' failed by ValueError; the log above has" in text
    assert "num_tokens is 257; a round has at most 256" in text and "| 2 | shop | the power is out |" in text
    assert "| 3 | school |" in text and "NaN" in text
    with pytest.raises(
        InputError, match=r"round 1: 2 of 3 organisations sent an update, and --min_organ.*farm: the learner of"
    ):
        run(flags(min_organisations=3, output_dir=tmp_path / "strict"))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["mean", "median"])
def test_one_organisation_of_three_does_not_own_the_model(flags, saved, tmp_path, monkeypatch, aggregation):
    from hfllm.stages.federated import build as federated_build

    honest = run(flags(rounds=1, aggregation=aggregation))
    length = moved_by(tmp_path / "out", saved)[0]
    assert honest["updates_bounded"] == 0 and "Bounded" not in table_text(tmp_path / "out")
    if aggregation == "mean":
        # The bound has not acted: the bits are those without one.
        run(flags(rounds=1, max_norm_ratio=0, output_dir=tmp_path / "free"))
        assert digest(tmp_path / "free") == digest(tmp_path / "out")
    clients_of = federated_build.clients_of

    def hostile(number, weights):
        tensors = {name: torch.full_like(value, 1e30) for name, value in weights.items()}
        return replace(shop[0](number, weights), tensors=tensors)

    shop = []

    def with_one(*args):
        clients = clients_of(*args)
        shop.append(clients["shop"])
        return clients | {"shop": hostile}

    monkeypatch.setattr(federated_build, "clients_of", with_one)
    metrics = run(flags(rounds=1, aggregation=aggregation, output_dir=tmp_path / "hostile"))
    assert metrics["updates_bounded"] == 1 and "| 1 | shop | a norm of " in table_text(tmp_path / "hostile")
    # By its share of twice the length of the others.
    assert moved_by(tmp_path / "hostile", saved)[0] < 2 * length


def test_rounds_on_files_leave_an_adapter_a_report_and_bytes(flags, tmp_path):
    from hfllm.federation.updates import weights_to_bytes

    metrics = run(flags(average="lora_frozen_a", lora_r=4, controls="local"))
    folder = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(folder)
    report, text = report_of(folder), table_text(folder)
    assert report["metrics"] == metrics and not list(folder.rglob(LOCK_FILE)) and not list(folder.rglob("*.tmp*"))
    state = {name: value for name, value in load_file(folder / STATE_FILE).items() if name.startswith("weight.")}
    one = len(weights_to_bytes({name.removeprefix("weight."): value for name, value in state.items()}))
    assert metrics["bytes_down"] == 3 * 3 * one
    assert abs(metrics["bytes_up"] - metrics["bytes_down"]) < 3 * 3 * 400
    assert not any("lora_A" in name for name in state) and any("lora_B" in name for name in state)
    for name in NAMES:
        assert f"| {name} |" in text
    assert metrics["held_out_loss_federated"] < metrics["held_out_loss_untrained"]
    for name in ("held_out_loss_by_round", "held_out_loss_by_bytes", "drift"):
        assert (folder / report["artifacts"][name]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_world_from_nothing(tmp_path, capsys):
    config = tmp_path / "pretrain.yaml"
    config.write_text(yaml.safe_dump(TINY["pretrain"]))
    words = ["--pretrain_config", config, "--output_dir", tmp_path / "out", "--rounds", 2, "--num_examples", 24]
    words += ["--num_organisations", 3, "--num_eval_prompts", 12, "--local_steps", 1]
    metrics = run(words)
    arms = {"federated", "untrained", "central", "equal_steps", "local_best"}
    assert metrics.keys() >= {f"gold_{arm}{end}" for arm in arms for end in ("", "_se", "_n")}
    assert metrics["organisations"] == 3 and metrics["rounds"] == 2
    assert {"gold_by_round", "gold_by_bytes"} <= report_of(tmp_path / "out")["artifacts"].keys()
    assert run(words) == metrics
    assert "federated: already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="finished run with rounds=2, this one has rounds=3"):
        run([*words, "--rounds", 3])


def moved_by(folder, saved):
    begun, found = AutoModelForCausalLM.from_pretrained(saved).state_dict(), weights_of(folder)
    squares = sum((found[name].double() - begun[name].double()).square().sum() for name in found)
    return float(squares.sqrt()), sum(value.numel() for value in found.values())


@pytest.mark.slow
def test_noise_is_counted_and_of_its_size_and_nobody_is_named(flags, saved, tmp_path, capsys, monkeypatch):
    from hfllm.federation import rounds

    # Who takes part is drawn: let it be all but one.
    monkeypatch.setattr(rounds, "draw_participants", lambda names, rate: list(names[:2]))
    metrics = run(flags(clip_norm=0.01, noise_multiplier=30.0, rounds=1, max_epsilon=8))
    assert 0 < metrics["epsilon"] < 8
    moved, values = moved_by(tmp_path / "out", saved)
    # The noise outweighs what two organisations of norm .01 can add by far; its norm has an error of 1 / sqrt(2 d).
    assert moved == pytest.approx(30.0 * 0.01 * values**0.5 / 3, rel=0.03)
    printed = capsys.readouterr().out
    assert "times the longest mean of 3 organisations" in printed and "round 1/1  private" in printed
    assert not metrics.keys() & {"bytes_up", "bytes_down", "updates_left_out", "drift"}
    text, report = table_text(tmp_path / "out"), report_of(tmp_path / "out")
    assert "MB so far" not in text and "the controls' figures are not private" in text
    assert "organisations after 1 round and an epsilon of" in report["summary"]
    assert "held_out_loss_by_round" in report["artifacts"]
    assert "held_out_loss_by_bytes" not in report["artifacts"]


@pytest.mark.slow
def test_clipping_alone_is_by_the_number_that_was_asked(flags, saved, tmp_path):
    # A round asks all three, as many as it needs: the mean of three clipped changes.
    few = {"participation": 0.3, "min_organisations": 3, "clip_norm": 1e-3, "rounds": 1}
    metrics = run(flags(**few))
    moved, _ = moved_by(tmp_path / "out", saved)
    run(flags(**few | {"participation": 1}, output_dir=tmp_path / "all"))
    assert 0 < moved <= 1e-3 + 1e-6 and moved == moved_by(tmp_path / "all", saved)[0] and "epsilon" not in metrics


def test_rows_that_another_organisation_learns_are_not_held_out(tmp_path):
    from hfllm.data.loading import prompt_key
    from hfllm.stages.federated.build import organisations_of

    # Each question comes three times, which dealing out puts at two or three organisations.
    words = [f"{place} {answer}" for place in range(60) for answer in "abc"]
    rows = [
        {"messages": [{"role": "user", "content": word.split()[0]}, {"role": "assistant", "content": word}]}
        for word in words
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    args = ["--dataset_name", tmp_path / "rows.jsonl", "--num_organisations", 2, "--model_name_or_path", "x"]
    found = organisations_of(federated.parse(list(map(str, args)))[0], 1)
    learned = {prompt_key(each) for organisation in found for each in organisation.rows}
    held_out = [prompt_key(each) for organisation in found for each in organisation.held_out]
    assert held_out and not learned & set(held_out) and sum(len(each.rows) for each in found) > 150


@pytest.mark.slow
def test_batches_in_parts_are_batches_in_one(flags, saved, tmp_path):
    """By the trainer that the recipe has: the parts have unlike numbers of targets."""
    once = {"rounds": 1, "local_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    run(flags(**once, per_device_train_batch_size=4))
    run(flags(**once, per_device_train_batch_size=1, gradient_accumulation_steps=4, output_dir=tmp_path / "parts"))
    one, parts = weights_of(tmp_path / "out"), weights_of(tmp_path / "parts")
    moved, _ = moved_by(tmp_path / "out", saved)
    assert moved > 0.01 and max((one[name] - parts[name]).abs().max() for name in one) < 1e-5


def test_a_worker_reads_its_own_file_alone(flags, saved, tmp_path, monkeypatch):
    from hfllm.stages.federated import build as federated_build
    from hfllm.stages.federated.build import worker_learner

    flags()
    files = [str(tmp_path / f"{name}.jsonl") for name in NAMES]
    (tmp_path / "farm.jsonl").unlink()
    given = {"model_name_or_path": str(saved), "organisation_files": files, "output_dir": str(tmp_path / "node")}
    (tmp_path / "node.yaml").write_text(json.dumps({**given, "average": "full", "max_length": 64}))
    seen, load_local = [], federated_build.load_local
    monkeypatch.setattr(federated_build, "load_local", lambda *args: seen.append(args[-1]) or load_local(*args))
    worker_learner("school", {"flags": str(tmp_path / "node.yaml"), "base": str(saved)})
    assert [each.name for each in seen[0]] == ["school"] and len(seen[0][0].rows) + len(seen[0][0].held_out) == 5


@pytest.mark.slow
def test_states_of_removed_rounds_are_not_used(flags, tmp_path):
    more = {"keep_optimizer": True, "compression": "int8", "optim": "adamw_torch"}
    run(flags(**more, output_dir=tmp_path / "fresh"))
    run(flags(**more, learning_rate=0.1))
    release_all()
    kept = tmp_path / "out" / "organisations"
    assert list(kept.rglob("*.safetensors"))
    stray = kept / "optimizers" / "gone" / "1.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    for path in (tmp_path / "out").glob("*.json"):
        path.unlink()
    (tmp_path / "out" / STATE_FILE).unlink()
    run(flags(**more))
    assert not stray.exists() and digest(tmp_path / "out") == digest(tmp_path / "fresh")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rounds": 0}, "--rounds 0: expected at least 1"),
        ({"participation": 0}, "--participation 0.0: expected a share above 0"),
        ({"min_organisations": 4}, "--min_organisations 4: expected 1 to 3"),
        ({"dirichlet_alpha": 0.5}, "--dirichlet_alpha"),
        ({"noise_multiplier": 1.0}, "--noise_multiplier"),
        ({"controls": "pooled"}, "--controls 'pooled': expected some of central, equal_steps, local, or none"),
        ({"max_steps": 5}, "--max_steps"),
        ({"dataset_name": "x.jsonl"}, "--dataset_name"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"proximal_mu": -1}, "--proximal_mu -1"),
        ({"clip_norm": 1, "noise_multiplier": 1, "max_epsilon": 1}, "epsilon would be"),
        ({"noise_multiplier": 1, "clip_norm": 1, "min_organisations": 2}, "--min_organisations"),
        ({"max_epsilon": 1}, "--max_epsilon"),
        ({"trim": 0.1}, "--trim"),
        ({"aggregation": "trimmed_mean", "trim": 0.5}, "--trim 0.5: expected a share of at least 0, below 0.5"),
        ({"max_norm_ratio": 0.9}, "--max_norm_ratio 0.9: expected a number of at least 1, or 0"),
        ({"max_norm_ratio": 3, "clip_norm": 1}, "--max_norm_ratio"),
        ({"aggregation": "median", "clip_norm": 1}, "--aggregation"),
        ({"server_momentum": 1.0, "server_optimizer": "momentum"}, "momentum of the server's optimizer is 1.0"),
        ({"organisation_names": "a"}, "--organisation_names"),
        ({"use_peft": True}, "--use_peft"),
        ({"clip_norm": 0}, "--clip_norm is 0"),
        ({"clip_norm": "nan"}, "--clip_norm nan"),
        ({"keep_optimizer": True, "optim": "adafactor"}, "--keep_optimizer"),
        ({"fp16": True}, "--fp16"),
        ({"round_timeout": 5}, "--round_timeout"),
        ({"server_momentum": 0.5}, "--server_momentum"),
        ({"num_examples": 5}, "--num_examples"),
        ({"main_share": 0.5}, "--main_share"),
        ({"num_eval_prompts": 5}, "--num_eval_prompts"),
        ({"num_organisations": 3}, "--num_organisations"),
        ({"num_train_epochs": 1}, "--num_train_epochs"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"neftune_noise_alpha": 5}, "--neftune_noise_alpha"),
    ],
)
def test_bad_flags_are_refused_in_a_line(flags, more, message):
    with pytest.raises(InputError) as error:
        run(flags(**more))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_organisation_without_rows_is_refused(flags, tmp_path):
    (tmp_path / "farm.jsonl").write_text("")
    words = flags()
    with pytest.raises(InputError, match=r"farm\.jsonl") as error:
        run(words)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / STATE_FILE).exists()


# ---- killed, see killed.py ----


def killed_flags(files):
    names = []
    for name in ("shop", "school"):
        turns = [{"role": "user", "content": f"Say {name}."}, {"role": "assistant", "content": name}]
        (files.folder / f"{name}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
        names.append(str(files.folder / f"{name}.jsonl"))
    sizes = ["--rounds", "3", "--local_steps", "1", "--per_device_train_batch_size", "2", "--controls", "none"]
    return ["--organisation_files", *names, *files.model(), "--average", "full", "--max_length", "64", *sizes]


KILLED = Killed(killed_flags, "round 3/3", f"{ROUNDS}:save_state", 3)

"""A stage describes a run without touching anything; each of its methods does one thing."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from hfllm.errors import HIDDEN, InputError
from hfllm.flags import changed
from hfllm.outputs.card import MARKER
from hfllm.outputs.ownership import HEADER, RECORD
from hfllm.outputs.report import Report
from hfllm.outputs.verdict import Promise
from hfllm.runs.identity import finished_run
from hfllm.runs.lock import LOCK_FILE, lock, release
from hfllm.runs.stage import Stage, stage_arguments


@dataclass(frozen=True)
class Flags:
    output_dir: str
    number: int = 1
    model_name_or_path: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_revision: str | None = None
    hub_token: str | None = None


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_that_did_not_learn_ends_with_a_warning(tmp_path, capsys):
    """On the screen, also when it is reused, in both reports and on the card."""
    promises = [Promise("dials", "right", "chance", "a guess"), Promise("hops", "hops", 0.1, "a guess")]
    metrics = {"right": 0.08, "right_se": 0.02, "chance": 0.125, "hops": 0.9, "hops_se": 0.02}
    stage = Stage("try", Flags(str(tmp_path)))
    stage.announce()
    stage.finish(metrics, artifacts={}, promises=promises, next_steps=["load()"])
    line = "dials: 0.080 ± 0.020, not above a guess (0.125)"
    decision = "worse: dials 0.08, a guess 0.125: -0.045 [-0.084, -0.006]"
    last = [f"warning: try: {line}", f"verdict: {decision}; 1 of its 2 claims aside"]
    assert capsys.readouterr().out.splitlines()[-2:] == last
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]["decision"] == "worse"
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == [line]
    assert f"**Warning:** {line}" in (tmp_path / "report.md").read_text()
    Stage("try", Flags(str(tmp_path))).reuse()
    assert capsys.readouterr().out.splitlines()[-2:] == last


@pytest.mark.parametrize("is_before_another", [False, True])
def test_a_run_without_errors_of_its_figures_ends_with_its_folder(is_before_another, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hfllm.runs.schedule.runs_before_another", lambda: is_before_another)
    stage = Stage("try", Flags(str(tmp_path)))
    stage.announce()
    stage.finish({"loss": 0.5}, summary="Loss 0.5", artifacts={}, next_steps=["load()"])
    lines = capsys.readouterr().out.splitlines()
    end = ["", f"In {tmp_path}: report.md, report.json", "", "load()"]
    assert lines[2:] == ["try: Loss 0.5 (0 s)", *(() if is_before_another else end)]


def test_making_a_stage_has_no_effect(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hfllm.outputs.hub.Repository.create", lambda self: pytest.fail("the Hub was asked"))
    stage = Stage("try", Flags(str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/it"))
    stage.check()
    assert not stage.is_finished
    assert files(tmp_path) == set()
    assert capsys.readouterr().out == ""


def test_a_finished_run_is_reused_and_another_one_refused(tmp_path, capsys):
    first = Stage("try", Flags(str(tmp_path / "out")), also={"state": "a"})
    first.announce()
    assert first.finish({"loss": 0.5}, artifacts={}) == {"loss": 0.5}
    assert f"=== try -> {tmp_path / 'out'}" in capsys.readouterr().out
    again = Stage("try", Flags(str(tmp_path / "out")), also={"state": "a"})
    again.check()
    assert again.is_finished
    assert again.reuse() == {"loss": 0.5}
    assert "try: already done in" in capsys.readouterr().out
    before = (tmp_path / "out" / "report.json").read_bytes()
    for stage, difference in (
        (Stage("try", Flags(str(tmp_path / "out"), number=2), also={"state": "a"}), "number=1, this one has number=2"),
        (Stage("try", Flags(str(tmp_path / "out")), also={"state": "b"}), "state='a', this one has state='b'"),
    ):
        with pytest.raises(InputError, match=difference):
            stage.check()
    assert (tmp_path / "out" / "report.json").read_bytes() == before


def test_a_run_that_was_killed_after_its_report_is_completed(saved, capsys, monkeypatch):
    """Its card and the files that it needs no more; a card of the user's stays, and so does one that is there."""
    flags = Flags(output_dir=str(saved))
    for name in ("prepared", "checkpoint-1"):
        (saved / name).mkdir()
    (saved / "README.md").write_text("# Model Card for Model ID")

    def killed(folder):
        raise KeyboardInterrupt

    stage = Stage("pretrain", flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hfllm.runs.stage.write_card", killed)
        stage.finish({"loss": 1.0})
    release(saved)
    assert (saved / "report.json").is_file() and not (saved / "README.md").exists()
    for before in (None, "# Model Card for Model ID"):
        if before is not None:
            (saved / "README.md").write_text(before)
        assert Stage("pretrain", flags).reuse() == {"loss": 1.0}
        assert MARKER in (saved / "README.md").read_text()
    assert (saved / "checkpoint-1").is_dir() and not (saved / "prepared").exists()
    for mine in ("# Mine", f"{MARKER} as it was"):
        (saved / "README.md").write_text(mine)
        Stage("pretrain", flags).reuse()
        assert (saved / "README.md").read_text() == mine
    # A model that was removed since has no card.
    for name in ("README.md", "model.safetensors"):
        (saved / name).unlink()
    assert Stage("pretrain", flags).reuse() == {"loss": 1.0}


def test_what_does_not_decide_the_result_is_left_out(tmp_path):
    one, two = (Stage("try", Flags(str(tmp_path), number=each), without=("number",)) for each in (1, 2))
    assert one.arguments == two.arguments
    assert "number" in Stage("try", Flags(str(tmp_path))).arguments


def test_the_flags_of_stages_before_decide_too(tmp_path):
    before = {"first": (Flags("a", number=5),)}
    arguments = Stage("try", Flags(str(tmp_path)), before=before).arguments
    assert arguments["first.number"] == 5 and arguments["number"] == 1
    assert "first.output_dir" not in arguments


def test_a_model_that_is_read_is_not_written_over(tmp_path):
    stage = Stage("try", Flags(str(tmp_path), model_name_or_path=f"{tmp_path}/."))
    with pytest.raises(InputError, match="is --model_name_or_path, which it would overwrite"):
        stage.check()


def test_a_model_that_was_written_again_is_another(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = stage_arguments(Flags("out", model_name_or_path=str(tmp_path)))
    os.utime(tmp_path / "config.json", ns=(1, 1))
    second = stage_arguments(Flags("out", model_name_or_path=str(tmp_path)))
    # The time is noted, and is compared only with earlier versions, which noted nothing else.
    assert {name for name in first if first[name] != second[name]} == {"model_name_or_path changed at"}
    Report("try", first, {}).write(tmp_path / "out")
    assert finished_run(tmp_path / "out", second) is not None
    (tmp_path / "config.json").write_text("[]")
    os.utime(tmp_path / "config.json", ns=(1, 1))
    third = stage_arguments(Flags("out", model_name_or_path=str(tmp_path)))
    with pytest.raises(InputError, match="a finished run with model_name_or_path contents="):
        finished_run(tmp_path / "out", third)
    earlier = {name: value for name, value in first.items() if name != "model_name_or_path contents"}
    Report("try", earlier, {}).write(tmp_path / "out")
    assert finished_run(tmp_path / "out", first) is not None
    with pytest.raises(InputError, match="a finished run with model_name_or_path changed at="):
        finished_run(tmp_path / "out", second)


def test_an_edit_between_the_parts_that_are_read_of_a_large_file_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr("hfllm.fingerprint.MAX_BYTES", 64)
    monkeypatch.setattr("hfllm.fingerprint.BLOCK", 8)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1000))
    flags = Flags("out", model_name_or_path=str(tmp_path))
    before = stage_arguments(flags)
    Report("try", before, {}).write(tmp_path / "out")
    os.utime(tmp_path / "config.json", ns=(1, 1))
    assert finished_run(tmp_path / "out", stage_arguments(flags)) is not None
    weights.write_bytes(bytes(70) + b"1" + bytes(929))
    os.utime(weights, ns=(1, 1))
    with pytest.raises(InputError, match="a finished run with model_name_or_path contents="):
        finished_run(tmp_path / "out", stage_arguments(flags))


def test_a_failed_push_leaves_the_report_and_names_the_command(tmp_path, monkeypatch):
    def push(self, folder):
        assert (Path(folder) / "report.json").is_file()
        raise InputError("the Hub is down")

    monkeypatch.setattr("hfllm.outputs.hub.Repository.push", push)
    monkeypatch.setattr("hfllm.outputs.hub.Repository.create", lambda self: None)
    stage = Stage("try", Flags(str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/it"))
    stage.announce()
    with pytest.raises(InputError, match=r"hfllm push --model_name_or_path .*out --hub_model_id me/it"):
        stage.finish({"loss": 1.0}, artifacts={})
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"] == {"loss": 1.0}


def test_trainers_neither_push_nor_keep_the_token(tmp_path):
    from transformers import TrainingArguments

    token = "hf_" + "x" * 30
    parsed = TrainingArguments(str(tmp_path / "out"), use_cpu=True, push_to_hub=True, hub_token=token)
    stage = Stage("try", parsed)
    assert (stage.training_args.push_to_hub, stage.training_args.hub_token) == (False, None)
    assert (parsed.push_to_hub, parsed.hub_token) == (True, token)
    assert stage.repository.token == token
    assert token not in json.dumps(stage.arguments)


def test_trainers_save_no_credential_of_a_nested_flag(tmp_path):
    import torch
    from trl import RewardConfig

    nested = {"token": "kept-to-myself", "revision": "v1", "deeper": [{"API-Key": "another-one", "dtype": "auto"}]}
    parsed = RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, model_init_kwargs=json.dumps(nested))
    saved = Stage("try", parsed).training_args
    shown = {"token": HIDDEN, "revision": "v1", "deeper": [{"API-Key": HIDDEN, "dtype": "auto"}]}
    assert saved.model_init_kwargs == shown
    assert parsed.model_init_kwargs == nested
    torch.save(saved, tmp_path / "training_args.bin")
    written = (tmp_path / "training_args.bin").read_bytes() + json.dumps(saved.to_dict()).encode()
    assert b"v1" in written and b"kept-to-myself" not in written and b"another-one" not in written
    # What holds no secret stays the same object, as engines keep theirs.
    plain = changed(parsed, model_init_kwargs={"revision": "v1"})
    assert Stage("try", plain).training_args.model_init_kwargs is plain.model_init_kwargs


def test_what_is_derived_leaves_the_original(tmp_path):
    flags = Flags("a")
    derived = changed(flags, number=3)
    assert (flags.number, derived.number) == (1, 3)
    assert {item.name for item in fields(derived) if getattr(derived, item.name) != getattr(flags, item.name)} == {
        "number"
    }
    with pytest.raises(AttributeError, match="nonsense"):
        changed(flags, nonsense=1)


@dataclass(frozen=True)
class Training(Flags):
    resume_from_checkpoint: str | None = None
    per_device_train_batch_size: int = 1


def finished(folder, model):
    """A run that has trained a model there and has finished."""
    stage = Stage("try", Training(str(folder)))
    stage._hold()
    shutil.copytree(model, folder, dirs_exist_ok=True)
    stage.finish({"loss": 1.0}, summary="done")
    return stage


def test_a_finished_model_that_was_damaged_is_not_reused(saved, tmp_path, monkeypatch):
    finished(tmp_path / "out", saved)
    again = Stage("try", Training(str(tmp_path / "out")))
    assert again.reuse() == {"loss": 1.0}
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for damage in (weights[:-1], weights[:-1] + bytes([weights[-1] ^ 1])):
        (tmp_path / "out" / "model.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match=r"out/model.safetensors is damaged, or was changed since") as error:
            again.reuse()
        assert "\n" not in str(error.value)
        # Nor by the stage that comes next.
        following = Stage("next", Flags(str(tmp_path / "next"), model_name_or_path=str(tmp_path / "out")))
        with pytest.raises(InputError, match=r"--model_name_or_path .*out: .*model.safetensors is damaged"):
            following.check()
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "1")
            patch.setattr("hfllm.outputs.ownership.checksums_of", lambda files: pytest.fail("read again"))
            following.check()
    (tmp_path / "out" / RECORD).unlink()
    following.check()


def test_a_run_begins_where_its_files_are_its_own(saved, tmp_path):
    out = tmp_path / "out"
    finished(out, saved)
    (out / "report.json").unlink()
    stage = Stage("try", Training(str(out)))
    stage.refuse_foreign_files()
    (out / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(InputError, match=r"model.safetensors is not hfllm's .*: it was changed since it was written"):
        stage._hold()
    release(out)
    assert (out / "model.safetensors").read_bytes() == b"theirs"
    shutil.copy(saved / "model.safetensors", out)
    stage._hold()
    release(out)
    assert (out / RECORD).read_text() == f"{HEADER}\n"


def test_checkpoints_before_the_one_that_is_resumed_may_be_links(tmp_path):
    out = tmp_path / "out"
    for folder in (out / "checkpoint-12", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (out / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 12}')
    (out / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    stage = Stage("try", Training(str(out)))
    with pytest.raises(InputError, match="checkpoint-8 is a symbolic link"):
        stage.refuse_foreign_files()
    stage.checkpoint = str(out / "checkpoint-12")
    stage.refuse_foreign_files()
    stage._hold()
    release(out)
    assert (out / "checkpoint-8").is_symlink()


def test_a_run_that_was_refused_leaves_no_record(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        stage = Stage("try", Training(str(folder)))
        stage._hold()
        assert files(folder) == {LOCK_FILE, RECORD}
        release(folder)
        assert not folder.exists() if folder.name == "new" else files(folder) == set()


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EIO, "the disk cannot be read or written: b"), (errno.ESTALE, "Stale file handle: 'b'")],
)
def test_all_processes_are_told_what_the_first_one_met(number, said, tmp_path, monkeypatch):
    """They wait for its word before they train."""
    told = []

    def fails(*given):
        raise OSError(number, os.strerror(number), "b")

    stage = Stage("tokenizer", Flags(str(tmp_path)), is_spread=True)
    monkeypatch.setattr("hfllm.runs.stage.claim", fails)
    with pytest.raises(OSError) as alone:
        stage.announce()
    assert alone.value.errno == number
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda: None)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: told.append(values) or values)
    with pytest.raises(InputError, match=said):
        stage.announce()
    assert len(told) == 1 and told[0][0].endswith(said)


def test_a_lock_is_not_written_through_a_link(tmp_path):
    """Even if the link came after the names were looked at."""
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="out: cannot be written to"):
        lock(tmp_path / "out")
    assert (tmp_path / "theirs").read_text() == "theirs"

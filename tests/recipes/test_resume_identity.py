"""A checkpoint is resumed by the run that made it alone, and what that run reports is whole."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_interruptions import Terminate, assert_same_weights
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from hfllm.errors import InputError
from hfllm.outputs.checkpoints import CHECKSUMS, RECORD, checkpoints_in, damage_of, write_checksums
from hfllm.outputs.ownership import RECORD as RECORD_FILE
from hfllm.runs import command_line
from hfllm.runs.lock import LOCK_FILE, lock, release_all
from hfllm.runs.stage import Stage, checkpoint_to_resume

SCRIPT = Path(__file__).parent / "fault_run.py"
SAVES = ["--save_strategy", "steps", "--save_steps", "1"]
FLAGS = {
    "sft": ["--logging_steps", "3", "--gradient_accumulation_steps", "2"],
    "packed": ["--packing", "true", "--max_length", "64", "--max_steps", "-1", "--total_tokens", "3200"],
    # The third of five steps collects a rollout whose reward is logged with the fourth.
    "rlhf": ["--reward_funcs", "gold", "--num_mini_batches", "2", "--max_steps", "5", "--logging_steps", "4"],
    "reward": ["--on_policy_fraction", "0", "--logging_steps", "3"],
    "distill": ["--answers", "data", "--logging_steps", "3"],
}
# The teacher is named.
FLAGS["distill"] += [word for name in ("pretrain", "sft", "reward", "rlhf") for word in (f"--{name}_config", "")]
AUTO = ["--resume_from_checkpoint", "auto"]


class Stop(TrainerCallback):
    """Ctrl-C while a step is under way."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


pytestmark = pytest.mark.usefixtures("ctrl_c_is_heard")


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release_all()


def run_in(tiny, base, stage, folder, *flags):
    recipe = import_module(stage.replace("packed", "pretrain"))
    settings = tiny["sft_rows" if stage == "sft" else recipe.__name__]
    words = ["--config", settings, *FLAGS[stage], *SAVES, "--output_dir", str(folder)]
    if recipe.__name__ != "pretrain":
        words += ["--teacher_model_name_or_path" if stage == "distill" else "--model_name_or_path", str(base)]
    return recipe.main(*recipe.parse([*words, *map(str, flags)]))


def cut_in(run, step, *arguments):
    """A run that Ctrl-C ends in the step after this one; returns what it says."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, Stop(step)])
        run(*arguments)
    return str(stopped.value)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of instructions."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = [f"{first} {second}" for first in ("red", "blue", "old", "new") for second in ("fox", "owl", "cat", "bee")]
    path.write_text(
        "".join(json.dumps({"instruction": f"Say {word}.", "input": "", "output": word}) + "\n" for word in words)
    )
    return path


@pytest.fixture(scope="module")
def interrupted(tiny, base, rows, tmp_path_factory):
    """The folder of an sft run on these rows with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("cut") / "out"
    cut_in(partial(run_in, tiny, base), 2, "sft", folder, "--dataset_name", rows)
    return folder


@pytest.fixture
def run(tiny, base):
    return partial(run_in, tiny, base)


@pytest.fixture
def cut(interrupted, tmp_path):
    """A copy of that folder."""
    shutil.copytree(interrupted, tmp_path / "out")
    return tmp_path / "out"


# ---- whose checkpoint it is ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--learning_rate", "0.002"], "learning_rate=0.001, this run has learning_rate=0.002"),
        (["--seed", "7"], "seed=42, this run has seed=7"),
        (["--max_steps", "9"], "max_steps=4, this run has max_steps=9"),
        (["--per_device_train_batch_size", "3"], r"rows per optimizer step .*=16, this run has rows .*=6"),
        (["--use_peft"], "use_peft=False, this run has use_peft=True"),
        (["--dataset_name", "world"], r"dataset_name='.*rows.jsonl', this run has dataset_name='world'"),
    ],
)
def test_another_runs_flags_are_refused_by_the_first_that_differs(run, cut, rows, flags, difference):
    with pytest.raises(InputError, match=rf"checkpoint-2 in {cut} was made with {difference}: ") as error:
        run("sft", cut, "--dataset_name", rows, *AUTO, *flags)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints_in(cut)] == ["checkpoint-1", "checkpoint-2"]
    with pytest.raises(InputError, match=f"checkpoint-1 in {cut} was made with {difference}"):
        run("sft", cut, "--dataset_name", rows, "--resume_from_checkpoint", cut / "checkpoint-1", *flags)


@pytest.mark.slow
def test_contents_count_and_neither_places_nor_times(run, cut, rows, base, tmp_path, capsys):
    """A folder that was copied, with its data and its model, and then one with other data and another model."""
    moved, model = tmp_path / "moved.jsonl", tmp_path / "model"
    shutil.copy(rows, moved)
    shutil.copytree(base, model)
    # It is changed on purpose.
    (model / RECORD_FILE).unlink()
    os.utime(moved, (1, 1))
    flags = ["--model_name_or_path", model]
    weights = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"made with model_name_or_path='.*', this run has model_name_or_path='.*model'"
    ):
        run("sft", cut, "--dataset_name", moved, *AUTO, *flags)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    moved.write_text(moved.read_text().replace("red", "rad"))
    with pytest.raises(InputError, match=r"made with dataset_name='.*rows.jsonl', this run has .*moved.jsonl'"):
        run("sft", cut, "--dataset_name", moved, *AUTO, *flags)
    moved.write_text(rows.read_text())
    capsys.readouterr()
    run("sft", cut, "--dataset_name", moved, *AUTO, *flags, "--logging_steps", "1", "--eval_strategy", "steps")
    assert "sft: resuming from checkpoint-2 (step 2 of 4)\n" in capsys.readouterr().out
    run("sft", tmp_path / "whole", "--dataset_name", rows)
    assert_same_weights(tmp_path / "whole", cut)


def test_the_batch_may_be_divided_in_another_way(tiny, base, cut, rows):
    words = ["--config", tiny["sft_rows"], *FLAGS["sft"], *SAVES, *AUTO, "--output_dir", cut, "--dataset_name", rows]
    words += ["--model_name_or_path", base, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 4]
    assert Stage("sft", *import_module("sft").parse(list(map(str, words)))).checkpoint == str(cut / "checkpoint-2")


@pytest.mark.slow
def test_the_rows_and_the_model_that_training_begins_with_count(run, cut, rows, base, tmp_path, monkeypatch):
    """Both may have changed where no flag shows it: on the Hub, or made by the stages before."""
    from hfllm.stages.sft import build as sft

    flags, read = ["--dataset_name", rows, *AUTO], sft.instruction_data
    for change, says in (
        (lambda train: train[::-1], "other training rows: "),
        (lambda train: train[:-1], r"other training rows \(15 rows, this run has 14\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sft, "instruction_data", lambda *data, edit=change: (edit(read(*data)[0]), read(*data)[1]))
            with pytest.raises(InputError, match=f"checkpoint-2 in .* was made with {says}"):
                run("sft", cut, *flags)
    file = cut / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"][RECORD]["run"]["model"]["content"] = "another"
    file.write_text(json.dumps(state))
    write_checksums(cut / "checkpoint-2")
    with pytest.raises(InputError, match="was made with another model to start from"):
        run("sft", cut, *flags)


@pytest.mark.slow
def test_rows_that_an_earlier_version_hashed_are_counted(run, cut, rows, monkeypatch, capsys):
    from hfllm.stages.sft import build as sft

    for path in checkpoints_in(cut):
        state = json.loads((path / "trainer_state.json").read_text())
        state["stateful_callbacks"][RECORD]["run"]["rows"] = {"count": 15, "content": "of another kind"}
        (path / "trainer_state.json").write_text(json.dumps(state))
        write_checksums(path)
    read = sft.instruction_data
    with monkeypatch.context() as patch:
        patch.setattr(sft, "instruction_data", lambda *data: (read(*data)[0][:-1], read(*data)[1]))
        with pytest.raises(InputError, match=r"other training rows \(15 rows, this run has 14\)"):
            run("sft", cut, "--dataset_name", rows, *AUTO)
    capsys.readouterr()
    run("sft", cut, "--dataset_name", rows, *AUTO)
    said = "(step 2 of 4); an earlier version made it, so of its rows the number is compared and not what they hold"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_whose_it_is(run, cut, rows, capsys):
    for path in checkpoints_in(cut):
        state = json.loads((path / "trainer_state.json").read_text())
        del state["stateful_callbacks"][RECORD]
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / CHECKSUMS).unlink()
    named = ["--resume_from_checkpoint", cut / "checkpoint-2"]
    for value in ("auto", "true"):
        with pytest.raises(InputError, match=r"checkpoint-2 in .* does not say which run made it.* name it, --resume"):
            run("sft", cut, "--dataset_name", rows, "--resume_from_checkpoint", value)
    run("sft", cut, "--dataset_name", rows, *named)
    assert "resuming from checkpoint-2 (step 2 of 4); it does not say which run made it" in capsys.readouterr().out
    # From now on they do.
    assert json.loads((cut / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"][RECORD]["run"]


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_optimizer_is_refused(run, cut, rows, missing):
    (cut / "checkpoint-2" / missing).unlink()
    # Of before there were any.
    (cut / "checkpoint-2" / CHECKSUMS).unlink()
    for value in ("auto", cut / "checkpoint-2"):
        with pytest.raises(InputError, match=rf"checkpoint-2 in .* holds no {missing}, as after --save_only_model"):
            run("sft", cut, "--dataset_name", rows, "--resume_from_checkpoint", value)


def flip(file):
    """Change a bit in the middle of a file, which its format does not show."""
    written = bytearray(file.read_bytes())
    written[len(written) // 2] ^= 1
    file.write_bytes(written)


@pytest.mark.slow
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_tried(run, cut, rows, tmp_path, monkeypatch):
    saved = sorted(path.name for path in (cut / "checkpoint-2").iterdir() if path.name not in ("README.md", CHECKSUMS))
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(saved)
    for name in saved:
        pair = tmp_path / name / "out"
        shutil.copytree(cut, pair)
        flip(pair / "checkpoint-2" / name)
        with pytest.raises(
            InputError, match=rf"--resume_from_checkpoint .*checkpoint-2: {name} (is damaged|cannot be)"
        ):
            checkpoint_to_resume(str(pair / "checkpoint-2"), str(pair))
        with pytest.warns(
            UserWarning, match=rf"checkpoint-2 is not complete \({name} .*\): trying the checkpoint before"
        ):
            assert checkpoint_to_resume("auto", str(pair)) == str(pair / "checkpoint-1")
        (pair / "checkpoint-1" / name).unlink()
        with (
            pytest.warns(UserWarning),
            pytest.raises(InputError, match=rf"checkpoint-2 is damaged \({name} .* remove it"),
        ):
            checkpoint_to_resume("auto", str(pair))
    # A recipe says it on its way to the same weights.
    whole = shutil.copytree(cut, tmp_path / "whole" / "out")
    run("sft", whole, "--dataset_name", rows, *AUTO)
    flip(cut / "checkpoint-2" / "optimizer.pt")
    with pytest.warns(UserWarning, match=r"optimizer.pt is damaged"):
        run("sft", cut, "--dataset_name", rows, *AUTO)
    assert_same_weights(whole, cut)


@pytest.mark.slow
def test_sigterms_checkpoint_has_checksums_too(run, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, Terminate(2)])
    with pytest.raises(SystemExit):
        run(
            "sft", tmp_path / "out", "--dataset_name", rows, "--save_strategy", "no", "--enable_jit_checkpoint", "true"
        )
    folder = tmp_path / "out" / "checkpoint-3"
    assert damage_of(folder) is None and "optimizer.pt" in (folder / CHECKSUMS).read_text()


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_is_refused(run, rows, tmp_path):
    said = cut_in(run, 2, "sft", tmp_path / "out", "--dataset_name", rows, "--save_only_model", "true")
    assert "no checkpoint was saved" in said
    for more in (["--save_only_model", "true"], []):
        with pytest.raises(InputError, match=r"checkpoint-2 in .* holds no optimizer.pt, as after --save_only_model"):
            run("sft", tmp_path / "out", "--dataset_name", rows, *AUTO, *more)


# ---- what is said ----


@pytest.mark.slow
def test_a_repeated_command_says_what_it_does_about_checkpoints(run, cut, rows, capsys):
    says = "sft: starting from the beginning; the checkpoints there, up to checkpoint-2, will be overwritten"
    cut_in(run, 0, "sft", cut, "--dataset_name", rows)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(says))
    assert line == f"{says}; --resume_from_checkpoint auto would continue from checkpoint-2 (step 2 of 4)"
    cut_in(run, 0, "sft", cut, "--dataset_name", rows, "--seed", "7")
    assert f"{says} (they were made with seed=42, this run has seed=7)\n" in capsys.readouterr().out
    cut_in(run, 0, "sft", cut.parent / "new", "--dataset_name", rows)
    assert "starting from the beginning" not in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_is_one_line_that_says_how_to_resume(run, rows, tmp_path, monkeypatch, capfd):
    def command(step, *flags):
        monkeypatch.setattr(sys, "argv", ["sft"])
        monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, Stop(step)])
        with pytest.raises(SystemExit) as ended:
            command_line.run(lambda: run("sft", tmp_path / "out", "--dataset_name", rows, *flags), lambda argv: ())
        assert ended.value.code == 130
        assert not list(tmp_path.rglob(LOCK_FILE))
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("interrupted")]
        return line

    assert command(1, "--save_strategy", "no").startswith(
        "interrupted: step 1 of 4; no checkpoint was saved (--save_str"
    )
    line = command(3)
    continues = (
        f"the same command with --resume_from_checkpoint auto continues from checkpoint-3 in {tmp_path / 'out'}"
    )
    assert line == f"interrupted: step 3 of 4; {continues}"
    # While the last checkpoint is written.
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer._save_scaler", lambda *_: signal.raise_signal(signal.SIGINT))
        assert command(-1, *AUTO) == f"interrupted: step 4 of 4; {continues}"
    assert [path.name for path in checkpoints_in(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "out" / "report.json").exists()


# ---- whose folder it is ----


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_its_own_flags_alone(processes, run, tiny, base, rows, tmp_path, monkeypatch):
    words = ["--config", tiny["sft_rows"], *FLAGS["sft"], *SAVES, "--model_name_or_path", base, "--dataset_name", rows]
    processes.run(SCRIPT, "kill", 3, "sft", *words, "--output_dir", tmp_path / "out", code=-signal.SIGKILL)
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with pytest.raises(InputError, match=r"checkpoint-3 in .* was made with learning_rate=0.001, this run has"):
        run("sft", tmp_path / "out", "--dataset_name", rows, *AUTO, "--learning_rate", "0.002")
    run("sft", tmp_path / "out", "--dataset_name", rows, *AUTO)
    run("sft", tmp_path / "whole", "--dataset_name", rows)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_FILE).exists()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(processes, tiny, base, rows, tmp_path):
    """By all of its processes, here two."""
    lock(tmp_path / "out")
    words = ["--config", tiny["sft_rows"], *SAVES, "--model_name_or_path", base, "--dataset_name", rows]
    words += ["--output_dir", tmp_path / "out"]
    printed = processes.torchrun(SCRIPT, "kill", -1, "sft", *words, code=2)
    assert printed.count("error: ") == 1
    assert f"another run is writing there (process {os.getpid()} on " in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize(("name", "text"), [("README.md", "# Mine"), ("report.json", "[]"), ("loss.png", "mine")])
def test_files_of_others_are_not_written_over(run, rows, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name} is not hfllm's and would be overwritten"):
        run("sft", tmp_path, "--dataset_name", rows)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


# ---- what is reported ----


def entries(folder, *names):
    """The training log of these names, and the mean loss of all steps."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [
        {name: entry[name] for name in ("step", *names) if name in entry} for entry in history if "loss" in entry
    ]
    return losses, [(entry["step"], entry["train_loss"]) for entry in history if "train_loss" in entry]


@pytest.mark.slow
@pytest.mark.turn(7)
@pytest.mark.parametrize("stage", FLAGS)
def test_what_a_resumed_run_reports_is_that_of_all_its_steps(run, tmp_path, stage):
    names = ("loss", "reward", "kl", "entropy", "policy_loss", "clip_fraction", "episode")
    names += ("mean_token_accuracy", "num_tokens", "bits_per_byte", "accuracy", "margin", "soft_loss", "hard_loss")
    metrics = run(stage, tmp_path / "whole")
    expected = entries(tmp_path / "whole", *names)
    assert len(expected[0]) > 0 and len(expected[1]) == 1
    last = checkpoints_in(tmp_path / "whole")[-1]
    for checkpoint in (2, 3, int(last.name.rpartition("-")[2])):
        folder = tmp_path / str(checkpoint)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{checkpoint}", folder / f"checkpoint-{checkpoint}")
        torch.manual_seed(12345)
        resumed = run(stage, folder, *AUTO)
        assert entries(folder, *names) == expected, checkpoint
        for name in ("train_loss", "eval_loss", "proxy_reward_after"):
            assert resumed.get(name) == metrics.get(name), (checkpoint, name)
    assert ("train_loss" in metrics) == (stage not in ("rlhf", "reward"))

"""What a recipe prints while it trains: plain lines, and on a terminal one line that moves below them."""

import io
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
from transformers import TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hfllm.flags import GIVEN
from hfllm.runs import schedule
from hfllm.runs.schedule import Job, Planned
from hfllm.trainers import callbacks
from hfllm.trainers.callbacks import MovingLine, PlainPrinter, clock_time, use_plain_lines

JOB = Job((Planned("sft", "a", 0.5), Planned("reward", "b", 2), Planned("rlhf", "c", 2.5)), place=1)


def screen(written):
    """The lines of a terminal once all of this was written to it."""
    lines = []
    for line in written.split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines


@pytest.fixture
def terminal(monkeypatch):
    """A moving line on a terminal of 80 columns, whose clock is set by hand, with what is printed on it."""
    out, time = io.StringIO(), [100.0]
    monkeypatch.setattr(schedule, "_job", JOB)
    monkeypatch.setattr(callbacks.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=80))
    state = TrainerState(max_steps=12, is_world_process_zero=True)
    line = MovingLine(out, lambda: time[0])

    def tell(event, seconds=0.0, step=None, **kwargs):
        time[0] += seconds
        state.global_step = state.global_step if step is None else step
        with redirect_stdout(out):
            getattr(line, f"on_{event}")(None, state, None, **kwargs)
        return screen(out.getvalue())

    return SimpleNamespace(tell=tell, state=state, line=line, out=out)


def test_one_line_moves(terminal):
    assert terminal.tell("train_begin") == ["reward (2 of 3)  step 0/12, then about 2.5 min"]
    assert terminal.tell("step_end", 10, step=2) == ["reward (2 of 3)  step 2/12  0:50 left, then about 2.5 min"]
    # Steps that take longer, and a line that gets shorter.
    assert terminal.tell("step_end", 30, step=4) == ["reward (2 of 3)  step 4/12  1:20 left, then about 2.5 min"]
    assert terminal.tell("step_end", 60, step=12) == ["reward (2 of 3)  step 12/12, then about 2.5 min"]
    assert terminal.tell("train_end") == [""]


def test_plain_lines_stand_above_it(terminal):
    terminal.tell("step_end", 1, step=3)
    assert terminal.tell("log", logs={"loss": 0.25, "accuracy": 0.5}) == ["step 3/12  loss 0.25  accuracy 0.5", ""]
    after = terminal.tell("step_end", 1, step=4)
    assert after[0] == "step 3/12  loss 0.25  accuracy 0.5"
    assert after[1].startswith("reward (2 of 3)  step 4/12")
    assert len(after) == 2


def test_a_line_has_few_digits_and_what_was_cut_off():
    state = TrainerState(max_steps=12, global_step=3)
    logs = {
        "kl": -6e-7,
        "tokens_per_second": 24123.4,
        "learning_rate": 8.33e-6,
        "unfinished": 0.0625,
        "grad_norm": 1.0,
    }
    line = "step 3/12  tokens/s 24,123  lr 8.33e-06  kl 0  unfinished 0.0625"
    assert callbacks.plain_line(state, logs) == line
    assert callbacks.plain_line(state, {"total": 1.0}) is None
    # Before training the number of steps is not known.
    assert callbacks.plain_line(TrainerState(), {"eval_reward": 0.25}) == "before training  held-out reward 0.25"


def test_evaluation_has_the_same_line(terminal):
    loader = [None] * 5
    terminal.tell("step_end", 1, step=4)
    assert terminal.tell("prediction_step", 1, eval_dataloader=loader) == ["reward (2 of 3)  evaluating 1/5"]
    assert terminal.tell("prediction_step", 1, eval_dataloader=loader) == ["reward (2 of 3)  evaluating 2/5"]
    assert terminal.tell("evaluate") == [""]
    assert terminal.tell("prediction_step", 1, eval_dataloader=loader) == ["reward (2 of 3)  evaluating 1/5"]


def test_a_resumed_run_counts_its_own_steps(terminal):
    terminal.tell("train_begin", step=8)
    assert terminal.tell("step_end", 10, step=9)[0].startswith("reward (2 of 3)  step 9/12  0:30 left")


def test_it_is_not_drawn_all_the_time(terminal):
    terminal.tell("train_begin")
    before = terminal.out.getvalue()
    terminal.tell("step_end", MovingLine.PAUSE / 2, step=1)
    assert terminal.out.getvalue() == before
    terminal.tell("step_end", MovingLine.PAUSE, step=2)
    assert terminal.out.getvalue() != before


def test_it_fits_the_terminal(terminal, monkeypatch):
    monkeypatch.setattr(callbacks.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=20))
    assert terminal.tell("step_end", 1, step=2) == ["reward (2 of 3)  st"]


def test_a_job_of_one_stage_or_none_is_not_counted(terminal, monkeypatch):
    monkeypatch.setattr(schedule, "_job", Job((Planned("sft", "a"),)))
    assert terminal.tell("step_end", 12, step=6) == ["sft  step 6/12  0:12 left"]
    monkeypatch.setattr(schedule, "_job", None)
    assert terminal.tell("step_end", 6, step=9) == ["step 9/12  0:06 left"]


def test_other_processes_draw_nothing(terminal):
    terminal.state.is_world_process_zero = False
    for event in ("train_begin", "step_end", "evaluate", "train_end"):
        terminal.tell(event, 1)
    terminal.tell("prediction_step", 1, eval_dataloader=[None])
    terminal.tell("log", 1, logs={"loss": 1.0})
    assert terminal.out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert clock_time(seconds) == text


@pytest.mark.parametrize(("disable_tqdm", "kind"), [(True, PlainPrinter), (False, MovingLine)])
def test_a_trainer_gets_the_one_or_the_other(disable_tqdm, kind, make_model, tokenizer, tmp_path, capsys):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "max_steps": 2, "logging_steps": 1}
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    args = TrainingArguments(str(tmp_path), disable_tqdm=disable_tqdm, **options)
    trainer = Trainer(make_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    use_plain_lines(trainer)
    shown = [type(each) for each in trainer.callback_handler.callbacks]
    assert [each for each in shown if issubclass(each, (PlainPrinter, PrinterCallback, ProgressCallback))] == [kind]
    trainer.train()
    trainer.evaluate()
    out, err = capsys.readouterr()
    # DeepSpeed may say something too.
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2", "2/2"]
    # Where nothing moves, the lines say how long it takes.
    assert [line.endswith(" left") for line in lines] == [kind is PlainPrinter, False, False]
    assert ("step 2/2" in err) == (kind is MovingLine)
    assert screen(err.rpartition("\n")[2]) == [""]


@pytest.mark.parametrize(
    ("given", "wanted"), [(("max_steps",), 1), (("max_steps", "logging_steps"), 50), ((), 1), (None, 50)]
)
def test_a_short_run_is_logged_often_unless_its_user_says_how_often(given, wanted, make_model, tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "max_steps": 12, "logging_steps": 50}
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 4, "labels": [[5, 6, 7]] * 4})
    args = TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
    if given is not None:
        object.__setattr__(args, GIVEN, given)
    trainer = Trainer(make_model(), args, train_dataset=rows, processing_class=tokenizer)
    use_plain_lines(trainer)
    trainer.train()
    logged = [each["step"] for each in trainer.state.log_history if "loss" in each]
    assert logged == ([*range(1, 13)] if wanted == 1 else [])

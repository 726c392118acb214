"""Throughput by a clock that the tests turn, and losses that they plant, in runs of the stock trainer."""

import math
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from hfllm.errors import InputError
from hfllm.trainers.monitors import LossSpikeGuard, ThroughputCallback, add_to_logs

SEQUENCE = 8
BATCH = 2


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Passing(TrainerCallback):
    """Two seconds pass in each optimizer step, a hundred in each evaluated batch."""

    def __init__(self, clock):
        self.clock = clock

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.clock.now += 2

    def on_prediction_step(self, *args, **kwargs):
        self.clock.now += 100


class Recorder(TrainerCallback):
    """Keeps the logs as a back end of `report_to` sees them."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


class SlowlySaving(Trainer):
    """A thousand seconds pass with each checkpoint."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.clock.now += 1000


@pytest.fixture
def make_trainer(make_model, tokenizer, tmp_path):
    def make(trainer_class=Trainer, callbacks=(), collate=None, **options):
        values = {
            "output_dir": str(tmp_path),
            "max_steps": 6,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 2,
            "disable_tqdm": True,
        }
        ids = torch.randint(10, 300, (32, SEQUENCE), generator=torch.Generator().manual_seed(0)).tolist()
        rows = Dataset.from_dict({"input_ids": ids})
        return trainer_class(
            model=make_model(),
            args=TrainingArguments(**{**values, **options}),
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            data_collator=collate or DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=list(callbacks),
        )

    return make


def training_logs(entries):
    return [entry for entry in entries if "loss" in entry]


def test_rates_are_of_training_alone_and_reach_history_and_back_ends_once(make_trainer):
    clock, recorder = Clock(), Recorder()
    trainer = make_trainer(
        SlowlySaving,
        [recorder, Passing(clock)],
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3},
        eval_on_start=True,
    )
    trainer.clock = clock
    throughput = ThroughputCallback(
        tokens_per_step=100, flops_per_token=6.0, peak_flops=1200.0, bytes_per_token=4.0, clock=clock
    )
    add_to_logs(trainer, throughput)
    trainer.train()
    history = training_logs(trainer.state.log_history)
    assert [entry["step"] for entry in history] == [2, 4, 6]
    for entry in history:
        assert entry["tokens_per_second"] == pytest.approx(50)
        assert entry["mfu"] == pytest.approx(50 * 6 / 1200)
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / math.log(2) / 4)
    assert not any("tokens_per_second" in entry for entry in trainer.state.log_history if "loss" not in entry)
    assert len(recorder.seen) == len(trainer.state.log_history)
    seen = training_logs(recorder.seen)
    names = ("loss", "tokens_per_second", "mfu", "bits_per_byte")
    assert [[entry[name] for name in names] for entry in seen] == [
        [entry[name] for name in names] for entry in history
    ]
    assert clock.now > 1000 + 2 * 1000 + 6 * 100


def test_waiting_for_data_is_training_time(make_trainer, tokenizer):
    clock, collate = Clock(), DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def slow(rows):
        clock.now += 3
        return collate(rows)

    trainer = make_trainer(callbacks=[Passing(clock)], collate=slow, max_steps=4, logging_steps=1)
    add_to_logs(trainer, ThroughputCallback(tokens_per_step=100, clock=clock))
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in training_logs(trainer.state.log_history)]
    # The first step's data comes before its time begins.
    assert rates == pytest.approx([100 / 2, 100 / 5, 100 / 5, 100 / 5])


def test_tokens_come_from_the_trainer_or_from_a_schedule(make_trainer):
    for tokens, options, expected in (
        (None, {"include_num_input_tokens_seen": "all", "gradient_accumulation_steps": 2}, [2 * BATCH * SEQUENCE] * 3),
        (lambda step: 10 * step, {}, [(10 + 20) / 2, (30 + 40) / 2, (50 + 60) / 2]),
    ):
        clock = Clock()
        trainer = make_trainer(callbacks=[Passing(clock)], **options)
        add_to_logs(trainer, ThroughputCallback(tokens_per_step=tokens, clock=clock))
        trainer.train()
        rates = [entry["tokens_per_second"] for entry in training_logs(trainer.state.log_history)]
        assert rates == pytest.approx([each / 2 for each in expected])


def test_evaluation_has_its_own_bytes(make_trainer):
    trainer = make_trainer()
    add_to_logs(trainer, ThroughputCallback(tokens_per_step=1, eval_bytes_per_token=2.0))
    metrics = trainer.evaluate()
    assert metrics["eval_bits_per_byte"] == pytest.approx(metrics["eval_loss"] / math.log(2) / 2)
    assert trainer.state.log_history[-1]["eval_bits_per_byte"] == metrics["eval_bits_per_byte"]


def test_what_runs_paused_does_not_count():
    clock = Clock()
    throughput = ThroughputCallback(tokens_per_step=10, clock=clock)
    state = SimpleNamespace(num_input_tokens_seen=0, global_step=1, log_history=[{}])
    control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    throughput.on_train_begin(args, state, control)
    clock.now += 50
    throughput.on_step_begin(args, state, control)
    clock.now += 1
    with throughput.paused():
        clock.now += 30
    clock.now += 1
    throughput.on_step_end(args, state, control)
    throughput.on_log(args, state, control, logs={"loss": 1.0})
    assert state.log_history[-1] == {"tokens_per_second": 5.0}


@pytest.mark.parametrize("options", [{"flops_per_token": 6.0}, {"peak_flops": 1.0}, {"bytes_per_token": 0}])
def test_options_that_could_do_nothing_are_refused(options):
    with pytest.raises(InputError):
        ThroughputCallback(tokens_per_step=1, **options)


def test_tokens_that_nobody_counts_are_refused(make_trainer):
    with pytest.raises(InputError, match="include_num_input_tokens_seen"):
        make_trainer(callbacks=[ThroughputCallback()]).train()


class Planted(Trainer):
    """Each step's loss is the next of `losses`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.tensor(self.losses[self.state.global_step])


def noise(count, seed=0):
    """A falling loss with noise, now and then a heavy tail of it."""
    rng = random.Random(seed)
    return [2 + 3 * 0.97**step + rng.gauss(0, 0.05) * (3 if rng.random() < 0.05 else 1) for step in range(count)]


def run_planted(make_trainer, losses, guard, **options):
    trainer = make_trainer(
        Planted, [guard], max_steps=len(losses), **{"logging_steps": 1, "num_train_epochs": 9, **options}
    )
    trainer.losses = losses
    trainer.train()
    return trainer


def test_a_planted_spike_stops_training_and_names_itself(make_trainer, tmp_path):
    losses = [*noise(40), 9.0, 9.5, 9.2, *noise(10)]
    guard = LossSpikeGuard()
    with pytest.warns(UserWarning, match=r"step 43: the loss is 9\.2.*3 log\(s\) in a row.*median") as caught:
        trainer = run_planted(make_trainer, losses, guard, save_strategy="steps", save_steps=43)
    assert trainer.state.global_step == 43 and str(caught[0].message) == guard.message
    # The step is one to save at, but what would be saved is broken.
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_noise_and_single_spikes_do_not(make_trainer):
    losses = noise(200)
    losses[60] = losses[120] = losses[121] = 9.0
    guard = LossSpikeGuard()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run_planted(make_trainer, losses, guard).state.global_step == 200
    assert guard.message is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_once(make_trainer, value):
    guard = LossSpikeGuard()
    with pytest.warns(UserWarning, match=f"step 3: the loss is {value}"):
        trainer = run_planted(make_trainer, [3.0, 3.0, value, 3.0], guard)
    assert trainer.state.global_step == 3


def test_a_warning_leaves_training_alone_and_comes_once_a_spike(make_trainer):
    guard = LossSpikeGuard(action="warn")
    with pytest.warns(UserWarning) as caught:
        trainer = run_planted(make_trainer, [*noise(20), *[9.0] * 5, *noise(5)], guard)
    assert [str(each.message)[:8] for each in caught if "median" in str(each.message)] == ["step 23:"]
    assert trainer.state.global_step == 30 and "stops" not in guard.message


def test_a_resumed_run_remembers_what_it_has_seen(make_trainer, tmp_path):
    losses = [*noise(20), 9.0, 9.0, 9.0, 9.0]
    # By a guard that only warns, since one that stops saves nothing meanwhile.
    run_planted(make_trainer, losses[:22], LossSpikeGuard(action="warn"), save_strategy="steps", save_steps=22)
    guard = LossSpikeGuard()
    trainer = make_trainer(Planted, [guard], max_steps=24, logging_steps=1)
    trainer.losses = losses
    with pytest.warns(UserWarning, match="step 23: .* 3 log"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-22"))
    assert trainer.state.global_step == 23


@pytest.mark.slow
def test_nothing_is_saved_while_the_loss_is_too_high(make_trainer, tmp_path):
    run_planted(make_trainer, [*noise(20), 9.0, 9.0], LossSpikeGuard(), save_strategy="steps", save_steps=1)
    saved = {int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
    assert saved == set(range(1, 21))


@pytest.mark.parametrize("options", [{"window": 9}, {"patience": 0}, {"threshold": 0.0}, {"action": "pray"}])
def test_guards_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        LossSpikeGuard(**options)

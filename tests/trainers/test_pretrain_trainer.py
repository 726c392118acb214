"""However a step's batch is split, saved and gone on with, the weights are the same."""

import pytest
import torch
from tolerances import assert_same_learning
from transformers import TrainerCallback, TrainingArguments

from hfllm.data.packing import batch_of, pack
from hfllm.errors import InputError
from hfllm.outputs.checkpoints import last_complete_checkpoint
from hfllm.trainers.pretraining.trainer import BatchPlan, PretrainTrainer, Schedule

LENGTH = 32


@pytest.fixture
def make_trainer(make_model, tokenizer, world, tmp_path):
    texts = world.documents(120, seed=1)

    def make(folder="run", batch_tokens="0:64,0.4:192", lengths="0:8,0.3:32", z_loss_coef=0.0, model=None, **more):
        rows = pack(texts, tokenizer, LENGTH)
        schedules = Schedule.parse(batch_tokens, "--batch_ramp"), Schedule.parse(lengths, "--length_curriculum")
        settings = {
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "adam_epsilon": 1e-6,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        return PretrainTrainer(
            plan=BatchPlan([rows], LENGTH, 40, *schedules, pad_token_id=tokenizer.pad_token_id, seed=0),
            z_loss_coef=z_loss_coef,
            model=model or make_model(),
            args=TrainingArguments(str(tmp_path / folder), **{**settings, **more}),
            processing_class=tokenizer,
        )

    return make


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.slow
def test_the_split_into_passes_changes_nothing(make_trainer):
    results = []
    for size in (1, 2, 64):
        trainer = make_trainer(per_device_train_batch_size=size)
        trainer.train()
        results.append(weights(trainer))
    assert trainer.state.global_step == len(trainer.plan)
    for other in results[1:]:
        assert_same_learning(other, results[0], trainer.args.learning_rate, len(trainer.plan))


def test_a_share_without_a_target_is_one_pass_that_teaches_nothing(make_trainer):
    trainer = make_trainer(lengths="32", batch_tokens="256")
    batch = trainer.plan[0]
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert trainer.training_step(trainer.model, empty, num_items_in_batch=torch.tensor(7)) == 0
    assert all((weight.grad == 0).all() for weight in trainer.model.parameters() if weight.grad is not None)
    assert any(weight.grad is not None for weight in trainer.model.parameters())


def test_flash_attention_gets_packed_rows_as_one(make_trainer, monkeypatch):
    trainer = make_trainer(lengths="32", batch_tokens="256")
    batch = trainer.plan[0]
    expected = trainer.model(**batch, use_cache=False, num_items_in_batch=1).loss
    # As it would be on a GPU: the model is asked for nothing but its implementation's name there.
    monkeypatch.setattr("hfllm.trainers.pretraining.trainer.has_flash_attention", lambda model: True)
    monkeypatch.setattr(trainer, "_loss_shifts_labels", False)
    passes = list(trainer._passes(batch))
    assert [part["input_ids"].shape for part in passes] == [(1, 64)] * 4
    losses = [trainer.model(**part, use_cache=False, num_items_in_batch=1).loss for part in passes]
    torch.testing.assert_close(sum(losses), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_the_routers_loss_is_weighed_by_tokens(make_trainer, make_model):
    results = []
    for size in (1, 2, 64):
        model = make_model(num_local_experts=4, router_aux_loss_coef=0.1)
        trainer = make_trainer(
            per_device_train_batch_size=size, model=model, max_steps=1, lengths="32", batch_tokens="512"
        )
        trainer.train()
        results.append(trainer.state.log_history[0])
    # A mean over parts is not the whole batch's, but it does not grow with their number.
    for name in ("loss", "grad_norm"):
        assert max(row[name] for row in results) / min(row[name] for row in results) < 1.02


def test_families_that_mix_packed_documents_are_refused(make_trainer, tokenizer):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(InputError, match="in a model of type bloom packed documents attend to each other"):
        make_trainer(model=model)


def test_a_model_without_loss_arguments_is_refused(make_trainer, make_model):
    class Fixed(type(make_model())):
        def forward(self, input_ids, position_ids=None, labels=None, use_cache=None):
            return super().forward(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=use_cache)

    with pytest.raises(InputError, match="takes no num_items_in_batch"):
        make_trainer(model=Fixed(make_model().config))


def test_a_step_is_one_large_batch(make_trainer, tokenizer):
    trainer = make_trainer(max_steps=1, per_device_train_batch_size=1, lengths="32", learning_rate=0.0)
    model = trainer.model
    expected = model(**trainer.plan[0], use_cache=False).loss
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert len(trainer.plan[0]["input_ids"]) == 2


def test_it_goes_on_as_if_it_had_not_stopped(make_trainer, tmp_path):
    whole = make_trainer("whole")
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    half = make_trainer("half", save_strategy="steps", save_steps=5)
    half.add_callback(Stop())
    half.train()
    again = make_trainer("half", save_strategy="steps", save_steps=5)
    seen = []
    take = again.plan.__class__.__getitem__
    again.plan.__class__.__getitem__ = lambda self, step: seen.append(step) or take(self, step)
    try:
        again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-5"))
    finally:
        again.plan.__class__.__getitem__ = take
    assert seen == list(range(5, len(whole.plan)))
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in again.state.log_history if "loss" in entry] == losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_off_is_passed_over(make_trainer, tmp_path, name):
    make_trainer("damaged", save_strategy="steps", save_steps=5).train()
    numbers = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "damaged").glob("checkpoint-*"))
    before, last = (tmp_path / "damaged" / f"checkpoint-{number}" for number in numbers[-2:])
    assert last_complete_checkpoint(tmp_path / "damaged") == str(last)
    (last / name).write_bytes((last / name).read_bytes()[:-20])
    with pytest.warns(UserWarning, match="is not complete"):
        assert last_complete_checkpoint(tmp_path / "damaged") == str(before)


def test_the_z_loss_is_the_mean_squared_partition(make_trainer):
    losses = []
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(
            max_steps=1, per_device_train_batch_size=1, lengths="32", learning_rate=0.0, z_loss_coef=coefficient
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    batch = trainer.plan[0]
    with torch.no_grad():
        logits = trainer.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    kept = batch["labels"][:, 1:] != -100
    expected = logits[:, :-1].logsumexp(-1)[kept].square().mean().item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, rel=1e-4)
    assert trainer.evaluate(Rows(batch))["eval_loss"] == pytest.approx(losses[0], rel=1e-4)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


@pytest.mark.slow
def test_a_native_model_learns_the_same_way(make_trainer, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.1, pad_token_id=tokenizer.pad_token_id, **settings
    )
    results = []
    for size in (1, 64):
        trainer = make_trainer(per_device_train_batch_size=size)
        torch.manual_seed(0)
        trainer.model = trainer.model_wrapped = LlamaForCausalLM(config)
        trainer.train()
        results.append(weights(trainer))
    assert_same_learning(*results, trainer.args.learning_rate, len(trainer.plan))


def test_accumulation_is_the_plans(make_trainer):
    with pytest.raises(InputError, match="gradient_accumulation_steps must be 1"):
        make_trainer(gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="z_loss_coef must not be negative"):
        make_trainer(z_loss_coef=-1.0)


def test_batches_are_what_the_model_is_given(make_trainer, tokenizer):
    trainer = make_trainer()
    row = trainer.plan.sources[0][0]
    assert set(batch_of([row], LENGTH, tokenizer.pad_token_id)) == {"input_ids", "position_ids", "labels"}

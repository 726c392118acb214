"""Every tensor of a trainer is where the model is: on a device that is pretended, see pretend_gpu.py."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from pretend_gpu import MixedDevicesError, pretend_gpu

import hfllm
from hfllm.models import devices

PLAIN = {
    **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
    **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4},
}


@pytest.fixture
def gpu(monkeypatch):
    """The pretended device, which has a mebibyte, and a function that sends trainers there by their arguments."""
    with pretend_gpu() as device:
        monkeypatch.setattr(devices, "device_memory", lambda where: None if where.type == "cpu" else 2**20)
        yield device
    AcceleratorState._reset_state(reset_partial_state=True)


def send(args, device):
    """Let a trainer of these arguments believe that it has the device."""
    args.__dict__["_setup_devices"] = device
    PartialState._shared_state["device"] = device
    return args


def test_the_pretended_gpu_notices_a_tensor_of_the_cpu(gpu):
    weight = torch.nn.Linear(3, 2).to(gpu)
    inputs = torch.ones(4, 3, device=gpu)
    weight(inputs).sum().backward()
    assert weight.weight.device == weight.weight.grad.device == weight(inputs).device == gpu
    assert weight.weight.grad.tolist() == [[4.0] * 3] * 2 and (inputs * torch.tensor(2.0)).sum().item() == 24
    with pytest.raises(MixedDevicesError, match=r"aten.addmm.default: \(4, 3\) is on the CPU"):
        weight(inputs.cpu())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # What the others leave as it is.
        pytest.param({}, id="default"),
        {
            **{"kl_estimator": "full", "kl_penalty": "loss", "entropy_coef": 0.1, "num_mini_batches": 2},
            **{"generation_kwargs": {"stop_strings": ["."]}, "value_model": True, "target_kl": 1.0},
        },
        {
            **{"whiten_rewards": True, "normalize_rewards": True, "reward_clip": 1.0, "missing_eos_penalty": 1.0},
            **{"sync_ref_model": True, "ref_model_sync_steps": 1, "advantage_clip": 1.0, "critic_warmup_steps": 1},
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_ppo(options, gpu, make_trainer, make_model, tokenizer, prompts, monkeypatch):
    eager = {"attn_implementation": "eager"}
    reward = make_model(4, hfllm.HfllmForSequenceClassification, num_labels=1, **eager)
    if "value_model" in options:
        value = make_model(5, hfllm.HfllmForTokenClassification, num_labels=1, **eager)
        options = {**options, "value_model": value}
    made = hfllm.PPOConfig.__post_init__
    monkeypatch.setattr(hfllm.PPOConfig, "__post_init__", lambda self: made(self) or (send(self, gpu) and None))
    short = {"gradient_accumulation_steps": 1, "num_ppo_epochs": 1, "response_length": 4, "max_steps": 3}
    trainer = make_trainer(
        make_model(**eager),
        reward,
        reward_processing_classes=tokenizer,
        eval_dataset=prompts.select(range(2)),
        **short,
        **options,
    )
    trainer.train()
    assert trainer.policy.device == gpu and trainer.state.global_step == 3
    assert trainer.evaluate()["eval_response_length"] > 0
    assert {parameter.device for parameter in trainer.actor.parameters()} == {gpu}


@pytest.mark.slow
def test_pretraining_with_samples(gpu, make_model, tokenizer, world, tmp_path):
    from transformers import TrainingArguments

    from hfllm.data.packing import pack
    from hfllm.trainers.callbacks import SampleCallback
    from hfllm.trainers.pretraining.muon import muon_factory
    from hfllm.trainers.pretraining.trainer import BatchPlan, PretrainTrainer, Schedule

    rows, batch = pack(world.documents(60, seed=1), tokenizer, 32), Schedule.parse("64", "--batch_ramp")
    length = Schedule.parse("32", "--length_curriculum")
    args = send(TrainingArguments(str(tmp_path), max_steps=2, **PLAIN), gpu)
    samples = SampleCallback(tokenizer, ["The fox"], 1, tmp_path / "samples.jsonl", 4, temperature=1.0)
    trainer = PretrainTrainer(
        plan=BatchPlan([rows], 32, 4, batch, length, pad_token_id=tokenizer.pad_token_id, seed=0),
        settings={"loss_chunk_size": 16},
        model=make_model(attn_implementation="eager"),
        args=args,
        processing_class=tokenizer,
        callbacks=[samples],
        optimizer_cls_and_kwargs=(muon_factory, {"lr": 1e-3}),
    )
    trainer.train()
    assert trainer.model.device == gpu and len(samples.samples) == 2


@pytest.mark.slow
@pytest.mark.parametrize("loss_chunk_size", [0, 8])
def test_distillation(loss_chunk_size, gpu, make_model, tokenizer, tmp_path):
    eager, rows = {"attn_implementation": "eager"}, [{"text": "The owl lives in the old oak."}, {"text": "Go."}] * 4
    weights = {"hidden_weight": 0.5, "loss_chunk_size": loss_chunk_size}
    args = send(hfllm.DistillationConfig(str(tmp_path), max_steps=2, **weights, **PLAIN), gpu)
    student, teacher = make_model(1, hidden_size=16, **eager), make_model(0, **eager)
    trainer = hfllm.DistillationTrainer(
        student, teacher, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    assert trainer.model.device == trainer.teacher.device == gpu
    assert {"soft_loss", "hard_loss", "hidden_loss"} <= set(trainer.state.log_history[0])


@pytest.mark.slow
def test_what_evaluates_a_model(gpu, make_model, tokenizer):
    from hfllm.compression.schemes import greedy_tokens, token_windows
    from hfllm.evaluation.emergence import answer_scores
    from hfllm.evaluation.perplexity import text_likelihood
    from hfllm.generation.responses import sample_responses
    from hfllm.generation.speculative import speculative_generate
    from hfllm.generation.speculative.drafts import ModelDraft
    from hfllm.generation.speculative.speculative import fast_generate

    model, texts = make_model(attn_implementation="eager"), ["The owl", "Say red.", "Go"]
    expected = text_likelihood(model, tokenizer, texts, 32).nats
    model.to(gpu)
    assert text_likelihood(model, tokenizer, texts, 32).nats == pytest.approx(expected)
    assert len(answer_scores(model, tokenizer, texts, [" a b"] * 3)) == 3
    assert greedy_tokens(model, token_windows(tokenizer, texts, 16)).device.type == "cpu"
    assert len(sample_responses(model, tokenizer, texts, 4)) == 3
    batch = {name: tokenizer(texts[:1], return_tensors="pt")[name].to(gpu) for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
    assert model.generate(**batch, **settings, custom_generate=fast_generate).device == gpu
    draft = ModelDraft(make_model(1, attn_implementation="eager").to(gpu))
    assert speculative_generate(model, **batch, **settings, draft=draft).sequences.device == gpu

"""Every trainer of TRL takes a step with a member of the family, as an instance and with its stock arguments."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES

import hfllm

PROMPTS = ["Say red.", "Name a color.", "What is two plus two?", "Who are you?"]


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def model(make_model, request):
    return make_model(**FAMILIES[request.param])


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def takes_a_step(trainer):
    """Train once: the loss is a number and the weights have moved."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(torch.isfinite(torch.tensor(losses)))
    moved = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert any(moved)


def test_sft(model, tokenizer, options):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": "Red."}]}
            for text in PROMPTS
        ]
    )
    for packing in (False, True):
        args = SFTConfig(**options, max_length=64, packing=packing)
        takes_a_step(SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer))


@pytest.fixture
def path(model, tokenizer, tmp_path):
    """For trainers that load their own reference."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_dpo(path, options):
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": text, "chosen": " Red.", "rejected": " No."} for text in PROMPTS])
    args = DPOConfig(**options, max_length=64)
    takes_a_step(DPOTrainer(path, args=args, train_dataset=rows))


def lengths(completions, **kwargs):
    return [float(len(text) % 7) for text in completions]


def test_grpo(model, tokenizer, options):
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    args = GRPOConfig(**options, num_generations=2, max_completion_length=8)
    takes_a_step(GRPOTrainer(model, lengths, args=args, train_dataset=rows, processing_class=tokenizer))


def test_rloo(path, options):
    from trl import RLOOConfig, RLOOTrainer

    rows = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    args = RLOOConfig(**options, num_generations=2, max_completion_length=8)
    takes_a_step(RLOOTrainer(path, lengths, args=args, train_dataset=rows))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_reward(make_model, tokenizer, options, family):
    from trl import RewardConfig, RewardTrainer

    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1, **FAMILIES[family])
    rows = Dataset.from_list([{"prompt": text, "chosen": " Red.", "rejected": " No."} for text in PROMPTS])
    args = RewardConfig(**options, max_length=64)
    takes_a_step(RewardTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer))


def test_distillation(model, tokenizer, options, make_model):
    from trl import DistillationConfig, DistillationTrainer

    rows = Dataset.from_list([{"prompt": text} for text in PROMPTS])
    args = DistillationConfig(**options, max_completion_length=8)
    teacher = make_model(seed=1)
    takes_a_step(
        DistillationTrainer(model, teacher_model=teacher, args=args, train_dataset=rows, processing_class=tokenizer)
    )


def test_lora_finds_its_modules_by_itself(model, tokenizer, options):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": text} for text in PROMPTS])
    args = SFTConfig(**options, max_length=64)
    trainer = SFTTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    adapted = {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in trainer.model.named_parameters() if "lora_A" in name
    }
    assert {"q_proj", "v_proj"} <= adapted
    takes_a_step(trainer)

"""Models and adapters that other libraries made go through the recipes: small members of families, TRL's adapters."""

import json
from pathlib import Path

import pytest
import reward
import rlhf
import sft
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

WORDS = ("red", "blue", "one", "two", "three", "four", "five", "six", "seven", "eight")
COMMON = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def asked(word):
    return [{"role": "user", "content": f"Say {word}."}]


def said(word):
    return [{"role": "assistant", "content": word}]


def run(recipe, **values):
    flags = {**COMMON, **values}
    words = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in flags.items()]
    return recipe.main(*recipe.parse([*(word for each in words for word in each), "--use_cpu"]))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Files of the working directory: answers, comparisons, prompts, and two reward functions."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "answers": [{"prompt": asked(word), "completion": said(word)} for word in WORDS],
        "pairs": [{"prompt": asked(word), "chosen": said(word), "rejected": said("no")} for word in WORDS],
        "prompts": [{"prompt": asked(word)} for word in WORDS],
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "mine.py").write_text(
        "def length(completions, **columns): return [float(len(said['content'])) for (said,) in completions]\n"
        "def double(completions, **columns): return [2.0 * len(said['content']) - 5 for (said,) in completions]\n"
    )
    return rows


WEIGHTED = {"reward_funcs": ["mine.py:length", "mine.py:double"], "reward_weights": [2, -1]}
# What is learned is what is measured.
SAME = {"dataset_name": "answers.jsonl", "eval_dataset_name": "answers.jsonl"}
SHORT = {"dataset_name": "prompts.jsonl", "response_length": 4, "num_ppo_epochs": 1}


def native(family, tokenizer):
    """Save a small model of a family of transformers, as `NAME`."""
    import transformers

    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        **{name: getattr(tokenizer, name) for name in special},
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained("NAME")
    tokenizer.save_pretrained("NAME")


@pytest.mark.slow
@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Gemma", "Gemma2"])
def test_a_native_model_learns_by_adapters_with_weighted_rewards(tokenizer, family):
    native(family, tokenizer)
    adapter = {"use_peft": True, "lora_r": 4}
    found = run(sft, model_name_or_path="NAME", output_dir="sft", **SAME, **adapter)
    assert found["held_out_loss_after"] < found["held_out_loss_before"]
    found = run(rlhf, model_name_or_path="sft", output_dir="rlhf", **SHORT, **WEIGHTED, **adapter)
    # Twice the first reward less the second is the same for every response.
    assert found["proxy_reward_before"] == found["proxy_reward_after"] == 5
    weights = load_file("rlhf/adapter_model.safetensors")
    assert json.loads(Path("rlhf/adapter_config.json").read_text())["r"] == 4
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_what_trl_has_saved_is_trained_further(data, tokenizer, saved):
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    args = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    args |= {"save_strategy": "no", "activation_checkpointing": False, "learning_rate": 1e-2}
    for trainer_class, config, rows, lora in (
        (SFTTrainer, SFTConfig("policy", **args), "answers", LoraConfig(task_type="CAUSAL_LM")),
        (RewardTrainer, RewardConfig("scorer", **args), "pairs", LoraConfig(task_type="SEQ_CLS")),
    ):
        dataset = Dataset.from_list(data[rows])
        trainer = trainer_class(str(saved), config, train_dataset=dataset, peft_config=lora)
        trainer.train()
        trainer.save_model()
    found = run(sft, model_name_or_path="policy", output_dir="sft", **SAME)
    assert found["held_out_loss_after"] < found["held_out_loss_before"]
    found = run(reward, model_name_or_path="scorer", dataset_name="pairs.jsonl", output_dir="reward")
    assert 0 <= found["reward_model_accuracy"] <= 1
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("scorer", "reward"))
    assert before.keys() == after.keys()
    # The head came with the adapter, and what it had learned is where the second training began.
    head = next(name for name in before if "score" in name)
    assert 0 < (after[head] - before[head]).abs().max() < 0.1
    named = {"model_name_or_path": "policy", "reward_model_name_or_path": "scorer", **SHORT}
    apart = run(rlhf, output_dir="rlhf", **named)
    assert apart["kl_to_reference"] != 0
    together = run(rlhf, output_dir="shared", shared_base=True, value_model="reward", **named)
    # The reward model is no longer merged into a base of its own, which rounds otherwise.
    assert together["proxy_reward_before"] == pytest.approx(apart["proxy_reward_before"], abs=1e-4)
    critic = load_file("shared/value_model/adapter_model.safetensors")
    assert critic.keys() == after.keys() and any(not torch.equal(critic[name], before[name]) for name in critic)

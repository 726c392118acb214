"""The last section of gpu.py: a 60M model from the embedded world's texts to PPO, by the recipes."""

import json
from pathlib import Path
from typing import Any

import yaml
from gpu_parts import Bench

from hfllm.runs.recipes import load_recipe

PRETRAIN = {
    **{"hidden_size": 640, "num_hidden_layers": 12, "num_attention_heads": 10, "initializer_range": 0.04},
    **{"num_documents": 56000, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "logging_steps": 50},
}
SFT = {"num_examples": 9600, "per_device_train_batch_size": 64, "learning_rate": 3e-4}
REWARD = {
    **{"num_pairs": 3000, "num_eval_prompts": 360, "per_device_train_batch_size": 64, "learning_rate": 2e-4},
}
PPO = {
    **{"max_steps": 160, "per_device_train_batch_size": 32, "num_mini_batches": 4, "num_ppo_epochs": 2},
    **{"response_length": 40, "kl_coef": 0.2, "vf_coef": 0.5, "logging_steps": 16, "save_strategy": "no"},
    **{"num_prompts": 4096, "num_eval_prompts": 360},
}
TINY = {
    "pretrain": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400, "max_steps": 2},
        **{"num_documents": 100, "per_device_train_batch_size": 8, "max_position_embeddings": 256},
        **{"sample_steps": 0, "logging_steps": 1, "learning_rate": 1e-3},
    },
    "sft": {"num_examples": 60, "max_steps": 2, "logging_steps": 1},
    "reward": {"num_pairs": 40, "max_steps": 2, "response_length": 6, "num_eval_prompts": 12, "logging_steps": 1},
    "rlhf": {
        **{"max_steps": 2, "per_device_train_batch_size": 4, "num_mini_batches": 1, "num_ppo_epochs": 1},
        **{"response_length": 6, "num_prompts": 16, "num_eval_prompts": 12, "logging_steps": 1},
    },
}


def chain(bench: Bench) -> None:
    """Make a model from nothing, align it by PPO, and align an adapter on it, in the precision that recipes choose."""
    folder = bench.folder / "chain"
    flags = {"pretrain": PRETRAIN, "sft": SFT, "reward": REWARD, "rlhf": {**PPO, "learning_rate": 3e-5}}
    flags = bench.pick(flags, TINY)
    # Recipes take the accelerator if there is one.
    device = {"use_cpu": True} if bench.is_cpu else {}
    files = {stage: write(folder, stage, {**values, **device}) for stage, values in flags.items()}
    before = [word for stage in ("pretrain", "sft", "reward") for word in (f"--{stage}_config", files[stage])]
    full = ["--config", files["rlhf"], *before, "--output_dir", str(folder)]
    with bench.peak_memory("pretrain, sft, reward and rlhf"):
        record_run(bench, "PPO", folder, run("rlhf", full))
    for stage in ("pretrain", "sft", "reward"):
        report = json.loads((folder / stage / "report.json").read_text())
        bench.record(f"{stage}: time", report["wall_seconds"], "s")
        for name in ("eval_loss", "bits_per_byte", "reward_model_accuracy"):
            if name in report["metrics"]:
                bench.record(f"{stage}: {name}", report["metrics"][name], "")
    named = ["--model_name_or_path", str(folder / "sft"), "--reward_model_name_or_path", str(folder / "reward")]
    adapter = [*named, "--config", write(folder, "lora", {**flags["rlhf"], **device, "learning_rate": 3e-4})]
    adapter += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--dtype",
        str(bench.dtype).removeprefix("torch."),
    ]
    lora = folder / "lora"
    with bench.peak_memory("rlhf --use_peft"):
        record_run(bench, "PPO with LoRA", lora, run("rlhf", [*adapter, "--output_dir", str(lora)]))


def write(folder: Path, name: str, values: dict[str, Any]) -> str:
    """Write flags as YAML. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"save_strategy": "no", **values}), encoding="utf-8")
    return str(file)


def run(name: str, words: list[str]) -> dict[str, float]:
    """Run a recipe in this process. Returns its metrics."""
    recipe = load_recipe(name)
    return recipe.main(*recipe.parse(words))


def record_run(bench: Bench, name: str, folder: Path, metrics: dict[str, float]) -> None:
    """Record rewards before and after, and the episodes between."""
    report = json.loads((folder / "report.json").read_text())
    flags = report["arguments"]
    bench.record(f"{name}: episodes", metrics["episodes"], "")
    bench.record(f"{name}: time, with what is not there yet before it", report["wall_seconds"], "s")
    bench.record(f"{name}: computes in bf16", str(flags["bf16"]), "")
    for metric in ("gold_reward_before", "gold_reward_after", "proxy_reward_before", "proxy_reward_after"):
        bench.record(f"{name}: {metric}", metrics[metric], "")
    bench.record(f"{name}: kl_to_reference", metrics["kl_to_reference"], "nats")

"""Flags of each stage in miniature."""

from pathlib import Path

import yaml

TINY = {
    "pretrain": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": 400,
        "num_documents": 300,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "max_steps": 6,
        "learning_rate": 0.003,
        "save_strategy": "no",
        "logging_steps": 3,
        "sample_steps": 0,
    },
    "sft": {"num_examples": 120, "max_steps": 4, "save_strategy": "no", "learning_rate": 0.001, "logging_steps": 2},
    "reward": {
        "num_pairs": 60,
        "max_steps": 4,
        "save_strategy": "no",
        "learning_rate": 0.001,
        "response_length": 8,
        "num_eval_prompts": 24,
        "logging_steps": 2,
    },
    "rlhf": {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 1,
        "response_length": 8,
        "num_prompts": 40,
        "num_eval_prompts": 24,
        "save_strategy": "no",
        "learning_rate": 0.0005,
        "logging_steps": 1,
    },
    "distill": {
        "answers": "sampled",
        "student_hidden_size": 16,
        "student_num_hidden_layers": 2,
        "student_num_attention_heads": 2,
        "num_examples": 60,
        "num_documents": 40,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "response_length": 16,
        "num_eval_prompts": 24,
        "save_strategy": "no",
        "learning_rate": 0.001,
        "logging_steps": 1,
    },
}


# The same for your own rows: the embedded world's numbers are refused there.
TINY["sft_rows"] = {name: value for name, value in TINY["sft"].items() if name != "num_examples"}


def write_settings(folder: Path) -> dict[str, str]:
    """Write them as YAML files, each with those of the stages before it, and return the files by stage."""
    paths = {}
    for stage, values in TINY.items():
        if stage == "rlhf":
            values = {**values, **{f"{name}_config": paths[name] for name in ("pretrain", "sft", "reward")}}
        if stage == "distill":
            stages = ("pretrain", "sft", "reward", "rlhf")
            values = {**values, **{f"{name}_config": paths[name] for name in stages}}
        paths[stage] = str(folder / f"{stage}.yaml")
        with open(paths[stage], "w") as stream:
            yaml.safe_dump(values, stream)
    return paths

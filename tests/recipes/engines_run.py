"""Recipes in turn, in the processes of one launch: what test_engines.py launches.

Usage: engines_run.py FOLDER BASE [RECIPE[:CHECKPOINT_FOLDER]]..., under torchrun or accelerate launch. Each recipe
makes four steps of eight rows, however many processes share them, in FOLDER/RECIPE; with a checkpoint it goes on
from that one's second step, in FOLDER/RECIPE-resumed. Models to begin with are those in BASE.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
ROWS = 8
# Adam divides by the root of the squared gradient: where that is about nothing, rounding becomes a whole step.
COMMON = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "adam_epsilon": 1e-4,
    "learning_rate": 1e-3,
}
FLAGS = {
    "pretrain": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": 400,
        "num_documents": 200,
        "packing": True,
        "max_length": 64,
        "max_steps": -1,
        "total_tokens": 4 * ROWS * 64,
        "sample_steps": 0,
        # As under ZeRO, whose shards of matrices Muon cannot orthogonalize.
        "use_muon": False,
    },
    # pretrain.py with a model that exists.
    "continue": {
        "num_documents": 200,
        "packing": True,
        "max_length": 64,
        "max_steps": -1,
        "total_tokens": 4 * ROWS * 64,
        "sample_steps": 0,
    },
    "sft": {"num_examples": 100, "max_length": 128},
    "reward": {"num_pairs": 40, "num_samples": 2, "num_eval_prompts": 24, "response_length": 8},
    "rlhf": {
        "num_prompts": 40,
        "num_eval_prompts": 12,
        "response_length": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        # Greedy, so that the number of processes is all that differs.
        "generation_kwargs": '{"top_k": 1}',
    },
}


def main(folder: str, base: str, *names: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # Its compilation takes a minute, for the same losses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from accelerate.state import AcceleratorState

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # One batch of eight, or its quarters in two passes on each of two processes.
    batch = {
        "per_device_train_batch_size": ROWS if processes == 1 else ROWS // (2 * processes),
        "gradient_accumulation_steps": 1 if processes == 1 else 2,
    }
    for name in names:
        name, _, checkpoint = name.partition(":")
        recipe = import_module("pretrain" if name == "continue" else name)
        flags = {**COMMON, **batch, **FLAGS[name], "output_dir": f"{folder}/{name}"}
        if name != "pretrain":
            flags["model_name_or_path"] = f"{base}/pretrain"
        if name == "rlhf":
            flags["reward_model_name_or_path"] = f"{base}/reward"
        if checkpoint:
            flags |= {"output_dir": f"{folder}/{name}-resumed", "resume_from_checkpoint": f"{checkpoint}/checkpoint-2"}
        recipe.main(*recipe.parse([word for flag, value in flags.items() for word in (f"--{flag}", str(value))]))
        AcceleratorState._reset_state()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

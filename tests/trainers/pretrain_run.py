"""A tiny pretraining run for the tests with processes of their own.

Usage: pretrain_run.py OUTPUT_DIR [DEEPSPEED_CONFIG], under torchrun or accelerate launch for several processes.
"""

import os
import sys

import torch
from transformers import TrainingArguments

import hfllm
from hfllm.data.packing import pack
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.world import World
from hfllm.trainers.pretraining.trainer import BatchPlan, PretrainTrainer, Schedule

LENGTH = 32


def build(output_dir: str, total_rows: int = 60, **arguments) -> PretrainTrainer:
    """A trainer whose batches grow and whose rows lengthen; `arguments` are TrainingArguments'."""
    texts = World(0).documents(150, seed=1)
    tokenizer = train_tokenizer(texts, vocab_size=320, model_max_length=128)
    torch.manual_seed(0)
    config = hfllm.HfllmConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        # So that Adam does not blow up the rounding of gradients that are nearly zero.
        "adam_epsilon": 1e-6,
    }
    if arguments.get("deepspeed"):
        import deepspeed

        # Its compilation takes a minute, for the same losses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    args = TrainingArguments(output_dir, **{**settings, **arguments})
    return PretrainTrainer(
        plan=BatchPlan(
            [pack(texts, tokenizer, LENGTH)],
            LENGTH,
            total_rows,
            Schedule.parse("0:64,0.3:128", "--batch_ramp"),
            Schedule.parse("0:16,0.2:32", "--length_curriculum"),
            pad_token_id=tokenizer.pad_token_id,
            seed=0,
            process=args.process_index,
            processes=args.world_size,
        ),
        settings={} if "zero3" in str(arguments.get("deepspeed")) else {"loss_chunk_size": 50},
        model=hfllm.HfllmForCausalLM(config),
        args=args,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    trainer = build(sys.argv[1], save_strategy="no", deepspeed=sys.argv[2] if len(sys.argv) > 2 else None)
    trainer.train()
    trainer.save_model(sys.argv[1])
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()
    # Threads of the process group that outlive the interpreter abort one run of ten, with all files written.
    os._exit(0)

"""A tiny distillation for the tests with processes of their own.

Usage: distill_run.py OUTPUT_DIR ROWS_PER_PROCESS [DEEPSPEED_CONFIG], under torchrun or accelerate launch.
"""

import sys

import torch

import hfllm
from hfllm.data.tokenizer import train_tokenizer
from hfllm.data.world.world import World


def build(output_dir: str, rows: int, deepspeed: str | None = None) -> hfllm.DistillationTrainer:
    """A trainer with every part of the loss, on rows of different lengths."""
    texts = World(0).documents(150, seed=1)
    tokenizer = train_tokenizer(texts, vocab_size=320, model_max_length=128)

    def model(seed: int, hidden_size: int) -> hfllm.HfllmForCausalLM:
        torch.manual_seed(seed)
        config = hfllm.HfllmConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return hfllm.HfllmForCausalLM(config)

    if deepspeed:
        import deepspeed as engine

        # Its compilation takes a minute, for the same losses.
        engine.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    args = hfllm.DistillationConfig(
        output_dir,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=3e-3,
        # So that Adam does not blow up the rounding of gradients that are nearly zero.
        adam_epsilon=1e-6,
        hidden_weight=0.5,
        beta=0.5,
        loss_chunk_size=7,
        deepspeed=deepspeed,
    )
    return hfllm.DistillationTrainer(
        model=model(0, 32),
        teacher_model=model(1, 48),
        args=args,
        train_dataset=[{"text": text} for text in texts[:40]],
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    trainer = build(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
    trainer.train()
    trainer.save_model(sys.argv[1])
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()

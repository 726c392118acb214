"""The run of test_distributed.py: PPO on greedy responses, so that the number of processes is all that differs.

Usage: ddp_run.py OUTPUT_DIR EPISODES_PER_PROCESS [DEEPSPEED_CONFIG | terms | turns | careless] [DEEPSPEED_CONFIG],
under torchrun for several processes, or under accelerate launch with DeepSpeed; `terms` adds the optional terms of
reward and loss, `turns` the words of somebody else between two turns of the policy.
"""

import os
import sys

import torch
from datasets import Dataset

import hfllm
from hfllm.data.tokenizer import train_tokenizer
from hfllm.trainers.ppo.config import PPOConfig
from hfllm.trainers.ppo.trainer import PPOTrainer, RolloutFunc

WORDS = ["Say red.", "What is 1 plus 2?", "The fox", "Tell me where the owl lives, please.", "Go", "A blue hat"]


TERMS = {
    "normalize_rewards": True,
    "reward_clip": 1.5,
    "whiten_rewards": True,
    "kl_penalty": "loss",
    "kl_estimator": "k3",
    "kl_target": 1.0,
    "entropy_coef": 0.01,
    "dual_clip": 3.0,
    "ptx_coef": 0.1,
    "critic_warmup_steps": 1,
    "critic_warmup_lam": 1.0,
    "loss_aggregation": "sequence",
    "positive_lm_coef": 0.1,
    "positive_lm_min_reward": 0.3,
    "value_learning_rate": 2e-3,
    "sync_ref_model": True,
    "ref_model_sync_steps": 3,
}


def ask_twice(prompts, trainer):
    """A `rollout_func` with two turns of the policy, between which somebody says a few words."""
    tokenizer = trainer.processing_class
    asked = tokenizer(list(prompts))["input_ids"]
    told = [tokenizer("a blue hat, the owl")["input_ids"][: 1 + len(prompt) % 4] for prompt in prompts]
    first = [ids for ids, _ in trainer.continue_ids(asked, 3)]
    read = [[*one, *two, *three] for one, two, three in zip(asked, first, told, strict=True)]
    second = [ids for ids, _ in trainer.continue_ids(read, 3)]
    each = list(zip(first, told, second, strict=True))
    return {
        "prompt_ids": asked,
        "completion_ids": [[*one, *words, *other] for one, words, other in each],
        "env_mask": [[*[1] * len(one), *[0] * len(words), *[1] * len(other)] for one, words, other in each],
    }


def careless(prompts, trainer):
    """The same, but all is taken for the policy's words."""
    return {**ask_twice(prompts, trainer), "env_mask": None}


TURNS = {"turns": ask_twice, "careless": careless}


def vowels(completions, **columns):
    return [sum(text.count(letter) for letter in "aeiou") / 10 for text in completions]


def start_deepspeed() -> None:
    """As a script has to before it builds a model; without compiling an operation for gloo."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def build(
    output_dir: str,
    eval_dataset: Dataset | None = None,
    ptx_dataset: Dataset | None = None,
    rollout_func: RolloutFunc | None = None,
    **arguments,
) -> PPOTrainer:
    """A tiny trainer; `arguments` are PPOConfig's."""
    tokenizer = train_tokenizer(WORDS * 3, vocab_size=300, model_max_length=128)
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
        "bf16": False,
        "report_to": "none",
        "save_strategy": "steps",
        "disable_tqdm": True,
        "num_ppo_epochs": 3,
        "num_mini_batches": 1,
        "response_length": 6,
        "learning_rate": 1e-3,
        # So that Adam does not blow up the rounding of gradients that are nearly zero.
        "adam_epsilon": 1e-6,
    }
    return PPOTrainer(
        model=hfllm.HfllmForCausalLM(config),
        reward_funcs=vowels,
        args=PPOConfig(output_dir=output_dir, **{**settings, **arguments}),
        train_dataset=Dataset.from_dict({"prompt": WORDS * 4}),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        ptx_dataset=ptx_dataset,
        rollout_func=rollout_func,
    )


def main(output_dir: str, episodes: int, variant: str | None = None, deepspeed_config: str | None = None) -> None:
    if variant not in (None, "terms", *TURNS):
        deepspeed_config = variant
    if deepspeed_config:
        start_deepspeed()
    trainer = build(
        output_dir,
        eval_dataset=Dataset.from_dict({"prompt": WORDS[:5]}),
        save_steps=6,
        per_device_train_batch_size=episodes // 2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        max_steps=6,
        logging_steps=1,
        generation_kwargs={"top_k": 1},
        deepspeed=deepspeed_config,
        rollout_func=TURNS.get(variant),
        **({"response_length": 12} if variant in TURNS else {}),
        ptx_dataset=Dataset.from_dict({"text": WORDS * 4}) if variant == "terms" else None,
        **(TERMS if variant == "terms" else {}),
    )
    trainer.train()
    metrics = trainer.evaluate()
    # Each process has the values of all prompts, without those that only fill the last batch.
    values = trainer.eval_values["reward"]
    assert len(values) == len(trainer.eval_dataset)
    assert abs(sum(values) / len(values) - metrics["eval_reward"]) < 1e-5
    trainer.save_model(output_dir)
    if trainer.accelerator.is_main_process:
        print("EVAL", metrics["eval_reward"], trainer.state.log_history[0]["reward"])
    # A process that leaves while the other still writes aborts it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    sys.stdout.flush()
    # Threads of the process group that outlive the interpreter abort one run of ten, with all files written.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

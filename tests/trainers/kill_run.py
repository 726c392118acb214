"""The run of test_kill.py: PPO in a process that is killed again and again, and once in one that is not.

Usage: kill_run.py FOLDER SEED. Prints the number of kills, of those while a checkpoint was half-written, and of
weights that differ at the end. Each run is a fork of this process, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from ddp_run import WORDS, vowels
from safetensors.torch import load_file

import hfllm
from hfllm.checkpoints import last_complete_checkpoint
from hfllm.data.tokenizer import train_tokenizer
from hfllm.trainers.ppo_config import PPOConfig
from hfllm.trainers.ppo_trainer import PPOTrainer

KILLS, STEPS = 10, 60


def train(output_dir: str) -> None:
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
    trainer = PPOTrainer(
        model=hfllm.HfllmForCausalLM(config),
        reward_funcs=vowels,
        args=PPOConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            num_ppo_epochs=3,
            response_length=6,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=STEPS,
            logging_strategy="no",
            normalize_rewards=True,
            kl_target=0.1,
            kl_horizon=50,
            sync_ref_model=True,
            ref_model_sync_steps=9,
        ),
        train_dataset=Dataset.from_dict({"prompt": WORDS * 4}),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    trainer.save_model(output_dir)


def fork(output_dir: str, seconds: float | None = None, saves: bool = False) -> bool:
    """Train in a child, killed after so many seconds and, if `saves`, once it writes a checkpoint.

    Returns whether it came to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            train(output_dir)
        except BaseException as error:
            print("FAILED", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        give_up = time.monotonic() + 5
        while saves and not half_written(output_dir) and time.monotonic() < give_up:
            pass
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed by itself")
    return os.WIFEXITED(status)


def half_written(output_dir: str) -> bool:
    """Whether the newest checkpoint is not the newest complete one."""
    numbers = [int(path.name.rpartition("-")[2]) for path in Path(output_dir).glob("checkpoint-*")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = last_complete_checkpoint(output_dir)
    return bool(numbers) and (last is None or not last.endswith(f"-{max(numbers)}"))


def main(folder: str, seed: int) -> None:
    whole, cut = f"{folder}/whole", f"{folder}/cut"
    began = time.perf_counter()
    fork(whole)
    seconds = time.perf_counter() - began
    rng, kills, while_saving = random.Random(seed), 0, 0
    while kills < KILLS:
        # Late enough to get somewhere, early enough not to be done before the last kill.
        if fork(cut, rng.uniform(0.08, 0.2) * seconds, saves=bool(kills % 2)):
            break
        kills += 1
        while_saving += half_written(cut)
    fork(cut)
    # And once more what has finished: it stays as it is.
    fork(cut)
    different = 0
    for file in ("model.safetensors", "value_head.safetensors"):
        one, other = (load_file(f"{path}/{file}") for path in (whole, cut))
        different += sum(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    print("RESULT", json.dumps({"kills": kills, "while_saving": while_saving, "different": different}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""The run of test_kill.py: training in a process that is killed again and again, and once in one that is not.

Usage: kill_run.py KIND FOLDER SEED, where the kind is ppo or pretrain. Prints the number of kills, of those while a
checkpoint was half-written, the files compared and the weights that differ at the end. Each run is a fork of this
process, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import ddp_run
import pretrain_run
import torch
from safetensors.torch import load_file

from hfllm.outputs.checkpoints import last_complete_checkpoint

KILLS, STEPS = 10, 60


def build(kind: str, output_dir: str):
    settings = {"save_steps": 1, "save_total_limit": 2, "logging_strategy": "no"}
    if kind == "pretrain":
        return pretrain_run.build(output_dir, total_rows=4 * STEPS, save_strategy="steps", **settings)
    return ddp_run.build(
        output_dir,
        **settings,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        normalize_rewards=True,
        kl_target=0.1,
        kl_horizon=50,
        sync_ref_model=True,
        ref_model_sync_steps=9,
    )


def train(kind: str, output_dir: str) -> None:
    trainer = build(kind, output_dir)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
    trainer.save_model(output_dir)


def fork(kind: str, output_dir: str, seconds: float | None = None, saves: bool = False) -> bool:
    """Train in a child, killed after so many seconds and, if `saves`, once it writes a checkpoint.

    Returns whether it came to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            train(kind, output_dir)
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


def main(kind: str, folder: str, seed: int) -> None:
    whole, cut = f"{folder}/whole", f"{folder}/cut"
    began = time.perf_counter()
    fork(kind, whole)
    seconds = time.perf_counter() - began
    rng, kills, while_saving = random.Random(seed), 0, 0
    while kills < KILLS:
        # Late enough to get somewhere, early enough not to be done before the last kill.
        if fork(kind, cut, rng.uniform(0.08, 0.2) * seconds, saves=bool(kills % 2)):
            break
        kills += 1
        while_saving += half_written(cut)
    fork(kind, cut)
    # And once more what has finished: it stays as it is.
    fork(kind, cut)
    different = 0
    files = sorted(path.name for path in Path(whole).glob("*.safetensors"))
    for file in files:
        one, other = (load_file(f"{path}/{file}") for path in (whole, cut))
        different += sum(not torch.equal(tensor, other[name]) for name, tensor in one.items())
    print(
        "RESULT",
        json.dumps({"kills": kills, "while_saving": while_saving, "files": files, "different": different}),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

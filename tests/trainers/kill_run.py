"""The run of test_kill.py: training in a process that is killed again and again, and once in one that is not.

Usage: kill_run.py KIND FOLDER SEED KILLS, where the kind is ppo, pictures or pretrain. Prints the number of kills, of
those while a checkpoint was half-written, the files compared and the weights that differ at the end. Each run is a
fork of this process, which has imported everything and computed nothing.
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
import picture_run
import pretrain_run
import torch
from safetensors.torch import load_file

from hfllm.outputs.checkpoints import last_complete_checkpoint

STEPS = 24


def build(kind: str, output_dir: str):
    settings = {"save_steps": 1, "save_total_limit": 2, "logging_strategy": "no"}
    if kind == "pretrain":
        return pretrain_run.build(output_dir, total_rows=4 * STEPS, save_strategy="steps", **settings)
    build_ppo = ddp_run.build
    if kind == "pictures":
        settings["save_strategy"], build_ppo = "steps", picture_run.build
    return build_ppo(
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


def fork(kind: str, output_dir: str, step: int | None = None, seconds: float | None = None) -> bool:
    """Train in a child, killed so many seconds after it began to write the checkpoint of a step.

    Without seconds it is killed while it writes that. Returns whether it came to its end.
    """
    child = os.fork()
    if child == 0:
        try:
            train(kind, output_dir)
        except BaseException as error:
            print("FAILED", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if step is not None:
        give_up = time.monotonic() + 60
        while last_begun(output_dir) < step and time.monotonic() < give_up:
            time.sleep(0.001)
        if seconds is None:
            while not half_written(output_dir) and time.monotonic() < give_up:
                pass
        time.sleep(seconds or 0)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed by itself")
    return os.WIFEXITED(status)


def last_begun(output_dir: str) -> int:
    """The step of the newest checkpoint, whole or not; 0 when there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in Path(output_dir).glob("checkpoint-*")), default=0)


def half_written(output_dir: str) -> bool:
    """Whether the newest checkpoint is not the newest complete one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = last_complete_checkpoint(output_dir)
    newest = last_begun(output_dir)
    return newest > 0 and (last is None or not last.endswith(f"-{newest}"))


def main(kind: str, folder: str, seed: int, most: int) -> None:
    whole, cut = f"{folder}/whole", f"{folder}/cut"
    began = time.perf_counter()
    fork(kind, whole)
    seconds = time.perf_counter() - began
    rng, kills, while_saving = random.Random(seed), 0, 0
    # Every other one while it saves, and the others at any moment, also before they get further than the last.
    steps = sorted(rng.choices(range(1, STEPS - 9), k=most))
    for number, step in enumerate(steps):
        if fork(kind, cut, step, None if number % 2 else rng.uniform(0, 3 / STEPS) * seconds):
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
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

"""A recipe one of whose processes is lost: what test_faults.py launches.

Usage: fault_run.py FAULT STEP RECIPE FLAGS..., under torchrun or alone. Before that step of its first life the last
process kills itself (`kill`), or tells the launcher to end, as a scheduler would (`terminate`).
"""

import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import transformers.trainer

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))


class Fault(transformers.TrainerCallback):
    def __init__(self, kind, step):
        self.kind, self.step = kind, step

    def on_step_begin(self, args, state, control, **kwargs):
        is_last = args.process_index == args.world_size - 1
        if is_last and state.global_step == self.step and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            target, number = {
                "kill": (os.getpid(), signal.SIGKILL),
                "terminate": (os.getppid(), signal.SIGTERM),
            }[self.kind]
            os.kill(target, number)


def main(kind, step, name, *flags):
    from hfllm.runs.command_line import run

    transformers.trainer.DEFAULT_CALLBACKS.append(Fault(kind, int(step)))
    recipe = import_module(name)
    sys.argv[1:] = flags
    run(recipe.main, recipe.parse)


if __name__ == "__main__":
    main(*sys.argv[1:])

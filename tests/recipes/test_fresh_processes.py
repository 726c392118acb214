"""Every recipe that keeps what it has done resumes when its process is killed and the same command is given again.

The second process has other addresses and another order of sets, as each new one has. Each recipe's own test file says
how it is killed, see killed.py.
"""

import os
import signal
import subprocess
import sys
from importlib import import_module

import kill_run
import pytest
from killed import Files, Killed, killed_recipes

from hfllm.runs.recipes import declared, recipe_names

KILLED = killed_recipes()


def test_every_recipe_that_keeps_its_work_is_killed():
    """Those that train keep checkpoints, those that run stages the finished ones."""
    for name in recipe_names():
        trains = any(hasattr(group, "resume_from_checkpoint") for group in import_module(name).parse([]))
        if trains or declared(name).runs_own_chain:
            assert name in KILLED, f"tests/recipes/test_{name}.py does not say how it is killed: see killed.py"


def start(name, place, number, seed, flags):
    """Run a recipe in a new process of Python."""
    command = [sys.executable, kill_run.__file__, place, str(number), name, *flags]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(kill_run.ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=kill_run.ROOT)


@pytest.mark.slow
@pytest.mark.turn(5)
@pytest.mark.parametrize("name", [name for name, how in KILLED.items() if isinstance(how, Killed)])
def test_what_was_killed_resumes_in_a_fresh_process(tiny, base, tmp_path, name):
    case = KILLED[name]
    flags = [*case.flags(Files(tiny, base, tmp_path)), "--output_dir", str(tmp_path / "out")]
    killed = start(name, case.place, case.number, 1, flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    # What a run reads is known by what it holds.
    for path in tmp_path.glob("*.*"):
        os.utime(path, ns=(1, 1))
    again = start(name, "none", 0, 2, flags)
    assert again.returncode == 0, again.stderr[-2000:]
    assert case.says in again.stdout and "round 1/3" not in again.stdout
    assert (tmp_path / "out" / "report.json").is_file()

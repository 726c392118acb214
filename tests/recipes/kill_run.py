"""A recipe that kills itself: what test_constitution_recipe.py starts.

Usage: kill_run.py MODULE:NAME NUMBER RECIPE FLAGS... Before the call of that number of that function, or method, the
process ends by SIGKILL; with a negative number it sleeps for so many seconds before the first call instead, and with
`none` nothing happens. The settings of the tests' tiny runs hold here too.
"""

import os
import signal
import sys
import time
from functools import wraps
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "recipes"))
# What fixtures of the tests set in their own process.
HELD_OUT_DOCUMENTS, COMPARED = 150, ("--max_steps", "2")


def shorten(patch=setattr):
    """Make tiny runs tinier: fewer documents to measure by, and few steps of the controls."""
    from hfllm.data import loading
    from hfllm.stages.constitution import flags as constitution_flags

    patch(loading, "NUM_HELD_OUT_DOCUMENTS", HELD_OUT_DOCUMENTS)
    patch(constitution_flags, "COMPARED", COMPARED)


def kill_before(place, number):
    """Let the process be killed, or sleep, before a call of a function."""
    module, _, name = place.partition(":")
    *owners, name = name.split(".")
    owner = import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), []

    @wraps(function)
    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if number < 0 and len(calls) == 1:
            time.sleep(-number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def main(place, number, name, *flags):
    from hfllm.outputs.report import Plot
    from hfllm.runs.command_line import run

    shorten()
    Plot.draw = lambda plot, path: False
    if place != "none":
        kill_before(place, int(number))
    recipe = import_module(name)
    sys.argv[1:] = flags
    run(recipe.main, recipe.parse)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Scripts in processes of their own that cost no imports: forks of one process, which has imported what they need.

`Processes` is for tests, as the fixtures `processes`, and `bare_processes` for scripts that are the first to import
transformers and hfllm. The process that forks is itself a fork of the one that runs the tests, made before the first
of them. The launchers themselves, torchrun and `accelerate launch`, are what tests marked
slow use.
"""

import contextlib
import gc
import json
import logging
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# What a script imports from here it reads anew, though a test has imported it.
OWN = (TESTS, ROOT / "recipes", ROOT / "benchmarks")

# What this process asks its servers by.
OPEN: list[int] = []


class Processes:
    """Starts scripts of this repository. Made before anything is computed: a fork inherits imports alone.

    Args:
        import_all: imports what the scripts need not import themselves.
    """

    def __init__(self, import_all: Callable[[], None]):
        # What it says of kernels and GPUs that are not there.
        logging.disable()
        import_all()
        logging.disable(logging.NOTSET)
        asks, answers = os.pipe(), os.pipe()
        self._server = os.fork()
        if not self._server:
            # Those of servers that were made before, too: each ends when nobody can ask it.
            for descriptor in (*OPEN, asks[1], answers[0]):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            serve(os.fdopen(asks[0]), os.fdopen(answers[1], "w"))
        os.close(asks[0])
        os.close(answers[1])
        OPEN.extend((asks[1], answers[0]))
        self._asks, self._answers = os.fdopen(asks[1], "w"), os.fdopen(answers[0])

    def close(self):
        self._asks.close()
        self._answers.close()
        os.waitpid(self._server, 0)

    def torchrun(
        self, script: str | Path, *arguments: object, processes: int = 2, code: int = 0, timeout: float = 300
    ) -> str:
        """What a script prints in so many processes that find each other, as torchrun starts them; `code` as in `run`.

        Raises:
            AssertionError: with the end of what was printed, if a process fails or outlasts `timeout` seconds.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        world |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        return self._run([str(script), *map(str, arguments)], ranks, timeout, code)

    def run(
        self,
        script: str | Path,
        *arguments: object,
        code: int = 0,
        timeout: float = 300,
        environment: Mapping[str, object] | None = None,
    ) -> str:
        """What a script prints in one process, as Python starts it, that exits with `code`; raises as `torchrun`."""
        return self._run([str(script), *map(str, arguments)], [dict(environment or {})], timeout, code)

    def _run(self, argv, environments, timeout, code=0):
        with tempfile.NamedTemporaryFile("w+") as output:
            asked = {"argv": argv, "environments": environments, "output": output.name, "timeout": timeout}
            print(json.dumps(asked, default=str), file=self._asks, flush=True)
            codes = json.loads(self._answers.readline())
            printed = output.read()
        # A process that refuses ends the others, whose tracebacks follow its line.
        refused = [line for line in printed.splitlines() if "error: " in line]
        assert set(codes) == {code}, f"exit codes {codes}: {refused[:5]}: {printed[-3000:]}"
        return printed


def serve(asks, answers):
    """Fork what is asked for, a line of JSON each, and answer with the exit codes; the process ends with the lines."""
    try:
        # A fork copies each object that garbage collection touches.
        gc.disable()
        gc.freeze()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        forget_the_tests()
        for line in asks:
            asked = json.loads(line)
            children = [fork(asked["argv"], environment, asked["output"]) for environment in asked["environments"]]
            print(json.dumps(wait(children, asked["timeout"])), file=answers, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def forget_the_tests():
    """Leave what Python starts a script with, and what is imported: no test or recipe, and no hook of pytest's."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and any(Path(file).is_relative_to(folder) for folder in OWN):
            del sys.modules[name]
    sys.meta_path[:] = [each for each in sys.meta_path if not type(each).__module__.startswith("_pytest")]
    others = [path for path in sys.path if path and not any(Path(path).is_relative_to(folder) for folder in OWN)]
    paths = [str(ROOT), str(ROOT / "recipes")]
    # The first is replaced by the script's folder.
    sys.path[:] = ["", *paths, *others]
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["OMP_NUM_THREADS"] = "1"


def import_torch():
    """All of torch that models need, and nothing that knows of models."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)


def import_what_runs_need():
    """All that training needs."""
    import accelerate.utils  # noqa: F401
    import datasets  # noqa: F401
    import transformers.trainer  # noqa: F401
    from matplotlib import pyplot  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from trl import ModelConfig, RewardTrainer, SFTTrainer  # noqa: F401

    from hfllm import DistillationTrainer, HfllmForCausalLM, PPOTrainer, World  # noqa: F401

    # Which accelerate imports when a model is prepared, if it is there.
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401
    import torch

    torch.set_num_threads(1)


def fork(argv, environment, output):
    """Run a script in a new process; returns the process's id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        print_to_descriptors()
        os.environ.update({name: str(value) for name, value in environment.items()})
        gc.enable()
        sys.argv = argv
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def print_to_descriptors():
    """What was imported under pytest logs to where pytest captured it."""
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for handler in {each for logger in loggers for each in logger.handlers}:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)


def wait(children, seconds):
    """Exit codes. When one has failed, or time is up, what still runs is killed: it may wait for what has failed."""
    codes = {}
    give_up = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > give_up:
                os.kill(child, signal.SIGKILL)
        if any(codes.values()):
            give_up = min(give_up, time.monotonic() + 5)
        time.sleep(0.01)
    return [codes[child] for child in children]

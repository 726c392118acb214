"""Scripts in processes of their own that cost no imports: forks of one process, which has imported what they need.

`Processes` is for tests, as the fixture `processes`; this file as a script is the process that forks. The launchers
themselves, torchrun and `accelerate launch`, are what tests marked slow use.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


class Processes:
    """Starts scripts of this repository; the process that they are forked from starts with the first."""

    def __init__(self):
        self._server = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._server is not None:
            self._server.communicate()

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

    def run(self, script: str | Path, *arguments: object, code: int = 0, timeout: float = 300) -> str:
        """What a script prints in one process, as Python starts it, that exits with `code`; raises as `torchrun`."""
        return self._run([str(script), *map(str, arguments)], [{}], timeout, code)

    def _run(self, argv, environments, timeout, code=0):
        if self._server is None:
            paths = [ROOT, ROOT / "recipes", *filter(None, [os.environ.get("PYTHONPATH")])]
            variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen(
                [sys.executable, __file__], cwd=ROOT, env={**os.environ, **variables}, **pipes
            )
        with tempfile.NamedTemporaryFile("w+") as output:
            asked = {"argv": argv, "environments": environments, "output": output.name, "timeout": timeout}
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            codes = json.loads(self._server.stdout.readline())
            printed = output.read()
        assert set(codes) == {code}, f"exit codes {codes}: {printed[-3000:]}"
        return printed


def serve():
    """Fork what is asked for, a line of JSON each, and answer with the exit codes."""
    # A fork copies each object that garbage collection touches.
    gc.disable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_what_runs_need()
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        children = [fork(asked["argv"], environment, asked["output"]) for environment in asked["environments"]]
        print(json.dumps(wait(children, asked["timeout"])), file=answers, flush=True)


def import_what_runs_need():
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


if __name__ == "__main__":
    serve()

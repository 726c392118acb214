"""Rewards for code that passes its row's tests, in processes of their own."""

import re
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from hfllm.environments import remote_names
from hfllm.environments.python_session import START_SECONDS, LimitedSession, SessionEnded
from hfllm.environments.python_tool import CodeError
from hfllm.environments.remote_names import PREPARE
from hfllm.environments.side_by_side import cores
from hfllm.errors import InputError
from hfllm.rewards.functions import RewardFunction, answer_of

# A block of code in an answer, the last of which counts.
BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def code_tests_within(seconds: float = 5.0, megabytes: int = 512, needs_all: bool = False) -> RewardFunction:
    """Return a reward for code: the share of its row's tests that it passes.

    A row's column `tests` holds statements such as `assert double(2) == 4`, as a list or in one text that is one test.
    `test_setup`, if there is one, runs before them, without the names of the code. The code is the last block of an
    answer, or all of an answer without blocks. It runs in one limited Python and the tests in another, see
    `remote_names`: a test calls what the code defines, results are literals, and the built-in functions in a test are
    Python's own. So code gains nothing by an early exit or by objects that equal all others. Of its tests it learns
    what they give it as arguments. A test that calls nothing of the code is passed by none.

    Args:
        seconds: for the code, and for each test.
        megabytes: of memory of each process.
        needs_all: 1 where all tests pass, and else 0.
    """

    def code_tests(
        prompts: Sequence, completions: Sequence, *, tests: Sequence[object], **columns: Sequence[object]
    ) -> list[float]:
        setups = columns.get("test_setup") or [None] * len(completions)
        codes = [code_of(answer_of(completion)) for completion in completions]
        keys = [(code, *_listed(*each)) for code, *each in zip(codes, tests, setups, range(len(codes)), strict=True)]
        distinct, stop = list(dict.fromkeys(keys)), threading.Event()
        pool = ThreadPoolExecutor(cores())
        try:
            judged = pool.map(lambda key: _Judge(*key, seconds, megabytes, stop).share(), distinct)
            shares = dict(zip(distinct, judged, strict=True))
        finally:
            # At Ctrl-C or a limit of time only the tests that run now go on.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [float(shares[key] == 1) if needs_all else shares[key] for key in keys]

    return code_tests


def code_of(answer: str) -> str:
    """Return the last block of code of an answer, or all of an answer without blocks."""
    blocks = BLOCK.findall(answer)
    return blocks[-1] if blocks else answer


def _listed(tests: object, setup: object, index: int) -> tuple[str, tuple[str, ...]]:
    """Return a row's setup and tests."""
    listed = [tests] if isinstance(tests, str) else tests
    is_known = listed is None or (isinstance(listed, list | tuple) and all(isinstance(each, str) for each in listed))
    if not is_known or not isinstance(setup, str | None):
        has = f"tests {str(tests)[:80]} and test_setup {str(setup)[:40]}"
        raise InputError(f"code_tests: row {index} of the batch has {has}; expected texts")
    return setup or "", tuple(listed or ())


class _Judge:
    """Runs code, and its tests in another process.

    Args:
        stop: set when the shares are not wanted any more.
    """

    def __init__(
        self,
        code: str,
        setup: str,
        tests: Sequence[str],
        seconds: float,
        megabytes: int,
        stop: threading.Event,
    ):
        self.code, self.setup, self.tests, self.stop = code, setup, tests, stop
        self.program = LimitedSession(seconds, megabytes)
        self.judge = LimitedSession(seconds, megabytes, answer=self._answer)
        self.is_over = not tests or not code.strip()

    def share(self) -> float:
        """Return the share of the tests that the code passes; 0 without tests."""
        with closing(self.program), closing(self.judge):
            # A program reads no more of its tests than this name.
            if self.is_over or self._answer(f"__name__ = 'answer'\n{PREPARE}")[0] == "E":
                return 0.0
            if self._answer(self.code)[0] == "E":
                return 0.0
            self._begin()
            return sum(self._passes(test) for test in self.tests) / len(self.tests)

    def _answer(self, asked: str) -> str:
        """Run code of a test in the program's process; see `remote_names.Ask`."""
        try:
            return f"V{self.program.run(asked).value}"
        except CodeError as error:
            self.is_over = self.is_over or isinstance(error, SessionEnded)
            names = " ".join(error.names) or "RuntimeError"
            return f"E{names}\n{error.message or error}"

    def _begin(self) -> None:
        """Prepare the tests' process, which has its own time for it."""
        self.judge.run(Path(remote_names.__file__).read_text(encoding="utf-8"), START_SECONDS)
        try:
            self.judge.run(self.setup, START_SECONDS)
        except CodeError as error:
            raise InputError(f"code_tests: the test_setup {self.setup!r:.80} fails: {error}") from None

    def _passes(self, test: str) -> bool:
        if self.is_over or self.stop.is_set():
            return False
        try:
            if not int(self.judge.run(f"remote_names(__ask__, {test!r}, globals())").value):
                warnings.warn(f"code_tests: {test!r:.80} uses no name of the code, and none passes it", stacklevel=2)
                return False
            self.judge.run(test)
            return not self.is_over
        except SessionEnded:
            self._begin()
        except CodeError:
            pass
        return False


code_tests = code_tests_within()

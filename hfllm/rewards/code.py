"""Rewards for code that passes its row's tests, in processes of their own."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from hfllm.environments import remote_names
from hfllm.environments.python_session import LimitedSession, SessionEnded
from hfllm.environments.python_tool import CodeError
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
    Python's own. So code gains nothing by an early exit or by objects that equal all others, and its tests are hidden.

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
        distinct = list(dict.fromkeys(keys))
        with ThreadPoolExecutor(cores()) as pool:
            shares = dict(zip(distinct, pool.map(lambda key: _share(*key, seconds, megabytes), distinct), strict=True))
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


def _share(code: str, setup: str, tests: Sequence[str], seconds: float, megabytes: int) -> float:
    """Return the share of the tests that code passes; 0 without tests."""
    program = LimitedSession(seconds, megabytes)
    is_over = not tests or not code.strip()

    def answer(asked: str) -> str:
        nonlocal is_over
        try:
            return f"V{program.run(asked).value}"
        except CodeError as error:
            is_over = is_over or isinstance(error, SessionEnded)
            return f"E{error}"

    passed = 0
    with closing(program), closing(LimitedSession(seconds, megabytes, answer=answer)) as judge:
        if is_over or answer(code)[0] == "E":
            return 0.0
        judge.run(Path(remote_names.__file__).read_text(encoding="utf-8"))
        try:
            judge.run(setup)
        except CodeError as error:
            raise InputError(f"code_tests: the test_setup {setup!r:.80} fails: {error}") from None
        for test in tests:
            try:
                judge.run(f"remote_names(__ask__, {test!r}, globals())")
                judge.run(test)
                passed += not is_over
            except CodeError:
                if is_over:
                    break
    return passed / len(tests)


code_tests = code_tests_within()

"""Reward functions with TRL's signature: `(prompts, completions, **columns) -> list[float]`.

`prompts` and `completions` are strings, or lists of messages when the dataset is conversational; `columns` are the
dataset's other columns, one value per row.
"""

import importlib.util
import json
import random
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hfllm.data.thoughts import CLOSE, OPEN, split_thoughts
from hfllm.data.world.vocabulary import GoldAnswer, gold_score
from hfllm.errors import InputError, is_out_of_memory

RewardFunction = Callable[..., list[float]]
# What a reward function gets from the trainer, so that no column of a dataset can have these names. With tools or a
# `rollout_func` also `action_mask`, which takes the place of such a column.
BEGINNING = "completion_beginning"
GIVEN = ("prompt", "completion", "prompts", "completions", "completion_ids", BEGINNING)
# A larger one says nothing more, and its square in the critic's loss soon has no place in a float32.
MOST_REWARD = 1e9
# Reward functions that have names on the command line: those of rows with the embedded world's gold columns.
BUILT_IN = {
    "gold": "hfllm.rewards.functions:gold_reward",
    "shuffled_gold": "hfllm.rewards.functions:shuffled_gold_reward",
    "exact_match": "hfllm.rewards.reasoning:exact_match",
    "thinks": "hfllm.rewards.reasoning:thinks",
    "right_answer": "hfllm.rewards.outcomes:right_answer",
    "shuffled_answer": "hfllm.rewards.outcomes:shuffled_answer",
}


def completion_text(completion: str | Sequence[dict[str, str]]) -> str:
    """Return the text of a completion in either format: of a conversation all but thoughts and what tools said.

    See `hfllm.data.thoughts` for the thoughts, and the answer after them."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion if message.get("role") != "tool")


def transcript(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return all of a completion for people to read: thoughts, and calls of tools and what they said, a line each."""
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and "tool_calls" not in completion[0]:
        return _with_thoughts(completion[0])
    lines = []
    for message in completion:
        content = _with_thoughts(message)
        if content or not message.get("tool_calls"):
            lines.append(f"{message.get('role')}: {content}")
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            try:
                arguments = json.dumps(function.get("arguments"), ensure_ascii=False, default=str)
            except RecursionError:
                arguments = "(nested too deeply to be shown)"
            lines.append(f"{message.get('role')} calls {function.get('name')}: {arguments}")
    # JSON may spell halves of characters, which no file can hold.
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def _with_thoughts(message: Mapping[str, Any]) -> str:
    thoughts, content = message.get("reasoning_content"), message.get("content") or ""
    return f"{OPEN}{thoughts}{CLOSE}{content}" if thoughts else content


def gold_reward(
    prompts: Sequence,
    completions: Sequence,
    *,
    gold_kind: Sequence[str],
    gold_accepted: Sequence[Sequence[str]],
    gold_needed: Sequence[Sequence[str]],
    gold_forbidden: Sequence[Sequence[str]],
    **columns: Sequence[object],
) -> list[float]:
    """Return the embedded world's exact, verifiable reward in [-1, 1], from the gold columns of its prompt rows.

    The beginning of an answer that stood in the prompt does not count: the policy may turn back from it.
    """
    golds = map(GoldAnswer, gold_kind, gold_accepted, gold_needed, gold_forbidden)
    begun = [split_thoughts(put)[1] for put in columns.get(BEGINNING) or [""] * len(completions)]
    said = [split_thoughts(completion_text(response))[1] for response in completions]
    said = [text.removeprefix(put) for text, put in zip(said, begun, strict=True)]
    return [gold_score(text, gold) for text, gold in zip(said, golds, strict=True)]


def shuffled(reward: RewardFunction, name: str, drawn_by: Callable[[Sequence], str] = repr) -> RewardFunction:
    """Return a control: the rewards that a function gives a batch, dealt out to its completions by chance.

    These are as many and as large, and say nothing about any completion, so that a policy must not gain by them. The
    same completions are always dealt the same, as resuming needs.

    Args:
        reward: gives a number per completion.
        name: of the control, under which it is logged.
        drawn_by: what the order is drawn by, as a text made of the completions.
    """

    def dealt(prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        rewards = reward(prompts, completions, **columns)
        random.Random(drawn_by(completions)).shuffle(rewards)
        return rewards

    dealt.__name__ = dealt.__qualname__ = name
    dealt.__module__ = reward.__module__
    return dealt


shuffled_gold_reward = shuffled(gold_reward, "shuffled_gold_reward")


# Rewards that go by the world's gold columns, by the names that `--reward_funcs` has for them.
GOLD_REWARDS: Mapping[str, RewardFunction] = {"gold": gold_reward, "shuffled_gold": shuffled_gold_reward}
GOLD_COLUMNS = ("gold_kind", "gold_accepted", "gold_needed", "gold_forbidden")


def load_reward_function(specification: str) -> RewardFunction:
    """Load the function that `specification` names: one of `BUILT_IN`, or `path/to/file.py:function`.

    Raises:
        InputError: when the file or the function does not exist, or the file does not run.
    """
    if specification not in BUILT_IN:
        return load_function(specification, "--reward_funcs")
    module, _, name = BUILT_IN[specification].partition(":")
    return getattr(importlib.import_module(module), name)


def load_function(specification: str, flag: str) -> Callable[..., Any]:
    """Load the function `path/to/file.py:function` that a flag names.

    Raises:
        InputError: when the file or the function does not exist, or the file does not run.
    """
    path, _, name = specification.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"{flag} {specification}: no file {path!r}; expected path/to/file.py:function")
    if Path(path).suffix != ".py":
        raise InputError(f"{flag} {specification}: {path!r} is not a .py file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        place = f"{error.filename or path}, line {error.lineno}"
        raise InputError(f"{flag} {specification}: {place}: {error.msg}") from error
    # A file written to be run as a script may end in sys.exit.
    except (Exception, SystemExit) as error:
        raise InputError(f"{flag} {specification}: {path} does not run: {error!r}{_place(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"{flag} {specification}: no function {name!r} in {path}; it has: {defined}")
    return function


def reward_name(function: Callable) -> str:
    """Return the name under which a reward is logged."""
    return getattr(function, "__name__", None) or type(function).__name__


def reward_columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list]:
    """Return the columns of rows for a reward function, without those that stand for what the trainer gives it."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in GIVEN}


def checked_rewards(
    function: RewardFunction, prompts: Sequence, completions: Sequence, /, **columns: Sequence[object]
) -> list[float] | list[list[float]]:
    """Call a reward function and refuse results other than one finite number, or a list of them, per completion.

    `MOST_REWARD` is the largest that it may be in size.

    Raises:
        InputError: naming the function, the row and the value seen.
    """
    name = f"reward function {reward_name(function)!r}"
    try:
        rewards = _as_list(function(prompts=prompts, completions=completions, **columns))
    except (Exception, SystemExit) as error:
        # What a reward model on this machine's memory says is for others to explain.
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        given = ", ".join(columns) or "(none)"
        raise InputError(f"{name} failed with {error!r}{_place(error)}; columns given: {given}") from error
    if not isinstance(rewards, list):
        raise InputError(f"{name} returned {type(rewards).__name__}; expected a list of {len(completions)} numbers")
    if len(rewards) != len(completions):
        raise InputError(f"{name} returned {len(rewards)} values for {len(completions)} completions")
    rewards = [_as_list(reward) for reward in rewards]
    is_per_token = isinstance(rewards[0], list | tuple)
    for row, reward in enumerate(rewards):
        if isinstance(reward, list | tuple) != is_per_token or not all(
            map(_is_number, reward if is_per_token else [reward])
        ):
            raise InputError(
                f"{name} returned {reward!r} for completion {row} ({completion_text(completions[row])[:80]!r}); "
                f"expected {'a list of finite numbers' if is_per_token else 'a finite number'} of at most "
                f"{MOST_REWARD:g} in size"
            )
    return [list(map(float, reward)) if is_per_token else float(reward) for reward in rewards]


class _TimeIsUp(BaseException):
    """Raised in a function that has had its time; not an `Exception`, which it may pass over."""


@contextmanager
def time_limit(function: Callable[..., Any], seconds: float) -> Iterator[None]:
    """Context manager in which a plain reward function is given up after so many seconds.

    It is interrupted between two of its instructions, in `time.sleep` and in regular expressions; code of a library
    that does not return to Python is not. There is no limit for rewards that are models of hfllm, whose time is that
    of the machine, outside of a process's main thread, and on Windows.

    Args:
        function: the reward function, for the complaint.
        seconds: 0 is no limit.

    Raises:
        InputError: naming the function, the time, and where in its code it was.
    """
    is_plain = not type(function).__module__.startswith("hfllm.")
    is_main = threading.current_thread() is threading.main_thread()
    if not (seconds and is_plain and is_main and hasattr(signal, "setitimer")):
        yield
        return
    is_running = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, interrupt)
    # And every second from then on, for a function that catches everything.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except _TimeIsUp as error:
        is_running = False
        # It may have called a library, which is not what is to be mended.
        place = _place(error, getattr(getattr(function, "__code__", None), "co_filename", None))
        raise InputError(
            f"reward function {reward_name(function)!r} did not return within {seconds:g} seconds{place}; "
            "--reward_timeout gives it more, and 0 sets no limit"
        ) from None
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _as_list(values: object) -> object:
    """Return an array, a tensor, a generator or the like as a list, one number as a number; anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    # Neither words nor a table are a list of numbers.
    is_several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    return list(values) if is_several else values


def _place(error: BaseException, file: str | None = None) -> str:
    """Return the file and line of the user's code that an error comes from, as the end of a phrase.

    Args:
        file: whose code it should be, if any of it was running.
    """
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if frame.filename == file][-1:] or frames[-1:]
    return f" in {last[0].filename}, line {last[0].lineno}" if last else ""


def _is_number(value: object) -> bool:
    try:
        return value is not None and abs(float(value)) <= MOST_REWARD
    except (TypeError, ValueError, OverflowError):
        return False


def length_penalty(coefficient: float, free: int = 0) -> RewardFunction:
    """Return a reward function: `-coefficient` for each token of a completion beyond the first `free`.

    Tokens that an environment wrote, such as a tool's result, do not count.
    """

    def penalty(
        prompts: Sequence,
        completions: Sequence,
        *,
        completion_ids: Sequence,
        action_mask: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[object],
    ) -> list[float]:
        lengths = map(len, completion_ids) if action_mask is None else map(sum, action_mask)
        return [-coefficient * max(length - free, 0) for length in lengths]

    penalty.__name__ = "length_penalty"
    return penalty

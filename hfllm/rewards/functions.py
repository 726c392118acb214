"""Reward functions with TRL's signature: `(prompts, completions, **columns) -> list[float]`, of reasoning too.

`prompts` and `completions` are strings, or lists of messages when the dataset is conversational; `columns` are the
dataset's other columns, one value per row.
"""

import importlib.util
import inspect
import json
import random
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import content_text
from hfllm.data.thoughts import CLOSE, OPEN, answer_of, final_answer, plain_answer, split_thoughts, thoughts_of
from hfllm.data.world.rubric import RIGHT, GoldAnswer, gold_of_continuation, gold_score
from hfllm.environments.side_by_side import run_together
from hfllm.errors import InputError, is_out_of_memory, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- reward functions ----


RewardFunction = Callable[..., list[float]]
# Arguments of a reward function from the trainer; no column of a dataset can have these names. With tools or a
# `rollout_func` also `action_mask`, which takes the place of such a column.
BEGINNING = "completion_beginning"
STATE, LOG_METRIC, LOG_EXTRA = OF_TRAINER = ("trainer_state", "log_metric", "log_extra")
GIVEN = ("prompt", "completion", "prompts", "completions", "completion_ids", BEGINNING, *OF_TRAINER)
# A larger one says nothing more, and its square in the critic's loss soon has no place in a float32.
MOST_REWARD = 1e9
# Reward functions with names on the command line, for rows with the embedded world's gold columns.
BUILT_IN = {
    "gold": "hfllm.rewards.functions:gold_reward",
    "shuffled_gold": "hfllm.rewards.functions:shuffled_gold_reward",
    "exact_match": "hfllm.rewards.functions:exact_match",
    "thinks": "hfllm.rewards.functions:thinks",
    "code_tests": "hfllm.rewards.code:code_tests",
    "right_answer": "hfllm.rewards.functions:right_answer",
    "shuffled_answer": "hfllm.rewards.functions:shuffled_answer",
    "shuffled_exact_match": "hfllm.rewards.functions:shuffled_exact_match",
    "calibrated_match": "hfllm.rewards.confidence:calibrated_match",
    "shuffled_calibrated_match": "hfllm.rewards.confidence:shuffled_calibrated_match",
}


def completion_text(completion: str | Sequence[dict[str, str]]) -> str:
    """Return the text of a completion in either format: of a conversation all but thoughts and tool output.

    See `hfllm.data.thoughts` for the thoughts, and the answer after them."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion if message.get("role") != "tool")


def transcript(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return all of a completion for people to read: thoughts, and calls of tools and their output, one per line."""
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
    # JSON may spell halves of characters, impossible in files.
    return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")


def _with_thoughts(message: Mapping[str, Any]) -> str:
    thoughts, content = message.get("reasoning_content"), content_text(message.get("content"))
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

    An answer's beginning in the prompt does not count: the policy may turn back from it.
    """
    golds = map(GoldAnswer, gold_kind, gold_accepted, gold_needed, gold_forbidden)
    begun = [split_thoughts(put)[1] for put in columns.get(BEGINNING) or [""] * len(completions)]
    answers = [split_thoughts(completion_text(response))[1] for response in completions]
    return [
        gold_of_continuation(text.removeprefix(put), gold) if put else gold_score(text, gold)
        for text, put, gold in zip(answers, begun, golds, strict=True)
    ]


def shuffled(reward: RewardFunction, name: str, drawn_by: Callable[[Sequence], str] = repr) -> RewardFunction:
    """Return a control: a function's rewards for a batch, dealt out to its completions by chance.

    The dealt rewards are as many and as large, and unrelated to the completions, so a policy must not gain by them.
    The same completions are always dealt the same rewards, for resuming.

    Args:
        reward: returns a number per completion.
        name: of the control, as logged.
        drawn_by: function from the completions to a text, the seed of the order.
    """

    def dealt(prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        rewards = reward(prompts, completions, **columns)
        random.Random(drawn_by(completions)).shuffle(rewards)
        return rewards

    dealt.__name__ = dealt.__qualname__ = name
    dealt.__module__ = reward.__module__
    return dealt


shuffled_gold_reward = shuffled(gold_reward, "shuffled_gold_reward")


# Rewards by the world's gold columns, by their names in `--reward_funcs`.
GOLD_REWARDS: Mapping[str, RewardFunction] = {"gold": gold_reward, "shuffled_gold": shuffled_gold_reward}
GOLD_COLUMNS = ("gold_kind", "gold_accepted", "gold_needed", "gold_forbidden")


def load_reward_function(specification: str) -> RewardFunction:
    """Load the function named by `specification`: one of `BUILT_IN`, or `path/to/file.py:function`.

    Raises:
        InputError: when the file or the function does not exist, or the file does not run.
    """
    if specification not in BUILT_IN:
        return load_function(specification, "--reward_funcs")
    module, _, name = BUILT_IN[specification].partition(":")
    return getattr(importlib.import_module(module), name)


def load_function(specification: str, flag: str) -> Callable[..., Any]:
    """Load the function `path/to/file.py:function` named by a flag.

    Raises:
        InputError: when the file or the function does not exist, or the file does not run.
    """
    path, _, name = specification.rpartition(":")
    refuse_if(not Path(path).is_file(), f"{flag} {specification}: no file {path!r}; expected path/to/file.py:function")
    refuse_if(Path(path).suffix != ".py", f"{flag} {specification}: {path!r} is not a .py file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        index = f"{error.filename or path}, line {error.lineno}"
        raise InputError(f"{flag} {specification}: {index}: {error.msg}") from error
    # A file written to be run as a script may end in sys.exit.
    except (Exception, SystemExit) as error:
        raise InputError(f"{flag} {specification}: {path} does not run: {error!r}{_location(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"{flag} {specification}: no function {name!r} in {path}; it has: {defined}")
    return function


def reward_name(function: Callable) -> str:
    """Return the name of a reward in logs."""
    return getattr(function, "__name__", None) or type(function).__name__


def reward_columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list]:
    """Return the columns of rows for a reward function, without columns named like the trainer's arguments."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in GIVEN}


def checked_rewards(
    function: RewardFunction, prompts: Sequence, completions: Sequence, /, **columns: Sequence[object]
) -> list[float] | list[list[float]]:
    """Call a reward function and refuse results other than one finite number, or a list of them, per completion.

    `MOST_REWARD` is the largest allowed magnitude. An async function is awaited.
    """
    with reward_errors(function, columns):
        rewards = function(prompts=prompts, completions=completions, **columns)
        if inspect.iscoroutine(rewards):
            (rewards,) = run_together([rewards])
        rewards = as_list(rewards)
    return read_rewards(function, rewards, completions)


@contextmanager
def reward_errors(function: RewardFunction, columns: Iterable[str]) -> Iterator[None]:
    """Context manager in which an error of a reward function becomes one that names it, its line and its columns."""
    name, columns = f"reward function {reward_name(function)!r}", [each for each in columns if each not in OF_TRAINER]
    try:
        yield
    except (Exception, SystemExit) as error:
        # Memory errors of a reward model are for others to explain.
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        column_names = ", ".join(columns) or "(none)"
        if isinstance(error, TypeError) and (needed := _needed_columns(function) - {*columns}):
            missing = f"no column {min(needed)!r}, which it needs"
            raise InputError(f"{name}: the rows have {missing}; columns given: {column_names}") from None
        raise InputError(f"{name} failed with {error!r}{_location(error)}; columns given: {column_names}") from error


def read_rewards(
    function: RewardFunction, rewards: object, completions: Sequence, may_abstain: bool = False
) -> list[float] | list[list[float]]:
    """Return what a reward function returned as numbers, see `checked_rewards`.

    Args:
        rewards: a list, from `as_list`.
        may_abstain: whether `None` stands for a completion that it does not judge; it stays.
    """
    name, count = f"reward function {reward_name(function)!r}", len(completions)
    if not isinstance(rewards, list):
        raise InputError(f"{name} returned {type(rewards).__name__}; expected a list of {count} numbers")
    refuse_if(len(rewards) != count, f"{name} returned {len(rewards)} values for {count} completions")
    rewards = [as_list(reward) for reward in rewards]
    judged = [reward for reward in rewards if reward is not None or not may_abstain]
    is_per_token = bool(judged) and isinstance(judged[0], list | tuple)
    for row, reward in enumerate(rewards):
        if reward is None and may_abstain:
            continue
        if isinstance(reward, list | tuple) != is_per_token or not all(
            map(_is_number, reward if is_per_token else [reward])
        ):
            raise InputError(
                f"{name} returned {reward!r} for completion {row} ({completion_text(completions[row])[:80]!r}); "
                f"expected {'a list of finite numbers' if is_per_token else 'a finite number'} of at most "
                f"{MOST_REWARD:g} in size"
            )
    read = (lambda reward: list(map(float, reward))) if is_per_token else float
    return [None if reward is None else read(reward) for reward in rewards]


def _needed_columns(function: Callable[..., Any]) -> set[str]:
    """Return the columns that a reward function has no default for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    is_named = [each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return {each.name for each in is_named if each.default is each.empty} - {"prompts", "completions", *OF_TRAINER}


class _TimeIsUp(BaseException):
    """Raised in a function at its time limit; not an `Exception`, which it may pass over."""


@contextmanager
def time_limit(function: Callable[..., Any], seconds: float) -> Iterator[None]:
    """Context manager in which a plain reward function is given up after so many seconds.

    It is interrupted between two of its instructions, in `time.sleep` and in regular expressions, but not in library
    code without a return to Python. There is no limit for rewards that are models of hfllm (their time is the
    machine's), outside of a process's main thread, and on Windows.

    Args:
        function: the reward function, for the complaint.
        seconds: 0 is no limit.
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
    # And every second from then on, for a function catching everything.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except _TimeIsUp as error:
        is_running = False
        # It may have called a library, but the library is not the code to mend.
        index = _location(error, getattr(getattr(function, "__code__", None), "co_filename", None))
        raise late_error([function], seconds, index) from None
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def late_error(functions: Sequence[RewardFunction], seconds: float, where: str = "") -> InputError:
    """Return the error of reward functions at their time limit; `where` is the place in one of them."""
    names = ", ".join(repr(reward_name(each)) for each in functions)
    return InputError(
        f"reward function{'s' * (len(functions) > 1)} {names} did not return within {seconds:g} seconds{where}; "
        f"--reward_timeout gives {'them' if len(functions) > 1 else 'it'} more, and 0 sets no limit"
    )


def as_list(values: object) -> object:
    """Return an array, a tensor, a generator or the like as a list, one number as a number; anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    # Neither words nor a table are a list of numbers.
    is_several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    return list(values) if is_several else values


def _location(error: BaseException, file: str | None = None) -> str:
    """Return the file and line of an error in the user's code, as the end of a phrase.

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
    """Return a reward function: `-coefficient` for every token of a completion beyond the first `free`.

    Tokens of an environment, such as a tool's result, do not count.
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


# ---- outcomes ----
#
# Rewards of the outcome: whether an answer is right, whatever was thought before it, and a control.


def right_answer(prompts: Sequence, completions: Sequence, **columns: Sequence[Sequence]) -> list[float]:
    """Return 1 where a completion's answer is right by the gold columns of its row, and else 0.

    The thought does not count: neither a right number in it, nor a wrong one. A thought without end leaves no answer.
    """
    return [float(score >= RIGHT) for score in gold_reward(prompts, completions, **columns)]


def _texts(completions: Sequence) -> str:
    return "\n".join(map(completion_text, completions))


shuffled_answer = shuffled(right_answer, "shuffled_answer", _texts)


# ---- reasoning ----
#
# Rewards for answers reached by thinking: of the outcome, and of the length of thoughts; those of single steps are in
# `steps.py`.
#
# Thoughts are a message's `reasoning_content`, or a text between `<think>` and `</think>`. The answer is the rest; an
# answer only in the thoughts counts as none.


def exact_match(
    prompts: Sequence, completions: Sequence, *, answer: Sequence[object], **columns: Sequence[object]
) -> list[float]:
    """Return 1 where the final answer equals the answer in the column `answer`, and else 0.

    The column may hold a whole solution, such as gsm8k's, ending with `#### 42`. `final_answer` defines the final
    answer; numbers are equal whatever their commas and signs of money, fractions and decimals too.
    A row without an answer, `None`, earns nothing.
    """
    predictions = [plain_answer(final_answer(answer_of(completion))) for completion in completions]
    return [float(one != "" and one in _accepted(gold)) for one, gold in zip(predictions, answer, strict=True)]


def _accepted(gold: object) -> tuple[str, ...]:
    """Return a gold answer as answers are compared: how it ends, and all of it, as of a formula outside of a box."""
    return () if gold is None else (plain_answer(final_answer(str(gold))), plain_answer(str(gold)))


shuffled_exact_match = shuffled(exact_match, "shuffled_exact_match", _texts)


def thinks(prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
    """Return 1 where a completion has thoughts and also an answer, and else 0."""
    return [float(bool(thoughts_of(each).strip() and answer_of(each))) for each in completions]


def checked_by(check: Callable[..., bool | float]) -> RewardFunction:
    """Return a reward function from a checker of a single answer.

    Args:
        check: `(answer, **columns) -> bool or number`: of an answer without its thoughts, and of its row's columns.
    """

    def reward(prompts: Sequence, completions: Sequence, **columns: Sequence[Any]) -> list[float]:
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(completions))]
        return [float(check(answer_of(each), **row)) for each, row in zip(completions, rows, strict=True)]

    reward.__name__ = getattr(check, "__name__", "checked_by")
    return reward


def thought_length_penalty(
    coefficient: float, free: int = 0, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> RewardFunction:
    """Return a reward function: `-coefficient` for every word of a completion's thoughts beyond the first `free`.

    Args:
        tokenizer: counts its tokens in place of words.
    """

    def penalty(prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
        thoughts = [thoughts_of(each) for each in completions]
        if tokenizer is None:
            lengths = [len(text.split()) for text in thoughts]
        else:
            lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in thoughts]
        return [-coefficient * max(length - free, 0) for length in lengths]

    penalty.__name__ = "thought_length_penalty"
    return penalty

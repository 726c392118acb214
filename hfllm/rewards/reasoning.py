"""Rewards for answers that are reached by thinking: of the outcome, of single steps, and of the length of thoughts.

Thoughts are what a message has as `reasoning_content`, or a text between `<think>` and `</think>`. The answer is what
is said besides; an answer that is given in the thoughts alone counts as none.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.thoughts import CLOSE, OPEN, answer_of, final_answer, plain_answer, thoughts_of
from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]
# Where a step of a solution ends: at a line break, or after a sentence.
STEP_END = r"\n+|(?<=[.!?])\s+"


def exact_match(
    prompts: Sequence, completions: Sequence, *, answer: Sequence[object], **columns: Sequence[object]
) -> list[float]:
    """Return 1 where the final answer equals that of the column `answer`, and else 0.

    The column may hold a whole solution, such as gsm8k's, which ends with `#### 42`. What counts as the final answer
    is said at `final_answer`; numbers are equal whatever their commas and signs of money, fractions and decimals too.
    A row without an answer, `None`, earns nothing.
    """
    said = [plain_answer(final_answer(answer_of(completion))) for completion in completions]
    return [float(one != "" and one in _accepted(gold)) for one, gold in zip(said, answer, strict=True)]


def _accepted(gold: object) -> tuple[str, ...]:
    """Return a gold answer as answers are compared: how it ends, and all of it, as of a formula outside of a box."""
    return () if gold is None else (plain_answer(final_answer(str(gold))), plain_answer(str(gold)))


def thinks(prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[float]:
    """Return 1 where a completion has thoughts and an answer besides them, and else 0."""
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
    """Return a reward function: `-coefficient` for each word of a completion's thoughts beyond the first `free`.

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


def step_rewards(
    check: Callable[..., float],
    tokenizer: "PreTrainedTokenizerBase",
    step_end: str = STEP_END,
) -> Callable[..., list[list[float]]]:
    """Return a process reward: a number for each step of the thoughts, at the token that ends the step.

    The steps are those of the thoughts, or where a completion has no marks of thoughts those of all it says. As in
    Lightman et al. 2023 (arXiv:2305.20050), a step is judged with those before it. All other tokens get 0. Where tools
    were called, each turn of the policy is read by itself; what tools said is no step.

    Args:
        check: `(step, earlier, **columns) -> number`: of a step's text, the steps before it, and its row's columns.
        tokenizer: the policy's.
        step_end: pattern of what lies between two steps.

    Raises:
        InputError: when the pattern matches an empty text.
    """
    between = re.compile(step_end)
    if between.fullmatch(""):
        raise InputError(f"step_end {step_end!r} matches an empty text: steps would have no end")

    def reward(
        prompts: Sequence, completions: Sequence, *, completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[list[float]]:
        rewards = []
        for row, ids in enumerate(completion_ids):
            given = {name: values[row] for name, values in columns.items() if len(values) == len(completion_ids)}
            numbers, earlier = [0.0] * len(ids), []
            for turn in _turns(given.get("action_mask"), len(ids)):
                said = ids[turn]
                for step, end in _steps(_text_of(tokenizer, said), between):
                    # A step may end inside the token of the step before it.
                    place = turn.start + _token_at(tokenizer, said, end)
                    numbers[place] += float(check(step, list(earlier), **given))
                    earlier.append(step)
            rewards.append(numbers)
        return rewards

    reward.__name__ = getattr(check, "__name__", "step_rewards")
    return reward


def _turns(action_mask: Sequence[int] | None, length: int) -> Iterator[slice]:
    """Yield where the policy's turns are among so many tokens; without a mask all are one."""
    mask = [1] * length if action_mask is None else list(action_mask)
    ends = [place for place in range(1, length + 1) if mask[place - 1] and (place == length or not mask[place])]
    for end in ends:
        begin = end
        while begin and mask[begin - 1]:
            begin -= 1
        yield slice(begin, end)


def _steps(text: str, between: re.Pattern) -> list[tuple[str, int]]:
    """Return the steps of a text and where in it each ends."""
    steps = []
    for begin, stop in _thoughts(text):
        at = begin
        ends = [(match.start(), match.end()) for match in between.finditer(text, begin, stop)]
        for end, after in [*ends, (stop, stop)]:
            if text[at:end].strip():
                steps.append((text[at:end].strip(), at + len(text[at:end].rstrip())))
            at = after
    return steps


def _thoughts(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each thought of a text begins and ends; where it has no marks, all of it."""
    opens, closes = text.find(OPEN), text.find(CLOSE)
    if opens < 0 and closes < 0:
        yield 0, len(text)
    # One that the prompt has begun.
    if closes >= 0 and not 0 <= opens < closes:
        yield 0, closes
    while opens >= 0:
        begin = opens + len(OPEN)
        closes = text.find(CLOSE, begin)
        stop = closes if closes >= 0 else len(text)
        yield begin, stop
        opens = text.find(OPEN, stop)


def _text_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def _token_at(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], end: int) -> int:
    """Return the place of the first token with which the decoded text has `end` characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_text_of(tokenizer, ids[: middle + 1])) >= end:
            high = middle
        else:
            low = middle + 1
    return low

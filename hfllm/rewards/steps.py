"""Rewards for the steps of a thought: by a function of yours, and by a model that has learned which steps are right.

A step is a sentence or a line of the thoughts, or where a completion has no marks of thoughts of all of its text. Its
reward is paid at the token that ends it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfllm.data.thoughts import CLOSE, OPEN
from hfllm.errors import InputError, refuse_if
from hfllm.models.loading.saved import scores_tokens
from hfllm.rewards.models import RewardModel, TokenRewardModel, reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

# What stands between two steps of a solution: a line break, or also the end of a sentence.
LINE, SENTENCE = "line", "sentence"
STEP_ENDS = {LINE: r"\n+", SENTENCE: r"\n+|(?<=[.!?])\s+"}
STEP_END = STEP_ENDS[SENTENCE]
# The field of the config of a model of steps that has one of these names.
STEP_END_FIELD = "step_end"


def step_rewards(
    check: Callable[..., float],
    tokenizer: "PreTrainedTokenizerBase",
    step_end: str = STEP_END,
) -> Callable[..., list[list[float]]]:
    """Return a process reward: a number for every step of the thoughts, at the last token of the step.

    The steps are taken from the thoughts, or where a completion has no marks of thoughts from all of its text. As in
    Lightman et al. 2023 (arXiv:2305.20050), a step is judged with the steps before it. All other tokens get 0. Where
    tools were called, every turn of the policy is read by itself; tool output is no step.

    Args:
        check: `(step, earlier, **columns) -> number`: of a step's text, the steps before it, and its row's columns.
        tokenizer: the policy's.
        step_end: pattern of the text between two steps.

    Raises:
        InputError: when the pattern matches an empty text.
    """
    between = steps_between(step_end)

    def reward(
        prompts: Sequence, completions: Sequence, *, completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[list[float]]:
        rewards = []
        for row, ids in enumerate(completion_ids):
            row_columns = {name: values[row] for name, values in columns.items() if len(values) == len(completion_ids)}
            numbers, earlier = [0.0] * len(ids), []
            for step, index in step_ends(tokenizer, ids, between, row_columns.get("action_mask")):
                numbers[index] += float(check(step, list(earlier), **row_columns))
                earlier.append(step)
            rewards.append(numbers)
        return rewards

    reward.__name__ = getattr(check, "__name__", "step_rewards")
    return reward


class ProcessRewardModel(TokenRewardModel):
    """A model of steps as a reward: each step pays what it lacks to be surely right, p - 1 (Lightman et al. 2023).

    p is the model's probability that the step is right, after all before it (arXiv:2305.20050, section 2.6). A right
    step costs nothing, so that a thought gains nothing by more steps; what is right in the end is for another reward.

    Args:
        model: a token-classification model with one label, as `hfllm reward --task process` saves it; its config's
            `step_end`, `line` or `sentence`, says where its steps end.
        tokenizer: the policy's.
        batch_size: sequences in one forward pass.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 64):
        super().__init__(model, tokenizer, batch_size)
        ends = getattr(model.config, STEP_END_FIELD, None)
        if ends not in tuple(STEP_ENDS):
            raise InputError(
                f"the config of {self.__name__!r} has {STEP_END_FIELD} {ends!r}; expected {' or '.join(STEP_ENDS)}, "
                "as of a model that learned steps (hfllm reward --task process)"
            )
        self.between = steps_between(STEP_ENDS[ends])

    def __call__(self, prompts: Sequence, completions: Sequence, **columns: Sequence[object]) -> list[list[float]]:
        masks = columns.get("action_mask") or [None] * len(prompts)
        rewards = []
        for chances, ids, mask in zip(
            self.probabilities(prompts, **columns), columns["completion_ids"], masks, strict=True
        ):
            numbers = [0.0] * len(ids)
            for _, index in step_ends(self.tokenizer, ids, self.between, mask):
                numbers[index] += chances[index] - 1
            rewards.append(numbers)
        return rewards

    def probabilities(self, prompts: Sequence, **columns: Sequence[object]) -> list[list[float]]:
        """Return for each token of the completions the probability that a step which ends there is right."""
        scores = super().__call__(prompts, [None] * len(prompts), **columns)
        return [[1 / (1 + math.exp(-max(min(score, 60.0), -60.0))) for score in row] for row in scores]


def scoring_model(
    model: "PreTrainedModel", processing_class: "PreTrainedTokenizerBase | ProcessorMixin", batch_size: int = 64
) -> RewardModel:
    """Return a model as a reward by what it was trained for: whole answers, their steps, or every token.

    Args:
        processing_class: its own tokenizer, of a vision-language model its processor.
    """
    if not scores_tokens(model):
        return reward_model(model, processing_class, batch_size)
    of_steps = getattr(model.config, STEP_END_FIELD, None) is not None
    return (ProcessRewardModel if of_steps else TokenRewardModel)(model, processing_class, batch_size)


def steps_between(step_end: str) -> re.Pattern:
    """Return the pattern of the text between two steps.

    Raises:
        InputError: when it matches an empty text.
    """
    between = re.compile(step_end)
    refuse_if(between.fullmatch(""), f"step_end {step_end!r} matches an empty text: steps would have no end")
    return between


def step_ends(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    between: re.Pattern,
    action_mask: Sequence[int] | None = None,
) -> list[tuple[str, int]]:
    """Return the steps of a completion, each with the index of its last token.

    Args:
        ids: the completion's tokens.
        between: what stands between two steps.
        action_mask: 1 for the policy's own tokens; each of its turns is read by itself.
    """
    ends = []
    for turn in _turns(action_mask, len(ids)):
        turn_ids = ids[turn]
        for step, end in _steps(_text_of(tokenizer, turn_ids), between):
            # A step may end inside the token of the step before it.
            ends.append((step, turn.start + _token_at(tokenizer, turn_ids, end)))
    return ends


def _turns(action_mask: Sequence[int] | None, length: int) -> Iterator[slice]:
    """Yield where the policy's turns are among so many tokens; without a mask all are one."""
    mask = [1] * length if action_mask is None else list(action_mask)
    ends = [index for index in range(1, length + 1) if mask[index - 1] and (index == length or not mask[index])]
    for end in ends:
        begin = end
        while begin and mask[begin - 1]:
            begin -= 1
        yield slice(begin, end)


def _steps(text: str, between: re.Pattern) -> list[tuple[str, int]]:
    """Return the steps of a text and their ends in it."""
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
    """Yield beginning and end of every thought of a text; where it has no marks, of all of it."""
    opens, closes = text.find(OPEN), text.find(CLOSE)
    if opens < 0 and closes < 0:
        yield 0, len(text)
    # A thought begun in the prompt.
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
    """Return the index of the first token with which the decoded text has `end` characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_text_of(tokenizer, ids[: middle + 1])) >= end:
            high = middle
        else:
            low = middle + 1
    return low

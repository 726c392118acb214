"""Several answers to a prompt, and the one to keep: that of the majority, or the best by a reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import as_completion
from hfllm.data.rows import split_beginning
from hfllm.data.thoughts import answer_of, final_answer, plain_answer
from hfllm.errors import InputError
from hfllm.generation.responses import sample_responses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Chosen:
    """The response that was kept of several to one prompt.

    Args:
        response: its text, with its thoughts.
        answer: its final answer.
        share: of the responses that have this answer, from 0 to 1.
        score: its reward, `None` where a majority decided.
    """

    response: str
    answer: str
    share: float
    score: float | None = None


def majority(answers: Sequence[str]) -> tuple[str, float]:
    """Return the most frequent answer and its share; of equally frequent ones the first, empty ones last.

    Args:
        answers: at least one; an empty one is a response without an answer.
    """
    said = [answer for answer in answers if answer]
    if not said:
        return "", 0.0
    best = max(said, key=said.count)
    return best, said.count(best) / len(answers)


def majority_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    extract: Callable[[str], str] = final_answer,
    **sampling: Any,
) -> list[Chosen]:
    """Return for each prompt the answer that most of `n` sampled responses come to, whatever their thoughts.

    Self-consistency (Wang et al. 2023, arXiv:2203.11171): thoughts differ, and right ones agree in the answer.

    Args:
        extract: returns the final answer of a response without its thoughts.
        sampling: of `sample_responses`, such as `temperature`, `seed` or `tools`.

    Raises:
        InputError: for fewer than one response.
    """
    kept = []
    for texts in _sampled(model, tokenizer, prompts, n, max_new_tokens, sampling):
        answers = [plain_answer(extract(answer_of(text))) for text in texts]
        best, share = majority(answers)
        kept.append(Chosen(texts[answers.index(best)], best, share))
    return kept


def best_by_reward(
    prompts: Sequence[str | list], responses: Sequence[Sequence[str | list]], reward: Callable[..., Sequence[float]]
) -> list[tuple[int, float]]:
    """Return for each prompt which of its responses a reward scores highest, and its score; of equal ones the first.

    Args:
        responses: at least one per prompt, texts or messages; the reward gets texts in the form of their prompt.
        reward: see `best_answers`; it is called once for each prompt.

    Raises:
        InputError: for a score that is NaN, or another number of scores.
    """
    kept = []
    for prompt, texts in zip(prompts, responses, strict=True):
        completions = [as_completion(prompt, text) if isinstance(text, str) else text for text in texts]
        asked, _ = split_beginning(prompt)
        scores = list(reward(prompts=[asked] * len(texts), completions=completions))
        if len(scores) != len(texts):
            raise InputError(f"the reward gave {len(scores)} scores for {len(texts)} responses; expected one for each")
        if any(math.isnan(score) for score in scores):
            raise InputError(f"the reward of a response to prompt {len(kept) + 1} is NaN; expected a number")
        place = max(range(len(texts)), key=scores.__getitem__)
        kept.append((place, float(scores[place])))
    return kept


def best_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    reward: Callable[..., Sequence[float]],
    extract: Callable[[str], str] = final_answer,
    **sampling: Any,
) -> list[Chosen]:
    """Return for each prompt the one of `n` sampled responses that a reward scores highest (best of n).

    Args:
        reward: `(prompts, completions) -> numbers`, such as a `RewardModel`.
        extract, sampling: see `majority_answers`.

    Raises:
        InputError: for fewer than one response, or what `best_by_reward` refuses.
    """
    sampled = _sampled(model, tokenizer, prompts, n, max_new_tokens, sampling)
    kept = []
    for texts, (place, score) in zip(sampled, best_by_reward(prompts, sampled, reward), strict=True):
        answers = [plain_answer(extract(answer_of(text))) for text in texts]
        kept.append(Chosen(texts[place], answers[place], answers.count(answers[place]) / n, score))
    return kept


def _sampled(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | list],
    n: int,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> list[list[str]]:
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    return sample_responses(model, tokenizer, prompts, max_new_tokens, num_return_sequences=n, **sampling)

"""Ask a language model whether something is true: P(True) of an answer, and whether a passage supports a claim."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hfllm.data.tokenizer import plain_text, to_prompt, tokenize_prompts
from hfllm.errors import InputError
from hfllm.grounding.meanings import last_words
from hfllm.grounding.samples import Answered, Prompt
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.judges import LETTERS, letter_tokens
from hfllm.rewards.passes import reply_log_odds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def log_odds(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    options: tuple[str, str] = ("True", "False"),
    both_orders: bool = True,
    letters: tuple[str, str] = LETTERS,
    batch_size: int = 32,
) -> list[float]:
    """Return, for each question, log P(first option) - log P(second option) of the model's reply, in nats.

    The options stand below the question as `(A)` and `(B)`, and the letter is the reply. A question is the user's
    turn, or a transcript for a tokenizer without chat template.

    Args:
        both_orders: ask with the options in both orders and average, so that a liking for a letter cancels out.
        letters: the two replies, which must differ in a single token.
        batch_size: questions in one pass.

    Raises:
        InputError: for letters that cannot be told apart, a tokenizer without padding token, a question that is longer
            than the model's context, and logits that are not finite.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token: set tokenizer.pad_token")
    if not questions:
        return []
    # A transcript ends with a colon.
    tokens = letter_tokens(tokenizer, letters, "" if tokenizer.chat_template else " ")
    orders = (options, options[::-1]) if both_orders else (options,)
    asked = [
        "\n".join([question, *(f"{letter} {option}" for letter, option in zip(letters, order, strict=True))])
        for question in questions
        for order in orders
    ]
    # Each text once: the same claim stands in many answers.
    texts = list(dict.fromkeys(asked))
    prompts = [to_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    ids = [[*each, *tokens.before] for each in tokenize_prompts(prompts, tokenizer)]
    context = max_length_of(model.config)
    for text, each in zip(texts, ids, strict=True):
        if context is not None and len(each) >= context:
            number = asked.index(text) // len(orders) + 1
            raise InputError(f"question {number} takes {len(each)} tokens, and the model's context has {context}")
    odds = reply_log_odds(model, tokenizer, ids, tokens.first, tokens.second, batch_size)
    if not np.isfinite(odds).all():
        raise InputError("the model's logits are not finite: its weights may be damaged, or the precision too low")
    by_text = dict(zip(texts, odds, strict=True))
    count = len(orders)
    return [
        sum(by_text[text] * (-1) ** place for place, text in enumerate(asked[first : first + count])) / count
        for first in range(0, len(asked), count)
    ]


def p_true(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Answered],
    show_samples: bool = True,
    both_orders: bool = True,
    letters: tuple[str, str] = LETTERS,
    batch_size: int = 32,
) -> np.ndarray:
    """Return the uncertainty 1 - P(True) of each given answer, in [0, 1]: (N,).

    The model reads its own answer, with its samples as brainstormed ideas, and is asked whether it is true or false
    (Kadavath et al. 2022, arXiv:2207.05221, section 3). Small models, and those that were not trained to be asked so,
    know little of it.

    Args:
        rows: prompts with their answers.
        show_samples: whether the samples stand before the answer.
        both_orders, letters, batch_size: see `log_odds`.

    Raises:
        InputError: as `log_odds`.
    """
    questions = [
        _is_true(row.prompt, row.given.text, [each.text for each in row.samples] if show_samples else [])
        for row in rows
    ]
    odds = log_odds(model, tokenizer, questions, both_orders=both_orders, letters=letters, batch_size=batch_size)
    # 1 - P(True), without loss where P(True) is nearly 1.
    return np.array([np.exp(-np.logaddexp(0.0, value)) for value in odds], dtype=np.float64)


class AskedModel:
    """A language model as a check of claims: asked whether a passage says so, yes or no.

    Args:
        model, tokenizer: of any causal language model.
        questions: wordings with the places `{passage}` and `{claim}`; the log-odds of all are averaged.
        letters, batch_size: see `log_odds`.

    Raises:
        InputError: for a wording without these places.
    """

    QUESTIONS = (
        "{passage}\nIs it said above that: {claim}",
        "Text: {passage}\nClaim: {claim}\nDoes the text support the claim?",
    )

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        questions: Sequence[str] = QUESTIONS,
        letters: tuple[str, str] = LETTERS,
        batch_size: int = 32,
    ):
        for question in questions:
            if "{passage}" not in question or "{claim}" not in question:
                raise InputError(f"a question must have the places {{passage}} and {{claim}}, got {question[:60]!r}")
        if not questions:
            raise InputError("questions: at least one wording is needed")
        self.model, self.tokenizer, self.questions = model, tokenizer, tuple(questions)
        self.letters, self.batch_size = letters, batch_size

    def __call__(self, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
        """Return for each claim the probability that its passage supports it, by the mean log-odds.

        Raises:
            InputError: as `log_odds`.
        """
        # A passage must not answer by a turn of its own.
        plain = plain_text(self.tokenizer)
        # Not by str.format: a text may hold braces of its own.
        asked = [
            _filled(question, plain(passage), plain(claim))
            for claim, passage in zip(claims, passages, strict=True)
            for question in self.questions
        ]
        odds = log_odds(
            self.model, self.tokenizer, asked, ("Yes", "No"), letters=self.letters, batch_size=self.batch_size
        )
        means = np.array(odds, dtype=np.float64).reshape(len(claims), len(self.questions)).mean(1)
        return [float(np.exp(-np.logaddexp(0.0, -value))) for value in means]


def _filled(question: str, passage: str, claim: str) -> str:
    parts = [part.replace("{claim}", claim) for part in question.split("{passage}")]
    return passage.join(parts)


def _is_true(prompt: Prompt, answer: str, ideas: Sequence[str]) -> str:
    lines = [f"Question: {last_words(prompt).strip()}"]
    if ideas:
        lines += ["Here are some brainstormed ideas:", *(idea.strip() for idea in ideas)]
    return "\n".join([*lines, f"Possible answer: {answer.strip()}", "Is the possible answer:"])

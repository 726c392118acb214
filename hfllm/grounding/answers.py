"""Answer questions from passages that a retriever finds, and say which of them an answer cites."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from hfllm.data.passages import citations_of, without_citations
from hfllm.data.tokenizer import plain_text, tokenize_prompts
from hfllm.errors import InputError
from hfllm.generation.responses import Response, sample_with_ends
from hfllm.grounding.found import Found, Retriever
from hfllm.grounding.instructions import without_instructions
from hfllm.grounding.marginal import passage_weights, rag_sequence_answers, rag_token_answers
from hfllm.grounding.passages import Passages, check_tokenizer
from hfllm.grounding.prompts import Prompt, as_prompt, check_questions, check_room, grounded, question_of
from hfllm.grounding.retrieval import scoring_enough

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARGINALS = {"sequence": rag_sequence_answers, "token": rag_token_answers}


@dataclass(frozen=True)
class GroundedAnswer:
    """An answer and what it was answered from.

    Args:
        question: what was asked.
        text: what the model said, with its citations, without special tokens.
        passages: what it was given, the best first; the first is [1]. None where nothing was found that scores enough.
        has_ended: whether it ended by itself, or was cut off.
        marginal: whether each passage stood in a prompt of its own, where numbers tell no passages apart.
    """

    question: str
    text: str
    passages: list[Found]
    has_ended: bool
    marginal: bool = False

    @property
    def answer(self) -> str:
        """The text without citations."""
        return without_citations(self.text)

    @property
    def cited(self) -> list[Found]:
        """The passages that the text cites, in the order in which it does, without numbers that no passage has."""
        numbers = [] if self.marginal else citations_of(self.text)
        return [self.passages[number - 1] for number in numbers if 1 <= number <= len(self.passages)]

    @property
    def wrong_citations(self) -> list[int]:
        """The numbers that the text cites and no passage has."""
        most = min(len(self.passages), 1) if self.marginal else len(self.passages)
        return [number for number in citations_of(self.text) if not 1 <= number <= most]


def answer_with_passages(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Prompt],
    retriever: Retriever,
    top_k: int = 3,
    min_score: float | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    do_sample: bool = False,
    batch_size: int = 16,
    marginal: str | None = None,
    weight_temperature: float = 1.0,
    drop_instructions: bool = False,
) -> list[GroundedAnswer]:
    """Answer each question from the passages that are found for it, by default greedily and from one prompt.

    Args:
        questions: texts, which become a message of the user if the tokenizer has a chat template, or conversations:
            passages stand before the last message of the user, which is also the query.
        retriever: finds passages.
        top_k: the most passages of a question.
        min_score: passages that score less are not given; see `Gated`. A question that keeps none is asked alone.
        max_new_tokens: of an answer.
        seed: of the sampling.
        do_sample: sample at temperature 1.
        batch_size: prompts of a pass.
        marginal: `sequence` or `token`: each passage in a prompt of its own, see `hfllm.grounding.marginal`.
        weight_temperature: what scores are divided by before the softmax that weighs passages there.
        drop_instructions: leave out sentences of passages that tell the reader what to do, see
            `hfllm.grounding.instructions`; the `passages` of an answer are as they were found.

    Passages cannot open or end a turn: control tokens that they spell are broken, see `hfllm.data.tokenizer`.

    Raises:
        InputError: for numbers that make no sense, questions that are none, passages that another tokenizer cut, a
            prompt that leaves no room for the answer, a tokenizer without padding token, or sampling of a mixture.
    """
    if marginal is not None and marginal not in MARGINALS:
        raise InputError(f"marginal={marginal!r}: expected {', '.join(MARGINALS)} or None")
    if marginal is not None and do_sample:
        raise InputError(f"do_sample cannot be used with marginal={marginal!r}, whose answers are the likeliest")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(number, Integral) or number < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {number!r:.40}")
    check_questions(questions, tokenizer)
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token: set tokenizer.pad_token")
    if isinstance(retriever.passages, Passages):
        check_tokenizer(retriever.passages, tokenizer, "the retriever's passages")
    if not questions:
        return []
    asked = [as_prompt(question, tokenizer) for question in questions]
    found = retriever.retrieve([question_of(prompt) for prompt in asked], top_k)
    if min_score is not None:
        found = _gated(found, min_score)
    plain = plain_text(tokenizer)
    shown = [[plain(each.passage.text) for each in given] for given in found]
    if drop_instructions:
        shown = [[without_instructions(text) for text in texts] for texts in shown]
    if marginal is None:
        prompts = [grounded(prompt, texts) for prompt, texts in zip(asked, shown, strict=True)]
        tokens = [tokenize_prompts([prompt], tokenizer)[0] for prompt in prompts]
        check_room(model, tokenizer, tokens, found, max_new_tokens)
        sampling = {"do_sample": do_sample, "batch_size": batch_size, "seed": seed}
        said = [responses[0] for responses in sample_with_ends(model, tokenizer, prompts, max_new_tokens, **sampling)]
    else:
        said = _mixed(model, tokenizer, asked, shown, found, max_new_tokens, batch_size, marginal, weight_temperature)
    return [
        GroundedAnswer(question_of(prompt), response.text, given, response.has_ended, marginal is not None)
        for prompt, response, given in zip(asked, said, found, strict=True)
    ]


def _gated(found: Sequence[Sequence[Found]], min_score: float) -> list[list[Found]]:
    """Return the passages that score enough, and warn where a gate passes nothing: it may be for another scale."""
    kept = scoring_enough(found, min_score)
    best = max((each.score for ranking in found for each in ranking), default=None)
    if best is not None and not any(kept):
        warnings.warn(
            f"min_score={min_score}: none of {len(found)} question(s) gets a passage; the best score is {best:.3g}",
            stacklevel=3,
        )
    return kept


def _mixed(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[Prompt],
    shown: Sequence[list[str]],
    found: Sequence[list[Found]],
    max_new_tokens: int,
    batch_size: int,
    marginal: str,
    temperature: float,
) -> list[Response]:
    """Return answers from the passages of each question apart; from the question alone where it has none."""
    prompts = [
        [grounded(prompt, [text]) for text in texts] or [prompt] for prompt, texts in zip(asked, shown, strict=True)
    ]
    tokens = [tokenize_prompts([prompt], tokenizer)[0] for each in prompts for prompt in each]
    alone = [passages for given in found for passages in ([[each] for each in given] or [[]])]
    numbers = [number for number, each in enumerate(prompts, 1) for _ in each]
    check_room(model, tokenizer, tokens, alone, max_new_tokens, numbers)
    weights = [passage_weights([each.score for each in given], temperature) if given else [1.0] for given in found]
    return MARGINALS[marginal](model, tokenizer, prompts, weights, max_new_tokens, batch_size)

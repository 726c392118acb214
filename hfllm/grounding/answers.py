"""Answer questions from passages: their prompts, citations, and answers from each passage by itself (RAG)."""

import inspect
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

from hfllm.data.formats import Message
from hfllm.data.passages import citations_of, renumbered, with_passages, without_citations
from hfllm.data.tokenizer import end_tokens, plain_text, tokenize_prompts
from hfllm.errors import InputError, refuse_if
from hfllm.generation.responses import Response, sample_with_ends
from hfllm.generation.scoring import evaluating
from hfllm.grounding.passages import Passages, check_tokenizer
from hfllm.grounding.retrieval import Found, Retriever, scoring_enough
from hfllm.models.loading.saved import check_padding, max_length_of

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


# ---- prompts ----
#
# Put passages into prompts, and check that they leave room for an answer.


# A text, or messages for a chat template.
Prompt = str | list[Message]


def last_question(messages: Sequence[Message]) -> int | None:
    """Return the index of the user's last message, `None` without one."""
    return next((index for index in reversed(range(len(messages))) if messages[index]["role"] == "user"), None)


def question_of(prompt: Prompt) -> str:
    """Return the question of a prompt: the text, or the user's last message.

    Raises:
        InputError: when there is none.
    """
    if isinstance(prompt, str):
        return prompt
    index = last_question(prompt)
    refuse_if(index is None, f"a prompt without a message of the user: {str(prompt)[:80]!r}")
    return prompt[index]["content"]


def grounded(prompt: Prompt, texts: Sequence[str]) -> Prompt:
    """Return a prompt with passages before its last question; without passages the prompt. It is not changed itself.

    Args:
        prompt: a text, or messages including one of the user's.
        texts: the passages, the best first.
    """
    if isinstance(prompt, str) or not texts:
        return with_passages(prompt, texts) if texts else prompt
    index = last_question(prompt)
    message = {**prompt[index], "content": with_passages(prompt[index]["content"], texts)}
    return [*prompt[:index], message, *prompt[index + 1 :]]


def as_prompt(question: Prompt, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
    """Return a question as a message of the user, where the tokenizer has a chat template."""
    if isinstance(question, str) and tokenizer.chat_template:
        return [{"role": "user", "content": question}]
    return question


def check_questions(questions: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse questions other than texts and conversations, and questions unsupported by the tokenizer."""
    if isinstance(questions, str):
        raise InputError(f"questions must be a list, got the text {questions!r:.60}")
    for number, question in enumerate(questions, 1):
        whose = f"question {number}"
        if not isinstance(question, (str, list)):
            raise InputError(f"{whose} must be a text or a list of messages, got {question!r:.60}")
        if not isinstance(question, str) and not tokenizer.chat_template:
            raise InputError(f"{whose} is a conversation, and the tokenizer has no chat template: give texts")
        try:
            str(question_of(question)).encode()
        except UnicodeEncodeError:
            raise InputError(f"{whose} has half a character (a lone surrogate)") from None
    check_padding(tokenizer)


def check_room(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Prompt]],
    rankings: Sequence[Sequence[Sequence[Found]]],
    max_new_tokens: int,
) -> None:
    """Refuse prompts without room for an answer in the model's context.

    Args:
        prompts: of each question.
        rankings: the passages of each of its prompts.
        max_new_tokens: of an answer.
    """
    context = max_length_of(model.config)
    pairs = [(number, ranking) for number, each in enumerate(rankings, 1) for ranking in each]
    for (number, passages), prompt in zip(pairs, _tokens(tokenizer, prompts), strict=True):
        refuse_if(not prompt, f"question {number} has no token")
        if context is None or len(prompt) + max_new_tokens <= context:
            continue
        message = f"question {number}: its prompt with {len(passages)} passage(s) has {len(prompt)} tokens"
        limit = f"with max_new_tokens={max_new_tokens} more than the model's context of {context}"
        refuse_if(not passages, f"{message}, {limit}")
        longest = max((each.passage for each in passages), key=lambda passage: len(passage.text))
        size = len(tokenizer(longest.text, add_special_tokens=False)["input_ids"])
        raise InputError(
            f"{message}, {limit} ({longest.source or 'the longest passage'} has {size}): take a smaller top_k, or cut "
            "passages to fewer max_tokens"
        )


# ---- marginal ----
#
# Answer from several passages apart, in separate prompts: RAG-Sequence and RAG-Token.
#
# Both are mixtures over the passages z of a question x (Lewis et al. 2020, arXiv:2005.11401, section 2.1).
# RAG-Sequence takes one passage for the whole answer, RAG-Token may take another one per token:
#
#     p(y | x) = sum_z p(z | x) prod_i p(y_i | x, z, y_<i)
#     p(y | x) = prod_i sum_z p(z | x) p(y_i | x, z, y_<i)
#
# With a single passage both are the model's own output with this passage.


class Marginal(NamedTuple):
    """Log-probabilities of an answer, in nats: by RAG-Sequence and by RAG-Token."""

    sequence: float
    token: float


def passage_weights(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return p(z | x) of the passages of a question: the softmax of their scores, as in the paper.

    Args:
        scores: of a retriever.
        temperature: divisor of the scores; cosines, from -1 to 1, are nearly uniform at 1.

    Raises:
        InputError: for a non-finite score, or a temperature not above 0.
    """
    refuse_if(not all(map(math.isfinite, scores)), f"scores of passages must be finite, got {list(scores)}"[:160])
    refuse_if(not 0 < temperature < math.inf, f"temperature must be a number above 0, got {temperature}")
    powers = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def marginal_log_probs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    weights: Sequence[float],
    answer: Sequence[int],
    batch_size: int = 16,
) -> Marginal:
    """Return the log-probabilities of an answer to a question.

    Args:
        prompts: the question with every passage.
        weights: their p(z | x), as from `passage_weights`.
        answer: its tokens, including its end token if this is to be scored too.
        batch_size: prompts of a pass.
    """
    import torch

    tokens = tokenize_prompts(prompts, tokenizer)
    by_passage = torch.stack(_log_probs(model, tokens, [answer] * len(tokens), batch_size))
    shares = torch.tensor(weights, dtype=torch.float64).log()
    sequence = torch.logsumexp(shares + by_passage.sum(1), 0)
    return Marginal(sequence.item(), torch.logsumexp(shares[:, None] + by_passage, 0).sum().item())


def rag_sequence_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Prompt]],
    weights: Sequence[Sequence[float]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Response]:
    """Return the likeliest answer to each question by RAG-Sequence, among the greedy ones under each passage.

    All are scored under all passages ("thorough decoding" of the paper, with greedy answers in place of beams).

    Args:
        prompts: for each question, it with each of its passages.
        weights: p(z | x) of each.
        max_new_tokens: of an answer; truncated answers are scored as far as they go.
        batch_size: prompts of a pass.
    """
    return rag_sequence_answers_by(model, tokenizer, prompts, [weights], max_new_tokens, batch_size)[0]


def rag_sequence_answers_by(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Prompt]],
    weightings: Sequence[Sequence[Sequence[float]]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[list[Response]]:
    """Return the answers of `rag_sequence_answers` by several weights of the same passages, decoded and scored once.

    Args:
        weightings: each the weights of all questions.

    Returns:
        The answers to all questions, by weighting.
    """
    import torch

    flat = _tokens(tokenizer, prompts)
    sequences = _decoded(model, tokenizer, flat, max_new_tokens, batch_size)
    ends = list(accumulate(map(len, prompts)))
    questions = [range(end - len(each), end) for end, each in zip(ends, prompts, strict=True)]
    candidates = [list(dict.fromkeys(sequences[index] for index in indices)) for indices in questions]
    # A single candidate needs no score.
    pairs = [
        (flat[index], candidate)
        for indices, of_question in zip(questions, candidates, strict=True)
        if len(of_question) > 1
        for candidate in of_question
        for index in indices
    ]
    scored = iter(_log_probs(model, *zip(*pairs, strict=True), batch_size) if pairs else ())
    answers: list[list[Response]] = [[] for _ in weightings]
    for number, (indices, of_question) in enumerate(zip(questions, candidates, strict=True)):
        scores = torch.zeros(1, len(indices), dtype=torch.float64)
        if len(of_question) > 1:
            scores = torch.stack([next(scored).sum() for _ in of_question for _ in indices])
        for weights, chosen in zip(weightings, answers, strict=True):
            shares = torch.tensor(weights[number], dtype=torch.float64).log()
            of_candidates = torch.logsumexp(scores.view(-1, len(indices)) + shares, 1)
            chosen.append(_response(tokenizer, model, of_question[int(of_candidates.argmax())]))
    return answers


def rag_token_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[Prompt]],
    weights: Sequence[Sequence[float]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Response]:
    """Return the greedy answer to each question by RAG-Token: each token is the likeliest of the mixture.

    Args:
        prompts: for each question, it with each of its passages.
        weights: p(z | x) of each.
        max_new_tokens: of an answer.
        batch_size: prompts of a pass, or all prompts of one question if they are more.
    """
    flat, answers, start = _tokens(tokenizer, prompts), [], 0
    group: list[Sequence[float]] = []
    for index, shares in enumerate(weights):
        group.append(shares)
        is_last = index + 1 == len(weights)
        if is_last or sum(map(len, group)) + len(weights[index + 1]) > batch_size:
            rows = flat[start : start + sum(map(len, group))]
            sequences = _decoded(model, tokenizer, rows, max_new_tokens, len(rows), _mixture(group, model.device))
            first = 0
            for shares in group:
                answers.append(_response(tokenizer, model, sequences[first]))
                first += len(shares)
            start, group = start + len(rows), []
    return answers


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[Prompt]]) -> list[list[int]]:
    """Return the tokens of all prompts, question by question."""
    # One by one, since texts and messages may be mixed.
    return [tokenize_prompts([prompt], tokenizer)[0] for each in prompts for prompt in each]


def _mixture(weights: Sequence[Sequence[float]], device: "torch.device") -> "LogitsProcessor":
    """Return a processor giving all prompts of a question the mixture's log-probabilities, for the same next token."""
    import torch
    from transformers import LogitsProcessor

    shares = torch.tensor([share for each in weights for share in each], dtype=torch.float64, device=device).log()
    sizes = [len(each) for each in weights]

    class Mixture(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
            # In 64 bits no two different logits become one: a single passage decodes as without the mixture.
            parts = (scores.double().log_softmax(-1) + shares[:, None]).split(sizes)
            return torch.cat([part.logsumexp(0, keepdim=True).expand_as(part) for part in parts])

    return Mixture()


def _decoded(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    processor: "LogitsProcessor | None" = None,
) -> list[tuple[int, ...]]:
    """Return greedy answers to prompts, as tokens up to and including the end token."""
    import torch

    ends, answers = sorted(end_tokens(tokenizer, model)), []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(tokens), batch_size):
            batch = {"input_ids": list(tokens[start : start + batch_size])}
            batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                logits_processor=[] if processor is None else [processor],
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                use_cache=True,
            )
            for row in output[:, batch["input_ids"].shape[1] :].tolist():
                end = next((index for index, token in enumerate(row) if token in ends), len(row))
                answers.append(tuple(row[: end + 1]))
    return answers


def _log_probs(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
) -> "list[torch.Tensor]":
    """Return the log-probabilities of an answer's tokens after its prompt, in 64 bits."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
    result = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            rows = [[*prompt, *answer] for prompt, answer in zip(prompts[part], answers[part], strict=True)]
            longest = max(map(len, rows))
            # Tokens of a causal model do not see tokens to their right, so any token serves as padding.
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
            # Only the logits of the answers, at the end: logits of whole prompts would take much memory.
            first = min(len(prompt) for prompt in prompts[part]) - 1
            keep = {"logits_to_keep": longest - first} if keeps_logits else {}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
            left_out = longest - logits.shape[1]
            for index, (row, answer) in enumerate(zip(rows, answers[part], strict=True)):
                begins = len(row) - len(answer) - 1 - left_out
                predicted = logits[index, begins : begins + len(answer)].double().log_softmax(-1)
                targets = ids[index, len(row) - len(answer) : len(row), None]
                result.append(predicted.gather(1, targets)[:, 0].cpu())
    return result


def _response(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", tokens: Sequence[int]) -> Response:
    has_ended = bool(tokens) and tokens[-1] in end_tokens(tokenizer, model)
    return Response(tokenizer.decode(tokens, skip_special_tokens=True), has_ended)


# ---- union ----
#
# Answer from several passages apart, and say all that they say, each with the passages that say it.
#
# A model that answers from one passage or refuses need not learn what several of them mean together: which one tells,
# or whether two disagree. While an answer is written, no other passage can change it (as in RobustRAG, which isolates
# passages and counts what their answers share: Xiang et al. 2024, arXiv:2405.15556).


# How models say that a passage does not tell. A negation belongs to a verb of telling, and that to passages or the
# reader.
_NOT = r"(?:n't| not|not| never)"
_TOLD = r"(?:mentioned|stated|said|told|given|specified|provided|described|included|contained|known|clear|answered)"
_TELL = r"(?:say|tell|mention|state|give|specify|provide|describe|include|contain|answer|know|find|determine|explain)"
_READ = r"(?:passages?|texts?|contexts?|documents?|sources?|articles?|information)"
_REFUSES = re.compile(
    rf"\b{_READ}\b[^.!?]{{0,30}}\b(?:do|does|did|can|could|is|are|was|were){_NOT}\b[^.!?]{{0,20}}\b(?:{_TELL}|{_TOLD})\b"
    rf"|\b(?:it|that|this|answer)\b[^.!?]{{0,30}}\b(?:is|was|are|were){_NOT}\b(?: \w+)? {_TOLD}\b"
    rf"|\b(?:I|we|one) (?:do|did|can|ca|could){_NOT}\b(?: \w+)? {_TELL}\b"
    r"|\bno (?:information|mention|answer|passages?)\b|\b(?:says?|tells?|mentions?) nothing\b|\bnothing (?:is|about)\b"
    rf"|\bunable to {_TELL}\b|\bnot (?:mentioned|stated|specified|provided|given)\b|^\s*unknown\b",
    re.IGNORECASE,
)
# Words that say nothing new in an answer, as those of the question.
_SMALL_WORDS = frozenset(
    ("a", "an", "the", "it", "its", "they", "is", "are", "was", "were", "has", "have", "of", "in", "on", "at", "to")
)
# Marks around words; signs such as - and < belong to them.
_MARKS = " .,;:!?\u2026\"'\u201c\u201d\u2018\u2019()[]\u3002\u3001\uff01\uff1f\u300c\u300d"
# The end of an answer with its final point.
_ENDED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f](?:[\"'\u201d\u2019)\s]|\[[\d, ]+\])*$")


@dataclass(frozen=True)
class Claim:
    """What passages say.

    Args:
        text: the answer from the first of them, with all their numbers as its citations.
        numbers: of the passages, from 1.
    """

    text: str
    numbers: tuple[int, ...]


def refuses(text: str) -> bool:
    """Return whether an answer says that something is not told or not known, judged by its words, in English."""
    return bool(_REFUSES.search(text.replace("\u2019", "'")))


def claims_of_passages(question: str, answers: Sequence[str]) -> list[Claim]:
    """Return what the answers from the passages of a question say, equal ones once; none where all refuse.

    Where some answers cite their passage, the others are refusals or are not from a passage, and are left out. Where
    none does, those that refuse by their words are.

    Answers are equal that have the same words in the same order, beside words of the question and small ones such as
    "is": `Red.` and `It is red.`

    Args:
        question: its text.
        answers: one for each passage, in the order of their numbers; each cites its passage as [1].
    """
    said = [(number, text) for number, text in enumerate(answers, 1) if _words_of(without_citations(text))]
    told = [(number, text) for number, text in said if 1 in citations_of(text)]
    told = told or [(number, text) for number, text in said if not refuses(text)]
    asked, groups = {*_words_of(question)}, {}
    for number, text in told:
        words = [word for word in _words_of(without_citations(text)) if word not in _SMALL_WORDS]
        # An answer in words of the question alone is compared by these.
        key = tuple(word for word in words if word not in asked) or ("", *words)
        groups.setdefault(key, []).append((number, text))
    numbers = [tuple(number for number, _ in group) for group in groups.values()]
    texts = [group[0][1] for group in groups.values()]
    return [Claim(renumbered(text, each).strip(), each) for text, each in zip(texts, numbers, strict=True)]


def _words_of(text: str) -> list[str]:
    words = (word.strip(_MARKS) for word in text.casefold().split())
    return [word for word in words if re.search(r"\w", word)]


def union_of(question: str, answers: Sequence[str]) -> str:
    """Return what the answers from the passages of a question say together: see `claims_of_passages`.

    `The fox is red [1, 3]. The fox is blue [2].` are three passages, two of which agree. Where no passage tells, it is
    the first answer without citations.
    """
    claims = [claim.text for claim in claims_of_passages(question, answers)]
    if not claims:
        return without_citations(answers[0]) if answers else ""
    ended = [text if _ENDED.search(text) else f"{text}." for text in claims]
    return claims[0] if len(claims) == 1 else " ".join(ended)


def union_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    prompts: Sequence[Sequence[Prompt]],
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[Response]:
    """Return `union_of` the greedy answers to each question from each of its passages; of one prompt its answer.

    Args:
        questions: their texts.
        prompts: for each question, it with each of its passages.
        max_new_tokens: of an answer from one passage.
        batch_size: prompts of a pass.

    Returns:
        The answers. One has ended if all from its passages have.
    """
    flat = [prompt for each in prompts for prompt in each]
    found = sample_with_ends(model, tokenizer, flat, max_new_tokens, do_sample=False, batch_size=batch_size)
    responses, answers = (response for (response,) in found), []
    for question, each in zip(questions, prompts, strict=True):
        apart = [next(responses) for _ in each]
        text = union_of(question, [one.text for one in apart]) if len(apart) > 1 else apart[0].text
        answers.append(Response(text, all(one.has_ended for one in apart)))
    return answers


# ---- answers ----


MARGINALS = {"sequence": rag_sequence_answers, "token": rag_token_answers}
UNION = "union"


@dataclass(frozen=True)
class GroundedAnswer:
    """An answer and its sources.

    Args:
        question: its text.
        text: the model's output, or the union of several, with its citations, without special tokens.
        passages: its input passages, the best first; the first is [1]. Empty if no passage scored enough.
        has_ended: whether it ended by itself, or was cut off.
        marginal: whether the answer is of a mixture over passages, where numbers do not distinguish them.
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
        """The passages cited in the text, in its order, without numbers of no passage."""
        numbers = [] if self.marginal else citations_of(self.text)
        return [self.passages[number - 1] for number in numbers if 1 <= number <= len(self.passages)]

    @property
    def wrong_citations(self) -> list[int]:
        """The numbers cited in the text without a passage of this number."""
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
    """Answer questions from the passages found for them, by default greedily and from one prompt.

    Args:
        questions: texts, which become a message of the user if the tokenizer has a chat template, or conversations:
            passages stand before the last message of the user, which is also the query.
        retriever: finds passages.
        top_k: the most passages of a question.
        min_score: passages with lower scores are left out; see `Gated`. A question without passages is asked alone.
        max_new_tokens: of an answer.
        seed: of the sampling.
        do_sample: sample at temperature 1.
        batch_size: prompts of a pass.
        marginal: every passage in its own prompt: `sequence` or `token` answer by their mixture, see
            `rag_sequence_answers`; `union` says all that they say, with the passages that say it, see `union_of`.
        weight_temperature: divisor of the scores before the softmax over passages there.
        drop_instructions: leave out sentences of passages with instructions to the reader, see
            `without_instructions`; the `passages` of an answer are as they were found.

    Passages cannot open or end a turn: control tokens in their text are broken, see `hfllm.data.tokenizer`.

    Raises:
        InputError: for invalid numbers, invalid questions, passages cut by another tokenizer, a prompt without room
            for the answer, a tokenizer without padding token, or sampling of a mixture.
    """
    _check_options(marginal, do_sample, max_new_tokens, batch_size)
    check_questions(questions, tokenizer)
    if isinstance(retriever.passages, Passages):
        check_tokenizer(retriever.passages, tokenizer, "the retriever's passages")
    if not questions:
        return []
    base_prompts = [as_prompt(question, tokenizer) for question in questions]
    result = retriever.retrieve([question_of(prompt) for prompt in base_prompts], top_k)
    if min_score is not None:
        result = _gated(result, min_score)
    plain = plain_text(tokenizer)
    contexts = [[plain(each.passage.text) for each in ranking] for ranking in result]
    if drop_instructions:
        contexts = [[without_instructions(text) for text in texts] for texts in contexts]

    def parts(passages: list) -> list[list]:
        """Return the passages of each prompt of a question; a question without passages has one prompt."""
        return [passages] if marginal is None else [[each] for each in passages] or [[]]

    pairs = zip(base_prompts, contexts, strict=True)
    prompts = [[grounded(prompt, part) for part in parts(texts)] for prompt, texts in pairs]
    check_room(model, tokenizer, prompts, [parts(ranking) for ranking in result], max_new_tokens)
    asked = [question_of(prompt) for prompt in base_prompts]
    if marginal is None:
        whole = [prompt for (prompt,) in prompts]
        sampling = {"do_sample": do_sample, "batch_size": batch_size, "seed": seed}
        answers = [response for (response,) in sample_with_ends(model, tokenizer, whole, max_new_tokens, **sampling)]
    elif marginal == UNION:
        answers = union_answers(model, tokenizer, asked, prompts, max_new_tokens, batch_size)
    else:
        scores = [[each.score for each in ranking] for ranking in result]
        weights = [passage_weights(each, weight_temperature) if each else [1.0] for each in scores]
        answers = MARGINALS[marginal](model, tokenizer, prompts, weights, max_new_tokens, batch_size)
    return [
        GroundedAnswer(question, response.text, ranking, response.has_ended, marginal in MARGINALS)
        for question, response, ranking in zip(asked, answers, result, strict=True)
    ]


def _check_options(marginal: str | None, do_sample: bool, max_new_tokens: int, batch_size: int) -> None:
    if marginal is not None:
        known = (*MARGINALS, UNION)
        refuse_if(marginal not in known, f"marginal={marginal!r}: expected {', '.join(known)} or None")
        with_it = f"do_sample cannot be used with marginal={marginal!r}"
        refuse_if(do_sample, f"{with_it}, whose answers are greedy")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(number, Integral) or number < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {number!r:.40}")


def _gated(rankings: Sequence[Sequence[Found]], min_score: float) -> list[list[Found]]:
    """Return the passages with high enough scores, and warn if a gate passes nothing: it may be for another scale."""
    passing = scoring_enough(rankings, min_score)
    best = max((each.score for ranking in rankings for each in ranking), default=None)
    if best is not None and not any(passing):
        warnings.warn(
            f"min_score={min_score}: none of {len(rankings)} question(s) gets a passage; the best score is {best:.3g}",
            stacklevel=3,
        )
    return passing


# ---- instructions ----
#
# Sentences in passages with instructions to the reader, found by their words and left out before a model reads them.
#
# A model may follow any text in its input (indirect prompt injection: Greshake et al. 2023, arXiv:2302.12173), and a
# small one cannot be taught not to within minutes. Rules of this kind cost nothing and are the same for every model.
# They miss instructions in other words, in other languages or spelled oddly, and match some sentences of manuals and
# recipes, real instructions to the reader: they are one line of defense, not all of it.


# Beginnings of an instruction to an assistant, after words of politeness or emphasis.
_COMMANDS = (
    *("say", "tell", "answer", "reply", "respond", "repeat", "print", "output", "write", "claim that", "pretend"),
    *("ignore", "forget", "disregard", "override", "act", "behave", "roleplay", "translate", "summarize", "summarise"),
    *("reveal", "show me", "send", "call", "execute", "run", "do not", "don't", "never", "always", "stop", "refuse"),
    *("only say", "only answer", "only reply", "begin your", "start your", "end your"),
)
_POLITE = r"(?:(?:please|now|then|also|just|important|note|attention|system|assistant|user|instructions?|ai)\W+)*"
_BEGINS = re.compile(rf"\W*{_POLITE}(?:{'|'.join(_COMMANDS)})\b", re.IGNORECASE)
# To the reader, in other words.
_ADDRESSES = re.compile(
    r"\byou (?:must|should|shall|will|have to|need to|are to|are now|may only|can only)\b"
    r"|\byou (?:say|tell|answer|reply|respond)\b"
    r"|\b(?:i|we) (?:want|ask|order|need|tell|command|instruct|beg|would like) you\b"
    r"|\b(?:previous|above|earlier|prior|your|all) (?:instructions|rules|orders|prompts?|guidelines)\b"
    r"|\bsystem prompt\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")


def is_instruction(sentence: str) -> bool:
    """Return whether a sentence is an instruction to its reader, judged by its words."""
    return bool(_BEGINS.match(sentence) or _ADDRESSES.search(sentence))


def without_instructions(text: str) -> str:
    """Return a text without its instructions; the remaining sentences are joined by single spaces.

    A text without instructions is returned unchanged, including its spaces and line ends.
    """
    sentences = _SENTENCE.split(text)
    remaining = [sentence for sentence in sentences if not is_instruction(sentence)]
    return text if len(remaining) == len(sentences) else " ".join(" ".join(remaining).split())


# ---- equal texts ----

# A number keeps its sign and its point.
_WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\w+")
_ARTICLES = frozenset(("a", "an", "the"))


def normalized(text: str) -> str:
    """Return the words of a text without case, punctuation, articles and citations, for comparing texts.

    As for SQuAD's exact match (Rajpurkar et al. 2016, arXiv:1606.05250), but numbers keep sign and point. A text
    without words is itself, without spaces around it.
    """
    plain = without_citations(text).casefold()
    words = [word for word in _WORD.findall(plain) if word not in _ARTICLES]
    return " ".join(words) or plain.strip()

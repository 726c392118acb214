"""Whether an answer's claims are in the passages (entailment): unsupported claims are revised or dropped.

A check is a function of two lists, `(claims, passages) -> scores`, with a score in [0, 1] per pair for how well the
passage supports the claim; above 1/2 it does. `contains`, `has_words`, an `EntailmentModel`, an `AskedModel`
(`hfllm.grounding.uncertainty`) and any function of yours are checks.
"""

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfllm.data.passages import without_citations
from hfllm.data.thoughts import admits_unknown
from hfllm.data.tokenizer import plain_text
from hfllm.errors import InputError, check_positive, refuse_if
from hfllm.generation.responses import best_by_reward, majority
from hfllm.generation.scoring import batches_of_like_length, evaluating, pass_precision
from hfllm.grounding.abstention import UNKNOWN
from hfllm.grounding.answers import normalized
from hfllm.models.loading.saved import check_padding, check_vocabulary, max_length_of
from hfllm.outputs.figures import mean_of, readable
from hfllm.outputs.intervals import standard_error

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# ---- claims ----


Check = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
Splitter = Callable[[str], Sequence[str]]
# `(question, answer, unsupported claims, passages) -> answer`
Reviser = Callable[[str, str, Sequence[str], Sequence[str]], str]
SUPPORTED = 0.5
KEPT, REVISED, ABSTAINED = "kept", "revised", "abstained"

# After a point, also in quotes or brackets, and after the points of Chinese and Japanese.
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'\u2019\u201d)\]])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
# A match begins at the start of a run of like characters: tried from every one of them, a long run would take its
# square.
_LIST_MARK = re.compile(r"^[^\S\n]*(?:\d+[.)]|[-*\u2022])\s+", re.MULTILINE)
_POINTS = r"[.!?\u3002\uff01\uff1f]"
_CITED_POINT = re.compile(rf"(?<!{_POINTS})({_POINTS}+)((?:\s*\[\d+(?:, ?\d+)*\])+)")


@dataclass(frozen=True)
class Claim:
    """A claim and how well the passages support it.

    Args:
        text: a sentence of the answer.
        score: the highest over all passages, in [0, 1]; 0 without passages.
        passage: index of the passage with this score, from 0; `None` where none supports the claim.
    """

    text: str
    score: float
    passage: int | None

    @property
    def is_supported(self) -> bool:
        return self.passage is not None


@dataclass(frozen=True)
class Revision:
    """An answer after verification.

    Args:
        answer: the text to show.
        action: `kept`, `revised` or `abstained`.
        unsupported: the first answer's claims without support by any passage.
    """

    answer: str
    action: str
    unsupported: tuple[str, ...] = ()


def claims_of(answer: str) -> list[str]:
    """Return the sentences of an answer, without citations and list marks; a line break ends one too.

    Abbreviations such as `Dr.` end a sentence here: hand the functions a splitter of your own for such texts.
    """
    parts = _SENTENCE.split(_LIST_MARK.sub("", _citations_before_points(answer)))
    return [part for part in (without_citations(part).strip() for part in parts) if re.search(r"\w", part)]


def contains(claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    """Return 1 where a passage has the claim's normalized words in this order and without others between them.

    It never takes a paraphrase for support, and takes a claim denied by the passage ("it is not true that ...").
    """
    return [
        float(bool(phrase := normalized(claim)) and f" {phrase} " in f" {normalized(passage)} ")
        for claim, passage in zip(claims, passages, strict=True)
    ]


def has_words(claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    """Return the share of the claim's different normalized words in a passage, in [0, 1].

    It takes no order into account: "the fox eats the owl" is supported by "the owl eats the fox". As a check call it
    with a threshold near 1.
    """
    shares = []
    for claim, passage in zip(claims, passages, strict=True):
        words, passage_words = set(normalized(claim).split()), set(normalized(passage).split())
        shares.append(len(words & passage_words) / len(words) if words else 0.0)
    return shares


def verify(
    answers: Sequence[str],
    passages: Sequence[Sequence[str]],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> list[list[Claim]]:
    """Return the answers' claims with their support, all answers in one call of the check.

    Args:
        answers: texts. Sentences such as `I do not know` are no claims.
        passages: per answer the texts to check it against.
        check: see above.
        splitter: `answer -> claims`.
        threshold: lowest score of a supported claim.

    Raises:
        InputError: for other numbers of answers and lists of passages, passages given as one text, and a check without
            a number in [0, 1] per pair.
    """
    refuse_if(len(answers) != len(passages), f"there are {len(answers)} answers and {len(passages)} lists of passages")
    refuse_if(not 0 < threshold <= 1, f"threshold must be above 0 and at most 1, got {threshold}")
    for number, (answer, texts) in enumerate(zip(answers, passages, strict=True), 1):
        refuse_if(not isinstance(answer, str), f"answer {number} must be a text, got {answer!r:.60}")
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the passages of answer {number} must be a list of texts, got {str(texts)[:60]!r}")
    claims = [[claim for claim in splitter(answer) if not admits_unknown(claim)] for answer in answers]
    pairs = [
        (row, index, number)
        for row, answer_claims in enumerate(claims)
        for index in range(len(answer_claims))
        for number in range(len(passages[row]))
    ]
    scores = _scores(check, [claims[row][index] for row, index, _ in pairs], [passages[row][n] for row, _, n in pairs])
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for (row, index, number), score in zip(pairs, scores, strict=True):
        # Of equally good passages the first.
        if (row, index) not in best or score > best[row, index][0]:
            best[row, index] = score, number
    result = []
    for row, answer_claims in enumerate(claims):
        tops = [best.get((row, index), (0.0, 0)) for index in range(len(answer_claims))]
        result.append(
            [
                Claim(text, score, number if score >= threshold else None)
                for text, (score, number) in zip(answer_claims, tops, strict=True)
            ]
        )
    return result


def supported(
    answer: str,
    passages: Sequence[str],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> bool:
    """Return whether an answer claims something, and passages support all of it, perhaps one for each claim."""
    return all_supported(verify([answer], [passages], check, splitter, threshold)[0])


def all_supported(claims: Sequence[Claim]) -> bool:
    """Return whether there are claims, and all are supported."""
    return bool(claims) and all(claim.is_supported for claim in claims)


def revise_or_abstain(
    questions: Sequence[str],
    answers: Sequence[str],
    passages: Sequence[Sequence[str]],
    check: Check,
    revise: Reviser | None = None,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> list[Revision]:
    """Return each answer unchanged where passages support it, else its supported rest, else "I do not know.".

    Args:
        questions, answers, passages: a row each.
        check, splitter, threshold: see `verify`.
        revise: `(question, answer, unsupported claims, passages) -> answer`, such as a model asked again; its output
            is checked too, and is not shown if unsupported. By default supported claims stay, and the others are
            dropped.
    """
    refuse_if(len(questions) != len(answers), f"there are {len(questions)} questions and {len(answers)} answers")
    result = verify(answers, passages, check, splitter, threshold)
    revisions = [_dropped(answer, claims) for answer, claims in zip(answers, result, strict=True)]
    if revise is None:
        return revisions
    rows = [
        row for row, (claims, each) in enumerate(zip(result, revisions, strict=True)) if claims and each.action != KEPT
    ]
    again = [revise(questions[row], answers[row], revisions[row].unsupported, passages[row]) for row in rows]
    checked = verify(again, [passages[row] for row in rows], check, splitter, threshold)
    for row, text, claims in zip(rows, again, checked, strict=True):
        if all_supported(claims):
            revisions[row] = replace(revisions[row], answer=text, action=REVISED)
        else:
            revisions[row] = replace(revisions[row], answer=UNKNOWN, action=ABSTAINED)
    return revisions


def _dropped(answer: str, claims: Sequence[Claim]) -> Revision:
    if all_supported(claims):
        return Revision(answer, KEPT)
    if not claims and admits_unknown(answer):
        return Revision(answer, ABSTAINED)
    remaining = [claim.text for claim in claims if claim.is_supported]
    unsupported = tuple(claim.text for claim in claims if not claim.is_supported)
    return (
        Revision(" ".join(remaining), REVISED, unsupported) if remaining else Revision(UNKNOWN, ABSTAINED, unsupported)
    )


def _scores(check: Check, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
    if not claims:
        return []
    returned = check(claims, passages)
    try:
        scores = [float(score) for score in (returned.tolist() if hasattr(returned, "tolist") else returned)]
    except (TypeError, ValueError):
        raise InputError(f"the check returned {returned!r:.60}; expected a number for each pair") from None
    if len(scores) != len(claims):
        raise InputError(f"the check returned {len(scores)} scores for {len(claims)} pairs of claim and passage")
    for claim, score in zip(claims, scores, strict=True):
        if math.isnan(score) or not 0 <= score <= 1:
            raise InputError(f"the check returned {score} for the claim {claim[:60]!r}; expected a number from 0 to 1")
    return scores


def _citations_before_points(answer: str) -> str:
    """Return an answer with its citations before the period at their sentence's end: `red [1].`, not `red. [1]`."""
    return _CITED_POINT.sub(r"\2\1", answer)


# ---- entailment ----
#
# Whether a text follows from another, by a transformers model trained for it (NLI).


ENTAILMENT = "entailment"


class EntailmentModel:
    """A sequence-classification model with a label `entailment`, such as one trained on MNLI.

    It is a check of claims, and groups answers with the same meaning (`hfllm.grounding.uncertainty`).

    Args:
        model: from `AutoModelForSequenceClassification`; `config.id2label` names its labels.
        tokenizer: its own.
        batch_size: pairs in one pass.

    Raises:
        InputError: when the model has no such label, its config does not name labels, or its tokenizer has no padding
            token or has tokens without embeddings in the model.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int = 32):
        labels = {number: str(label) for number, label in (model.config.id2label or {}).items()}
        result = [int(number) for number, label in labels.items() if label.strip().casefold() == ENTAILMENT]
        if len(result) != 1 or len(labels) < 2:
            named = ", ".join(labels.values()) or "none"
            raise InputError(
                f"the entailment model's labels are {named}; expected one of two or more to be {ENTAILMENT!r}: name "
                "them in config.id2label, or take a model that was trained on natural language inference"
            )
        check_padding(tokenizer, "the entailment model's")
        check_positive(batch_size=batch_size)
        check_vocabulary(model, tokenizer, "entailment model")
        if model.config.pad_token_id is None:
            # Decoders read the label at the last token before padding.
            model.config.pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer, self.batch_size, self.label = model, tokenizer, batch_size, result[0]

    def __call__(self, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
        """Return for each claim the probability of its entailment by its passage."""
        return [float(row[self.label]) for row in self._probabilities(passages, claims)]

    def in_both_directions(self, first: Sequence[str], second: Sequence[str]) -> list[bool]:
        """Return for each pair whether both texts entail each other: it is the most probable label both times.

        Raises:
            InputError: as a call.
        """
        rows = self._probabilities([*first, *second], [*second, *first])
        entails = [int(row.argmax()) == self.label for row in rows]
        return [one and other for one, other in zip(entails[: len(first)], entails[len(first) :], strict=True)]

    def _probabilities(self, premises: Sequence[str], hypotheses: Sequence[str]) -> list["torch.Tensor"]:
        """Return the probabilities of the labels, (labels,) each."""
        import torch

        if not premises:
            return []
        # A text must not contain the separator of premise and hypothesis.
        plain = plain_text(self.tokenizer)
        encoded = self.tokenizer(list(map(plain, premises)), list(map(plain, hypotheses)), verbose=False)
        lengths, context = [len(ids) for ids in encoded["input_ids"]], max_length_of(self.model.config)
        for number, length in enumerate(lengths, 1):
            if context is not None and length > context:
                raise InputError(
                    f"pair {number} has {length} tokens, and the entailment model reads {context}: cut passages into "
                    f"shorter ones; it begins {premises[number - 1][:40]!r}"
                )
        result: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
            for rows in batches_of_like_length(self.model, lengths, self.batch_size):
                batch = self.tokenizer.pad(
                    {name: [values[row] for row in rows] for name, values in encoded.items()},
                    padding_side="right",
                    return_tensors="pt",
                ).to(self.model.device)
                probabilities = self.model(**batch).logits.float().softmax(-1).cpu()
                if bool(probabilities.isnan().any()):
                    raise InputError("the entailment model's logits are not finite: its weights may be damaged")
                for row, numbers in zip(rows, probabilities, strict=True):
                    result[row] = numbers
        return result


# ---- choosing ----
#
# Which of several answers to keep: the first with support by a passage, the best by a reward, the majority's.


# Per prompt the index of the answer to keep, or `None` to abstain.
Choice = list[int | None]


def first_supported(
    samples: Sequence[Sequence[str]],
    passages: Sequence[Sequence[str]],
    check: Check,
    splitter: Splitter = claims_of,
    threshold: float = SUPPORTED,
) -> Choice:
    """Return for each prompt the index of its first answer with support by passages; `None` where they support none.

    Args:
        samples: answers per prompt.
        passages: per prompt the texts to check against.
        check, splitter, threshold: see `verify`.
    """
    _check_rows(samples, passages=passages)
    flat = [(row, index) for row, answers in enumerate(samples) for index in range(len(answers))]
    claims = verify(
        [samples[row][index] for row, index in flat], [passages[row] for row, _ in flat], check, splitter, threshold
    )
    chosen: Choice = [None] * len(samples)
    for (row, index), answer_claims in reversed(list(zip(flat, claims, strict=True))):
        if all_supported(answer_claims):
            chosen[row] = index
    return chosen


def best_rewarded(
    prompts: Sequence[str | list], samples: Sequence[Sequence[str | list]], reward: Callable[..., Sequence[float]]
) -> Choice:
    """Return for each prompt the index of the answer with the highest reward, such as from a `RewardModel`.

    A reward model scores an answer's style as much as its truth, and the best of many exploits it most: it may lose to
    greedy decoding. Compare them, see `compare_choices`.

    Args:
        prompts: texts or messages.
        samples: answers per prompt, texts or messages.
        reward: `(prompts, completions) -> numbers`.

    Raises:
        InputError: for a prompt without answers, and NaN scores.
    """
    _check_rows(samples, prompts=prompts)
    return [index for index, _ in best_by_reward(prompts, samples, reward)]


def majority_of_meaning(
    samples: Sequence[Sequence[str]], meanings: Sequence[Sequence[Hashable]] | None = None
) -> Choice:
    """Return for each prompt the index of the first answer with the most frequent meaning (self-consistency).

    Args:
        samples: answers per prompt.
        meanings: a label per answer; by default their normalized words. Empty answers come last.

    Raises:
        InputError: for a prompt without answers, or meanings not matching them.
    """
    _check_rows(samples, **({} if meanings is None else {"meanings": meanings}))
    chosen: Choice = []
    for row, answers in enumerate(samples):
        labels = [normalized(text) for text in answers] if meanings is None else list(meanings[row])
        count = len(answers)
        refuse_if(len(labels) != count, f"prompt {row + 1} has {count} answers and {len(labels)} meanings")
        # As `majority` takes them: a text per meaning, none for an empty answer.
        numbers = {label: str(number) for number, label in enumerate(dict.fromkeys(labels), 1)}
        votes = [numbers[label] if text.strip() else "" for text, label in zip(answers, labels, strict=True)]
        chosen.append(votes.index(majority(votes)[0]))
    return chosen


def compare_choices(
    right: Sequence[Sequence[float]],
    choices: Mapping[str, Sequence[int | None]],
    greedy: Sequence[float] | None = None,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Return a report's metrics and table of ways to choose an answer, also where they lose.

    Args:
        right: how right the samples of a prompt are, from 0 to 1, for each prompt.
        choices: by their names, such as `first_supported`, `best_rewarded` and `majority_of_meaning` return them.
        greedy: how right the greedy answers are.

    Returns:
        The metrics `NAME_right`, `NAME_wrong` and `NAME_abstained` as shares of all prompts, with `_se` and `_n`;
        besides the choices there are `one_sample`, `greedy` and `best_possible`, the best of all samples. And for each
        way a row of a table, whose last column is the difference to one sample of the same prompt with its error.

    Raises:
        InputError: where these do not match, or are empty.
    """
    if not right or not all(len(row) for row in right):
        raise InputError("to compare choices there must be prompts, each with at least one answer")
    first = [float(row[0]) for row in right]
    ways: dict[str, list[float | None]] = {"one_sample": list(first)}
    if greedy is not None:
        ways["greedy"] = [float(value) for value in greedy]
    for name, choice in choices.items():
        _check_rows(right, **{name: choice})
        for row, (values, index) in enumerate(zip(right, choice, strict=True), 1):
            if index is not None and not 0 <= index < len(values):
                raise InputError(f"{name} chose answer {index} of prompt {row}, which has {len(values)}")
        ways[name] = [None if index is None else float(row[index]) for row, index in zip(right, choice, strict=True)]
    ways["best_possible"] = [float(max(row)) for row in right]
    metrics: dict[str, float] = {}
    table = []
    for name, values in ways.items():
        _check_rows(right, **{name: values})
        scores = [value or 0.0 for value in values]
        parts = {
            "right": scores,
            "wrong": [0.0 if value is None else 1 - value for value in values],
            "abstained": [float(value is None) for value in values],
        }
        for part, numbers in parts.items():
            metrics |= mean_of(f"{name}_{part}", numbers)
        gains = [score - single for score, single in zip(scores, first, strict=True)]
        error = standard_error(gains)
        cells = {part: f"{sum(numbers) / len(numbers):.3f}" for part, numbers in parts.items()}
        gain = f"{sum(gains) / len(gains):+.3f}" + ("" if error is None else f" ± {readable(error, 2)}")
        gain = "" if name == "one_sample" else gain
        table.append({"answer kept": name.replace("_", " "), **cells, "right, against one sample": gain})
    return metrics, table


def _check_rows(samples: Sequence[Sequence[object]], **others: Sequence[object]) -> None:
    for name, other in others.items():
        if len(other) != len(samples):
            raise InputError(f"there are answers to {len(samples)} prompts, and {name} of {len(other)}")
    for number, row in enumerate(samples, 1):
        refuse_if(not len(row), f"prompt {number} has no answers to choose from")

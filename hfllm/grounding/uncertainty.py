"""How sure a model is of its answers, before anyone says whether they are right: one number each, larger = less sure.

    rows = answer_with_samples(model, tokenizer, prompts, n=10, max_new_tokens=40)
    numbers = uncertainties(rows)  # by the names of MEASURES

Every measure takes rows and their meanings (`hfllm.grounding.meanings`; by default normalized words), and returns (N,)
float64. `CONFIDENCE` turns those that are based on a probability into one. P(True) is in `hfllm.grounding.asking`.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hfllm.errors import InputError
from hfllm.grounding.meanings import meanings_of
from hfllm.grounding.samples import Answered, Prompt, ScoredAnswer
from hfllm.grounding.scoring import score_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Meanings = Sequence[Sequence[Hashable]]


def sequence_surprise(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return minus the log-probability of each given answer, in nats: small for a probable sequence."""
    return np.array([-row.given.logprob for row in _checked(rows, 0)], dtype=np.float64)


def token_surprise(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the same per token, in nats: normalized by length (Malinin and Gales 2021, arXiv:2002.07650)."""
    return np.array([-row.given.mean_logprob for row in _checked(rows, 0)], dtype=np.float64)


def predictive_entropy(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the entropy of the answers, in nats: the mean of minus their log-probability over the samples.

    It is a Monte Carlo estimate, without bias for samples at temperature 1.

    Raises:
        InputError: for a row with fewer than 2 samples, as all entropies.
    """
    return np.array([-_mean(each.logprob for each in row.samples) for row in _checked(rows, 2)], dtype=np.float64)


def normalized_entropy(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the entropy of the answers per token, in nats (Malinin and Gales 2021, arXiv:2002.07650).

    Raises:
        InputError: as `predictive_entropy`.
    """
    return np.array([-_mean(each.mean_logprob for each in row.samples) for row in _checked(rows, 2)], dtype=np.float64)


def semantic_entropy(
    rows: Sequence[Answered], meanings: Meanings | None = None, normalized: bool = False
) -> np.ndarray:
    """Return the entropy of the meanings of the samples, weighted by likelihood, in nats.

    A meaning's probability is the sum of those of its different sequences, over that of all meanings seen (Kuhn et al.
    2023, arXiv:2302.09664; Farquhar et al. 2024, Nature 630:625). A sequence that was sampled twice is counted once.

    Args:
        rows: with at least 2 samples each.
        meanings: for each row labels of the given answer and of each sample, by which equal meanings are equal.
        normalized: take the mean log-probability per token of a sequence for that of the sequence. It removes the
            dependence on length, and what it sums are no probabilities.

    Raises:
        InputError: as `predictive_entropy`, and for meanings that do not match the rows.
    """
    found = []
    for row, labels in _with_meanings(rows, meanings, 2, needs_logprobs=True):
        masses: dict[Hashable, list[float]] = {}
        seen: set[object] = set()
        for sample, label in zip(row.samples, labels[1:], strict=True):
            sequence = sample.token_ids or sample.text
            if sequence not in seen:
                seen.add(sequence)
                masses.setdefault(label, []).append(sample.mean_logprob if normalized else sample.logprob)
        logs = np.array([np.logaddexp.reduce(each) for each in masses.values()])
        found.append(_entropy(np.exp(logs - np.logaddexp.reduce(logs))))
    return np.array(found, dtype=np.float64)


def discrete_semantic_entropy(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the entropy of the shares of samples with each meaning, in nats; it needs no log-probabilities.

    Farquhar et al. 2024 (Nature 630:625). It is at most the logarithm of the number of samples.

    Raises:
        InputError: as `semantic_entropy`.
    """
    found = []
    for _, (_, *labels) in _with_meanings(rows, meanings, 2):
        counts = np.array([labels.count(label) for label in dict.fromkeys(labels)])
        found.append(_entropy(counts / counts.sum()))
    return np.array(found, dtype=np.float64)


def self_consistency(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the share of samples that mean something else than the given answer, in [0, 1].

    One minus the vote share of self-consistency (Wang et al. 2023, arXiv:2203.11171).

    Raises:
        InputError: for a row without samples, and for meanings that do not match the rows.
    """
    found = [1 - labels.count(given) / len(labels) for _, (given, *labels) in _with_meanings(rows, meanings, 1)]
    return np.array(found, dtype=np.float64)


MEASURES: Mapping[str, Callable[[Sequence[Answered], Meanings | None], np.ndarray]] = {
    "sequence_probability": sequence_surprise,
    "token_probability": token_surprise,
    "predictive_entropy": predictive_entropy,
    "normalized_entropy": normalized_entropy,
    "semantic_entropy": semantic_entropy,
    "discrete_semantic_entropy": discrete_semantic_entropy,
    "self_consistency": self_consistency,
}
# What turns a measure into a confidence in [0, 1], for reliability curves. Entropies have none.
CONFIDENCE: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sequence_probability": lambda nats: np.exp(-nats),
    "token_probability": lambda nats: np.exp(-nats),
    "self_consistency": lambda share: 1 - share,
    "p_true": lambda share: 1 - share,
    "ensemble": lambda nats: np.exp(-nats),
}


def uncertainties(rows: Sequence[Answered], meanings: Meanings | None = None) -> dict[str, np.ndarray]:
    """Return each of `MEASURES` of the rows, (N,) each; rows without samples have the first two alone.

    Raises:
        InputError: as the measures.
    """
    if not any(row.samples for row in rows):
        return {name: MEASURES[name](rows, None) for name in list(MEASURES)[:2]}
    meanings = meanings_of(rows) if meanings is None else meanings
    return {name: measure(rows, meanings) for name, measure in MEASURES.items()}


def ensemble_logprobs(
    models: Sequence["PreTrainedModel"],
    tokenizer: "PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase]",
    prompts: Sequence[Prompt],
    answers: Sequence[str | ScoredAnswer],
    batch_size: int = 16,
) -> np.ndarray:
    """Return the log-probability in nats of each answer under each member of an ensemble, (members, N).

    Args:
        tokenizer: of all members, or one for each. With several, answers are taken as texts.

    Raises:
        InputError: for no members, another number of tokenizers, and as `score_answers`.
    """
    several = isinstance(tokenizer, (list, tuple))
    tokenizers = list(tokenizer) if several else [tokenizer] * len(models)
    if not models or len(tokenizers) != len(models):
        raise InputError(
            f"an ensemble of {len(models)} models with {len(tokenizers)} tokenizers: expected one for each"
        )
    if several:
        answers = [answer.text if isinstance(answer, ScoredAnswer) else answer for answer in answers]
    scored = [
        score_answers(model, own, prompts, answers, batch_size) for model, own in zip(models, tokenizers, strict=True)
    ]
    return np.array([[answer.logprob for answer in each] for each in scored], dtype=np.float64)


def ensemble_mean(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Return minus the logarithm of the members' mean probability of each answer, in nats: (N,).

    Args:
        logprobs: (members, N), as `ensemble_logprobs` returns.

    Raises:
        InputError: for fewer than 2 members, or log-probabilities that are NaN.
    """
    table = _members(logprobs)
    return math.log(len(table)) - np.logaddexp.reduce(table, axis=0)


def ensemble_disagreement(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Return how far the members disagree about each answer, in nats: (N,), 0 where all give it the same probability.

    It is the logarithm of their mean probability less the mean of its logarithms, as in the mutual information by
    which ensembles tell what they do not know from what is undecided (Malinin and Gales 2021, arXiv:2002.07650).

    Raises:
        InputError: as `ensemble_mean`.
    """
    return np.maximum(-ensemble_mean(logprobs) - _members(logprobs).mean(0), 0.0)


def _members(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    lengths = [len(each) for each in logprobs]
    if len(lengths) < 2 or any(one != other for one, other in pairwise(lengths)):
        raise InputError(f"an ensemble needs at least 2 members with as many answers each, got {lengths}")
    table = np.array([list(each) for each in logprobs], dtype=np.float64)
    if np.isnan(table).any():
        member, row = (int(place[0]) + 1 for place in np.nonzero(np.isnan(table)))
        raise InputError(f"the log-probability of answer {row} under member {member} is NaN")
    return table


def _checked(rows: Sequence[Answered], fewest: int, needs_logprobs: bool = True) -> Sequence[Answered]:
    for number, row in enumerate(rows, 1):
        if len(row.samples) < fewest:
            measured = "an entropy" if fewest > 1 else "self-consistency"
            raise InputError(f"row {number} has {len(row.samples)} samples; {measured} needs at least {fewest}")
        for place, answer in enumerate((row.given, *row.samples) if needs_logprobs else ()):
            what = f"sample {place}" if place else "the given answer"
            if not answer.token_logprobs:
                raise InputError(f"row {number}: {what} has no token")
            if not math.isfinite(answer.logprob):
                raise InputError(f"row {number}: the log-probability of {what} is {answer.logprob}; expected a number")
            # Rounding may give a little more than 0.
            if max(answer.token_logprobs) > 1e-3:
                highest = f"{max(answer.token_logprobs):g}"
                raise InputError(
                    f"row {number}: a token of {what} has the log-probability {highest}; expected at most 0"
                )
    return rows


def _with_meanings(
    rows: Sequence[Answered], meanings: Meanings | None, fewest: int, needs_logprobs: bool = False
) -> list[tuple[Answered, list[Hashable]]]:
    _checked(rows, fewest, needs_logprobs)
    labels = [list(each) for each in (meanings_of(rows) if meanings is None else meanings)]
    if len(labels) != len(rows):
        raise InputError(f"there are meanings of {len(labels)} rows and {len(rows)} rows")
    for number, (row, own) in enumerate(zip(rows, labels, strict=True), 1):
        wrong = next((label for label in own if not isinstance(label, Hashable) or label != label), None)
        if wrong is not None:
            raise InputError(f"row {number} has the meaning {wrong!r:.40}; expected labels that equal themselves")
        if len(own) != 1 + len(row.samples):
            raise InputError(
                f"row {number} has {len(own)} meanings; expected {1 + len(row.samples)}: of the given answer and of "
                f"{len(row.samples)} samples"
            )
    return list(zip(rows, labels, strict=True))


def _entropy(shares: np.ndarray) -> float:
    # In any order of the meanings the same to the last bit, so that ties stay ties.
    return max(math.fsum(-share * math.log(share) for share in shares.tolist() if share > 0), 0.0)


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return math.fsum(listed) / len(listed)

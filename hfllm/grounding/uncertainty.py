"""How sure a model is of its answers, before anyone says whether they are right: one number each, larger = less sure.

    rows = answer_with_samples(model, tokenizer, prompts, n=10, max_new_tokens=40)
    numbers = uncertainties(rows)  # by the names of MEASURES

Every measure takes rows and their meanings (by default normalized words), and returns (N,) float64. `CONFIDENCE` turns
measures based on a probability into one. P(True) asks the model itself.
"""

import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from hfllm.data.formats import as_messages
from hfllm.data.tokenizer import end_tokens, plain_text, to_prompt, tokenize_prompts
from hfllm.errors import InputError, refuse_if
from hfllm.generation.packed.decoding import continue_prompts
from hfllm.generation.packed.ragged_model import ragged_model
from hfllm.generation.responses import undecodable_reason
from hfllm.generation.scoring import (
    NOT_FINITE,
    Prompt,
    ScoredAnswer,
    batches_of_like_length,
    evaluating,
    pass_precision,
    prompt_tokens,
    reply_log_odds,
    score_answers,
)
from hfllm.grounding.answers import normalized
from hfllm.grounding.retrieval import check_count
from hfllm.models.loading.saved import check_padding, max_length_of
from hfllm.rewards.judges import LETTERS, letter_tokens

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from hfllm.grounding.verification import EntailmentModel


# ---- samples ----
#
# Answers with their log-probabilities: sampled from a model, or any text scored by one.
#
# Log-probabilities are the model's own, at temperature 1 and without its generation config's penalties, of all tokens
# of an answer, its end token too.


@dataclass(frozen=True)
class Answered:
    """A prompt with its given answer, and other sampled answers to measure how sure the model is.

    Args:
        prompt: text or messages.
        given: the answer to be judged right or wrong, such as the greedy one.
        samples: of the same model, at temperature 1.
    """

    prompt: Prompt
    given: ScoredAnswer
    samples: tuple[ScoredAnswer, ...] = ()


def answer_with_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    n: int,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Answered]:
    """Answer all prompts greedily, and sample `n` more answers; see `sample_with_scores`."""
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    greedy = sample_with_scores(model, tokenizer, prompts, 1, do_sample=False, **options)
    samples = sample_with_scores(model, tokenizer, prompts, n, **options)
    return [
        Answered(prompt, first, tuple(others))
        for prompt, (first,), others in zip(prompts, greedy, samples, strict=True)
    ]


def sample_with_scores(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    n: int,
    max_new_tokens: int,
    seed: int = 0,
    do_sample: bool = True,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[ScoredAnswer]]:
    """Sample `n` answers per prompt with the log-probabilities of their tokens, or decode greedily.

    The chance of each answer comes from the seed, its prompt's index and its number only, so that any `batch_size`
    gives the same answers, up to the rounding of the model's logits. Nothing changes the caller's random state. The
    model may be an adapter's, in any precision.

    Args:
        prompts: texts, or lists of messages for the tokenizer's chat template.
        n: answers per prompt; 1 without `do_sample`.
        temperature: of the sampling; the log-probabilities are at 1. Entropies need samples at 1.
        batch_size: answers generated together; a device's memory may allow fewer.

    Returns:
        One list of `n` answers per prompt.

    Raises:
        InputError: for a bad argument, a prompt without tokens or without room for an answer in the model's context,
            an encoder-decoder model, or non-finite logits.
    """
    _check(model, n, max_new_tokens, do_sample, temperature, batch_size)
    ids = prompt_tokens(model, tokenizer, prompts, max_new_tokens)
    rows = [(index, number) for index in range(len(ids)) for number in range(n)]
    ends, answers = sorted(end_tokens(tokenizer, model)), {}
    with _plainly(model):
        longest = max(map(len, ids), default=0) + max_new_tokens
        decode = _decode_packed if undecodable_reason(model, longest) is None else _generate
        for batch in batches_of_like_length(model, [len(ids[index]) for index, _ in rows], batch_size):
            keys = [f"{seed}-{rows[row][0]}-{rows[row][1]}" for row in batch]
            draw = _Draw([_chances(key, max_new_tokens) for key in keys] if do_sample else None, temperature)
            tokens, logprobs = decode(
                model, [ids[rows[row][0]] for row in batch], draw, max_new_tokens, ends, _pad(tokenizer)
            )
            for row, token_ids, numbers in zip(batch, tokens, logprobs, strict=True):
                length = next((index + 1 for index, token in enumerate(token_ids) if token in ends), len(token_ids))
                text = tokenizer.decode(token_ids[:length], skip_special_tokens=True)
                has_ended = token_ids[length - 1] in ends
                answers[rows[row]] = ScoredAnswer(text, tuple(numbers[:length]), tuple(token_ids[:length]), has_ended)
    return [[answers[index, number] for number in range(n)] for index in range(len(ids))]


def sampling_cost(rows: Sequence[Answered]) -> dict[str, float]:
    """Return the cost of the samples compared with the answers, in generated tokens.

    Returns:
        Per prompt `given_tokens` and `sampled_tokens`, and `times_as_many`: all of them over the tokens of given
        answers.

    Raises:
        InputError: for no rows, or answers without tokens.
    """
    refuse_if(not rows, "the cost of sampling: there are no answers")
    answer_tokens = sum(len(row.given.token_logprobs) for row in rows) / len(rows)
    refuse_if(not answer_tokens, "the cost of sampling: the answers have no token")
    sampled = sum(len(sample.token_logprobs) for row in rows for sample in row.samples) / len(rows)
    return {
        "given_tokens": answer_tokens,
        "sampled_tokens": sampled,
        "times_as_many": (answer_tokens + sampled) / answer_tokens,
    }


def _check(
    model: "PreTrainedModel", n: int, max_new_tokens: int, do_sample: bool, temperature: float, batch_size: int
) -> None:
    for name, number in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_count(name, number)
    refuse_if(not do_sample and n != 1, f"n must be 1 without do_sample, got {n}: greedy answers are all the same")
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise InputError(f"temperature must be above 0, got {temperature!r:.40}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError("the model is an encoder and a decoder; expected a causal language model")


def _chances(key: str, count: int) -> list[float]:
    draw = random.Random(f"answer-{key}")
    return [draw.random() for _ in range(count)]


def _pad(tokenizer: "PreTrainedTokenizerBase") -> int:
    # The value of padding does not matter: it is masked.
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


class _Draw:
    """Chooses each row's next token by its own chance, or the likeliest one, and tells its log-probability.

    Args:
        chances: numbers from 0 to 1 for every row, one per token; `None` takes the likeliest.
        temperature: of the distribution that is drawn from.
    """

    def __init__(self, chances: Sequence[list[float]] | None, temperature: float):
        self.chances, self.temperature = chances, temperature

    def __call__(
        self, logits: "torch.Tensor", rows: Sequence[int], steps: Sequence[int]
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Return the tokens (B, 1) of these rows at these steps, and their log-probabilities (B,).

        Args:
            logits: (B, V).
        """
        import torch

        # Probabilities of large vocabularies add up in 64 bits, unsupported by Apple's GPUs.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        own = logits.to(wide).log_softmax(-1)
        refuse_if(not bool(own.amax(-1).isfinite().all()), NOT_FINITE)
        if self.chances is None:
            token = logits.argmax(-1, keepdim=True)
        else:
            chances = [self.chances[row][step] for row, step in zip(rows, steps, strict=True)]
            column = torch.tensor(chances, dtype=wide, device=logits.device)
            reached = (own / self.temperature).softmax(-1).cumsum(-1)
            # The first token whose sum is above the chance: one of probability 0 is never it.
            token = torch.searchsorted(reached, column[:, None] * reached[:, -1:], right=True)
            token = token.clamp(max=logits.shape[-1] - 1)
        return token, own.gather(-1, token)[:, 0]


def _decode_packed(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    draw: _Draw,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return what `_generate` does, over packed weights."""
    import torch

    sizes = [len(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [pad] * (max(sizes) - len(prompt)) for prompt in prompts])
    logprobs = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)

    def draw_and_record(logits: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        token, logprobs[rows, steps] = draw(logits, rows.tolist(), steps.tolist())
        return token[:, 0]

    with torch.inference_mode(), pass_precision(model):
        target = ragged_model(model, max(sizes) + max_new_tokens, packed=True)
        new = continue_prompts(target, padded, sizes, draw_and_record, max_new_tokens, ends, pad)
    return new.tokens.tolist(), logprobs.tolist()


def _generate(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    draw: _Draw,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the tokens after the prompts and their log-probabilities, unspecified after the end."""
    import torch
    from transformers import LogitsProcessorList

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=model.device)
    record = _recording(draw)
    with torch.inference_mode(), pass_precision(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            logits_processor=LogitsProcessorList([record]),
            use_cache=True,
        )
    return output[:, longest:].tolist(), torch.stack(record.logprobs, 1).tolist()


def _recording(draw: _Draw) -> "LogitsProcessor":
    """Return a logits processor to choose each row's token by a draw, and record its log-probability.

    Generation takes the token of the highest logit, so that all others are set to minus infinity.
    """
    import torch
    from transformers import LogitsProcessor

    class Draw(LogitsProcessor):
        def __init__(self):
            self.logprobs: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token, logprob = draw(scores, range(len(scores)), [len(self.logprobs)] * len(scores))
            self.logprobs.append(logprob)
            return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)

    return Draw()


@contextmanager
def _plainly(model: "PreTrainedModel") -> Iterator[None]:
    """Evaluate a model without its own generation config, which fills unset values, such as by a penalty."""
    from transformers import GenerationConfig

    below = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = [(each, each.generation_config) for each in (model, below)]
    with evaluating(model):
        for each, _ in configs:
            each.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for each, config in configs:
                each.generation_config = config


# ---- uncertainty ----


Meanings = Sequence[Sequence[Hashable]]


def sequence_surprise(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return minus the log-probabilities of the given answers, in nats: small for a probable sequence."""
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
    """Return the entropy of the answers per token, in nats (Malinin and Gales 2021, arXiv:2002.07650)."""
    return np.array([-_mean(each.mean_logprob for each in row.samples) for row in _checked(rows, 2)], dtype=np.float64)


def semantic_entropy(
    rows: Sequence[Answered], meanings: Meanings | None = None, normalized: bool = False
) -> np.ndarray:
    """Return the entropy of the meanings of the samples, weighted by likelihood, in nats.

    A meaning's probability is the sum over its different sequences, divided by the sum over all sampled meanings (Kuhn
    et al. 2023, arXiv:2302.09664; Farquhar et al. 2024, Nature 630:625). A sequence sampled twice is counted once.

    Args:
        rows: with at least 2 samples each.
        meanings: per row the labels of the given answer and of all samples, equal for equal meanings.
        normalized: take the mean log-probability per token of a sequence as the sequence's own. This removes the
            dependence on length, and its sums are not over probabilities.
    """
    result = []
    for row, labels in _with_meanings(rows, meanings, 2, needs_logprobs=True):
        masses: dict[Hashable, list[float]] = {}
        unique: set[object] = set()
        for sample, label in zip(row.samples, labels[1:], strict=True):
            sequence = sample.token_ids or sample.text
            if sequence not in unique:
                unique.add(sequence)
                masses.setdefault(label, []).append(sample.mean_logprob if normalized else sample.logprob)
        logs = np.array([np.logaddexp.reduce(each) for each in masses.values()])
        result.append(_entropy(np.exp(logs - np.logaddexp.reduce(logs))))
    return np.array(result, dtype=np.float64)


def discrete_semantic_entropy(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the entropy of the shares of samples with each meaning, in nats; it needs no log-probabilities.

    Farquhar et al. 2024 (Nature 630:625). It is at most the logarithm of the number of samples.
    """
    result = []
    for _, (_, *labels) in _with_meanings(rows, meanings, 2):
        counts = np.array([labels.count(label) for label in dict.fromkeys(labels)])
        result.append(_entropy(counts / counts.sum()))
    return np.array(result, dtype=np.float64)


def self_consistency(rows: Sequence[Answered], meanings: Meanings | None = None) -> np.ndarray:
    """Return the share of samples with another meaning than the given answer, in [0, 1].

    One minus the vote share of self-consistency (Wang et al. 2023, arXiv:2203.11171).

    Raises:
        InputError: for a row without samples, and for meanings not matching the rows.
    """
    result = [
        1 - labels.count(answer_label) / len(labels)
        for _, (answer_label, *labels) in _with_meanings(rows, meanings, 1)
    ]
    return np.array(result, dtype=np.float64)


MEASURES: Mapping[str, Callable[[Sequence[Answered], Meanings | None], np.ndarray]] = {
    "sequence_probability": sequence_surprise,
    "token_probability": token_surprise,
    "predictive_entropy": predictive_entropy,
    "normalized_entropy": normalized_entropy,
    "semantic_entropy": semantic_entropy,
    "discrete_semantic_entropy": discrete_semantic_entropy,
    "self_consistency": self_consistency,
}
# Functions from a measure to a confidence in [0, 1], for reliability curves. Entropies have none.
CONFIDENCE: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sequence_probability": lambda nats: np.exp(-nats),
    "token_probability": lambda nats: np.exp(-nats),
    "self_consistency": lambda share: 1 - share,
    "p_true": lambda share: 1 - share,
    "ensemble": lambda nats: np.exp(-nats),
}


def uncertainties(rows: Sequence[Answered], meanings: Meanings | None = None) -> dict[str, np.ndarray]:
    """Return each of `MEASURES` of the rows, (N,) each; rows without samples have only the first two.

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
    """Return the log-probabilities in nats of the answers under all members of an ensemble, (members, N).

    Args:
        tokenizer: of all members, or one for each. With several, answers are taken as texts.

    Raises:
        InputError: for no members, another number of tokenizers, and as `score_answers`.
    """
    several = isinstance(tokenizer, (list, tuple))
    tokenizers = list(tokenizer) if several else [tokenizer] * len(models)
    members, others = len(models), len(tokenizers)
    if not members or others != members:
        raise InputError(f"an ensemble of {members} models with {others} tokenizers: expected one for each")
    if several:
        answers = [answer.text if isinstance(answer, ScoredAnswer) else answer for answer in answers]
    scored = [
        score_answers(model, own, prompts, answers, batch_size) for model, own in zip(models, tokenizers, strict=True)
    ]
    return np.array([[answer.logprob for answer in each] for each in scored], dtype=np.float64)


def ensemble_mean(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Return minus the logarithm of the members' mean probability per answer, in nats: (N,).

    Args:
        logprobs: (members, N), as `ensemble_logprobs` returns.

    Raises:
        InputError: for fewer than 2 members, or NaN log-probabilities.
    """
    table = _members(logprobs)
    return math.log(len(table)) - np.logaddexp.reduce(table, axis=0)


def ensemble_disagreement(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Return how far the members disagree about each answer, in nats: (N,), 0 where all give it the same probability.

    It is the logarithm of their mean probability less the mean of its logarithms, as in the mutual information of
    ensembles, to distinguish missing knowledge from undecided questions (Malinin and Gales 2021, arXiv:2002.07650).
    """
    return np.maximum(-ensemble_mean(logprobs) - _members(logprobs).mean(0), 0.0)


def _members(logprobs: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    lengths = [len(each) for each in logprobs]
    if len(lengths) < 2 or any(one != other for one, other in pairwise(lengths)):
        raise InputError(f"an ensemble needs at least 2 members with as many answers each, got {lengths}")
    table = np.array([list(each) for each in logprobs], dtype=np.float64)
    if np.isnan(table).any():
        member, row = (int(index[0]) + 1 for index in np.nonzero(np.isnan(table)))
        raise InputError(f"the log-probability of answer {row} under member {member} is NaN")
    return table


def _checked(rows: Sequence[Answered], fewest: int, needs_logprobs: bool = True) -> Sequence[Answered]:
    for number, row in enumerate(rows, 1):
        if len(row.samples) < fewest:
            measured = "an entropy" if fewest > 1 else "self-consistency"
            raise InputError(f"row {number} has {len(row.samples)} samples; {measured} needs at least {fewest}")
        for index, answer in enumerate((row.given, *row.samples) if needs_logprobs else ()):
            of_row, what = f"row {number}:", f"sample {index}" if index else "the given answer"
            refuse_if(not answer.token_logprobs, f"{of_row} {what} has no token")
            if not math.isfinite(answer.logprob):
                raise InputError(f"{of_row} the log-probability of {what} is {answer.logprob}; expected a number")
            # Rounding may give a little more than 0.
            if (most := max(answer.token_logprobs)) > 1e-3:
                raise InputError(f"{of_row} a token of {what} has the log-probability {most:g}; expected at most 0")
    return rows


def _with_meanings(
    rows: Sequence[Answered], meanings: Meanings | None, fewest: int, needs_logprobs: bool = False
) -> list[tuple[Answered, list[Hashable]]]:
    _checked(rows, fewest, needs_logprobs)
    labels = [list(each) for each in (meanings_of(rows) if meanings is None else meanings)]
    refuse_if(len(labels) != len(rows), f"there are meanings of {len(labels)} rows and {len(rows)} rows")
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
    # In any order of the meanings the same to the last bit, to keep ties.
    return max(math.fsum(-share * math.log(share) for share in shares.tolist() if share > 0), 0.0)


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return math.fsum(listed) / len(listed)


# ---- meanings ----
#
# Which answers mean the same: by their normalized words, by a function of the user's, or by an entailment model.


Same = Callable[[str, str], bool]


def meanings_of(rows: Sequence[Answered], same: "Same | EntailmentModel | None" = None) -> list[list[int]]:
    """Return a number for the meaning of each answer of a row: first of the given one, then of the samples.

    Answers are compared with the first of each meaning so far, in their order (Kuhn et al. 2023, arXiv:2302.09664,
    algorithm 1). Empty answers are a meaning of their own. To label meanings yourself, such as by the decisive word,
    pass the measures a list of any labels per row instead.

    Args:
        rows: prompts with their answers.
        same: `(answer, answer) -> bool`, or an entailment model: it reads answers after their prompt and must find
            each to follow from the other. By default normalized words must be equal.
    """
    texts = [[row.given.text, *(sample.text for sample in row.samples)] for row in rows]
    if same is None:
        return [
            _numbered([normalized(text) for text in answers], lambda one, other: one == other) for answers in texts
        ]
    if hasattr(same, "in_both_directions"):
        prompts = [last_words(row.prompt) for row in rows]
        kinds = [list(dict.fromkeys(text for text in answers if text.strip())) for answers in texts]
        pairs = [
            (row, one, other)
            for row, answers in enumerate(kinds)
            for index, one in enumerate(answers)
            for other in answers[index + 1 :]
        ]
        result = same.in_both_directions(
            [f"{prompts[row]} {one}".strip() for row, one, _ in pairs],
            [f"{prompts[row]} {other}".strip() for row, _, other in pairs],
        )
        agree = {pair for pair, agrees in zip(pairs, result, strict=True) if agrees}
        return [
            _numbered(answers, lambda one, other, row=row: (row, one, other) in agree or (row, other, one) in agree)
            for row, answers in enumerate(texts)
        ]
    return [_numbered(answers, same) for answers in texts]


def _numbered(texts: Sequence[str], same: Same) -> list[int]:
    firsts: list[str] = []
    numbers: dict[str, int] = {}
    for text in texts:
        key = text if text.strip() else ""
        if key in numbers:
            continue
        alike = (numbers[first] for first in firsts if first and key and bool(same(first, key)))
        numbers[key] = next(alike, len(firsts))
        if numbers[key] == len(firsts):
            firsts.append(key)
    return [numbers[text if text.strip() else ""] for text in texts]


def last_words(prompt: Prompt) -> str:
    """Return the question of a prompt: of a conversation its last turn."""
    content = as_messages(prompt)[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


# ---- asking ----
#
# Ask a language model whether something is true: P(True) of an answer, and whether a passage supports a claim.


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
        both_orders: ask with the options in both orders and average, so a preference for a letter cancels out.
        letters: the two replies, different in exactly one token.
        batch_size: questions in one pass.

    Raises:
        InputError: for indistinguishable letters, a tokenizer without padding token, a question longer than the
            model's context, and non-finite logits.
    """
    check_padding(tokenizer)
    if not questions:
        return []
    # A transcript ends with a colon.
    tokens = letter_tokens(tokenizer, letters, "" if tokenizer.chat_template else " ")
    orders = (options, options[::-1]) if both_orders else (options,)
    full_questions = [
        "\n".join([question, *(f"{letter} {option}" for letter, option in zip(letters, order, strict=True))])
        for question in questions
        for order in orders
    ]
    # Each text once: the same claim stands in many answers.
    texts = list(dict.fromkeys(full_questions))
    prompts = [to_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    ids = [[*each, *tokens.before] for each in tokenize_prompts(prompts, tokenizer)]
    context = max_length_of(model.config)
    for text, each in zip(texts, ids, strict=True):
        if context is not None and len(each) >= context:
            number = full_questions.index(text) // len(orders) + 1
            raise InputError(f"question {number} takes {len(each)} tokens, and the model's context has {context}")
    odds = reply_log_odds(model, tokenizer, ids, tokens.first, tokens.second, batch_size)
    if not np.isfinite(odds).all():
        raise InputError("the model's logits are not finite: its weights may be damaged, or the precision too low")
    by_text = dict(zip(texts, odds, strict=True))
    count = len(orders)
    return [
        sum(by_text[text] * (-1) ** index for index, text in enumerate(full_questions[first : first + count])) / count
        for first in range(0, len(full_questions), count)
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
    """Return the uncertainty 1 - P(True) of the given answers, in [0, 1]: (N,).

    The model reads its own answer, with its samples as brainstormed ideas, and is asked whether it is true or false
    (Kadavath et al. 2022, arXiv:2207.05221, section 3). Small models, and models without training on such questions,
    know little of it.

    Args:
        rows: prompts with their answers.
        show_samples: whether the samples stand before the answer.
        both_orders, letters, batch_size: see `log_odds`.
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
        refuse_if(not questions, "questions: at least one wording is needed")
        self.model, self.tokenizer, self.questions = model, tokenizer, tuple(questions)
        self.letters, self.batch_size = letters, batch_size

    def __call__(self, claims: Sequence[str], passages: Sequence[str]) -> list[float]:
        """Return for each claim the probability of support by its passage, by the mean log-odds."""
        # A passage must not answer with its own turn.
        plain = plain_text(self.tokenizer)
        # Not by str.format: a text may hold braces of its own.
        prompts = [
            _filled(question, plain(passage), plain(claim))
            for claim, passage in zip(claims, passages, strict=True)
            for question in self.questions
        ]
        odds = log_odds(
            self.model, self.tokenizer, prompts, ("Yes", "No"), letters=self.letters, batch_size=self.batch_size
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

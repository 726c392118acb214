"""Answers with their log-probabilities: sampled from a model, or any text scored by one.

Log-probabilities are those of the model itself, at temperature 1 and without its generation config's penalties, of all
tokens of an answer, its end token too.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.errors import InputError
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import batches_of_like_length, evaluating, pass_precision

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list
NOT_FINITE = "the model's logits are not finite: its weights may be damaged, or the precision too low"


@dataclass(frozen=True)
class ScoredAnswer:
    """A text and the log-probability of each of its tokens.

    Args:
        text: without special tokens.
        token_logprobs: in nats.
        token_ids: the same tokens; may be left out.
        has_ended: whether it ended by itself, or was cut off.
    """

    text: str
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...] = ()
    has_ended: bool = True

    @property
    def logprob(self) -> float:
        """Return the log-probability of the whole answer, in nats."""
        return math.fsum(self.token_logprobs)

    @property
    def mean_logprob(self) -> float:
        """Return the mean log-probability of its tokens, in nats: normalized by length."""
        return self.logprob / len(self.token_logprobs)


@dataclass(frozen=True)
class Answered:
    """A prompt with the answer that was given, and others that were sampled to see how sure the model is.

    Args:
        prompt: text or messages.
        given: the answer that is right or wrong, such as the greedy one.
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
    """Answer each prompt greedily, and sample `n` more answers; see `sample_with_scores`."""
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
    given = sample_with_scores(model, tokenizer, prompts, 1, do_sample=False, **options)
    samples = sample_with_scores(model, tokenizer, prompts, n, **options)
    return [
        Answered(prompt, first, tuple(others))
        for prompt, (first,), others in zip(prompts, given, samples, strict=True)
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
    """Sample `n` answers to each prompt with the log-probabilities of their tokens, or decode greedily.

    The chance of each answer comes from the seed, its prompt's place and its number alone, so that any `batch_size`
    gives the same answers, up to the rounding of the model's logits. Nothing changes the caller's random state. The
    model may be an adapter's, in any precision.

    Args:
        prompts: texts, or lists of messages for the tokenizer's chat template.
        n: answers per prompt; 1 without `do_sample`.
        temperature: of the sampling; the log-probabilities are those at 1. Entropies need samples at 1.
        batch_size: answers that are written together; a device's memory may allow fewer.

    Returns:
        One list of `n` answers per prompt.

    Raises:
        InputError: for a bad argument, a prompt without tokens or without room for an answer in the model's context,
            an encoder-decoder model, or logits that are not finite.
    """
    _check(model, n, max_new_tokens, do_sample, temperature, batch_size)
    ids = prompt_tokens(model, tokenizer, prompts, max_new_tokens)
    rows = [(place, number) for place in range(len(ids)) for number in range(n)]
    ends, answers = sorted(end_tokens(tokenizer, model)), {}
    with _plainly(model):
        for batch in batches_of_like_length(model, [len(ids[place]) for place, _ in rows], batch_size):
            keys = [f"{seed}-{rows[row][0]}-{rows[row][1]}" for row in batch]
            drawn = [_chances(key, max_new_tokens) for key in keys] if do_sample else None
            tokens, logprobs = _generate(
                model, [ids[rows[row][0]] for row in batch], drawn, temperature, max_new_tokens, ends, _pad(tokenizer)
            )
            for row, said, numbers in zip(batch, tokens, logprobs, strict=True):
                length = next((place + 1 for place, token in enumerate(said) if token in ends), len(said))
                text = tokenizer.decode(said[:length], skip_special_tokens=True)
                has_ended = said[length - 1] in ends
                answers[rows[row]] = ScoredAnswer(text, tuple(numbers[:length]), tuple(said[:length]), has_ended)
    return [[answers[place, number] for number in range(n)] for place in range(len(ids))]


def sampling_cost(rows: Sequence[Answered]) -> dict[str, float]:
    """Return what the samples cost beside the answers, in tokens that the model wrote.

    Returns:
        Per prompt `given_tokens` and `sampled_tokens`, and `times_as_many`: all of them over those of given answers.

    Raises:
        InputError: for no rows, or answers without tokens.
    """
    if not rows:
        raise InputError("the cost of sampling: there are no answers")
    given = sum(len(row.given.token_logprobs) for row in rows) / len(rows)
    if not given:
        raise InputError("the cost of sampling: the answers have no token")
    sampled = sum(len(sample.token_logprobs) for row in rows for sample in row.samples) / len(rows)
    return {"given_tokens": given, "sampled_tokens": sampled, "times_as_many": (given + sampled) / given}


def _check(
    model: "PreTrainedModel", n: int, max_new_tokens: int, do_sample: bool, temperature: float, batch_size: int
) -> None:
    for name, number in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(number, Integral):
            raise InputError(f"{name} must be a whole number, got {number!r:.40}")
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    if not do_sample and n != 1:
        raise InputError(f"n must be 1 without do_sample, got {n}: greedy answers are all the same")
    if not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise InputError(f"temperature must be above 0, got {temperature!r:.40}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError("the model is an encoder and a decoder; expected a causal language model")


def prompt_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int = 0,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    Raises:
        InputError: for a prompt without tokens, or without room for `max_new_tokens` more in the model's context, and
            for a tokenizer with tokens that the model has no embeddings for.
    """
    from hfllm.models.loading.saved import check_vocabulary

    check_vocabulary(model, tokenizer)
    if isinstance(prompts, str):
        raise InputError(f"prompts must be a list, got the text {prompts!r:.60}")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, (str, list)) or prompt == []:
            raise InputError(f"prompt {number} must be a text or a list of messages, got {prompt!r:.60}")
        if isinstance(prompt, str) and not prompt.isascii() and prompt.encode(errors="ignore").decode() != prompt:
            raise InputError(f"prompt {number} has half a character (a lone surrogate): {prompt!r:.60}")
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            raise InputError(f"prompt {number} is a {type(prompt).__name__} and the first is not: expected one kind")
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise InputError(f"prompt {number} is a conversation, and the tokenizer has no chat template: give texts")
    ids = tokenize_prompts(prompts, tokenizer) if len(prompts) else []
    context = max_length_of(model.config)
    for number, tokens in enumerate(ids, 1):
        if not tokens:
            raise InputError(f"prompt {number} has no token")
        if context is not None and len(tokens) + max_new_tokens > context:
            more = f" and leaves no room for {max_new_tokens} of an answer" if max_new_tokens else ""
            raise InputError(f"prompt {number} has {len(tokens)} tokens{more}: the model's context has {context}")
    return ids


def _chances(key: str, count: int) -> list[float]:
    draw = random.Random(f"answer-{key}")
    return [draw.random() for _ in range(count)]


def _pad(tokenizer: "PreTrainedTokenizerBase") -> int:
    # What padding is does not count: it is masked.
    return next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)


def _generate(
    model: "PreTrainedModel",
    prompts: Sequence[list[int]],
    chances: Sequence[list[float]] | None,
    temperature: float,
    max_new_tokens: int,
    ends: list[int],
    pad: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the tokens after each prompt and their log-probabilities, unspecified after the end."""
    import torch
    from transformers import LogitsProcessorList

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(each)) + each for each in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=model.device)
    record = _drawing(chances, temperature)
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


def _drawing(chances: Sequence[list[float]] | None, temperature: float) -> "LogitsProcessor":
    """Return a logits processor that chooses each row's token by its own chance, and notes its log-probability.

    Generation takes the token of the highest logit, so that all others are set to minus infinity.
    """
    import torch
    from transformers import LogitsProcessor

    class Draw(LogitsProcessor):
        def __init__(self):
            self.logprobs: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # Probabilities of large vocabularies add up in 64 bits, which Apple's GPUs do not have.
            wide = torch.float32 if scores.device.type == "mps" else torch.float64
            own = scores.to(wide).log_softmax(-1)
            if not bool(own.amax(-1).isfinite().all()):
                raise InputError(NOT_FINITE)
            if chances is None:
                token = scores.argmax(-1, keepdim=True)
            else:
                column = torch.tensor([row[len(self.logprobs)] for row in chances], dtype=wide, device=scores.device)
                reached = (own / temperature).softmax(-1).cumsum(-1)
                # The first token whose sum is above the chance: one of probability 0 is never it.
                token = torch.searchsorted(reached, column[:, None] * reached[:, -1:], right=True)
                token = token.clamp(max=scores.shape[-1] - 1)
            self.logprobs.append(own.gather(-1, token)[:, 0])
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

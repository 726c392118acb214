"""Log-likelihoods of continuations and rewards of rows, with shared parts computed once.

The choices of a question share all of its text, and the questions of a file often share worked examples. A model's
key-value cache holds the text read so far, so only the choices themselves are read again. The numbers equal the
results of reading whole texts, to rounding, and do not depend on the number of rows in a pass: passes never mix
questions, and rows are padded on the right, invisible to earlier tokens.

`Scorer` compares the choices of a question, for suites; `score_answers` scores written answers.
"""

import copy
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hfllm.data.tokenizer import tokenize_prompts, turn_end
from hfllm.errors import InputError, check_positive, is_out_of_memory, refuse_if
from hfllm.models.devices import most_logits, most_tokens
from hfllm.models.family.configuration_fields_hfllm import longrope_limits
from hfllm.models.loading.saved import check_vocabulary, max_length_of
from hfllm.outputs.progress import progress

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache


# ---- likelihoods ----


# A pass of its own for fewer tokens costs more than it saves.
FEWEST_SHARED = 8
# How far log-probabilities read in two parts may differ from a reading of the whole, in nats, before the whole is
# read.
SAME, SAME_ROUNDED = 1e-3, 0.1
NOT_NUMBERS = "the model's logits are not numbers; its weights may be damaged, or overflow"


class Pair(NamedTuple):
    """Token ids of a text and of its continuation."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """How likely a model finds a continuation.

    Args:
        logprob: natural logarithm of its probability, all tokens together.
        num_tokens: how many they are.
        is_greedy: whether all of them are the most likely ones.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def encode_pair(tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str) -> Pair:
    """Return the tokens of a text and its continuation, cut where lm-evaluation-harness cuts.

    White space at the end of the context belongs to the continuation, and the continuation's tokens are the tokens of
    the whole text beyond the number of the context's.

    Raises:
        InputError: for a continuation without a token, or no context and no beginning-of-text token.
    """
    trimmed = context.rstrip()
    whole = list(tokenizer(context + continuation)["input_ids"])
    before = list(tokenizer(trimmed)["input_ids"])
    after = whole[len(before) :]
    if not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        refuse_if(start is None, "a continuation of nothing: the tokenizer has no token that begins a text")
        before = [start]
    refuse_if(not after, f"the continuation {continuation!r:.60} adds no token to {context[-40:]!r}")
    return Pair(before, after)


class Scorer:
    """Scores continuations under a causal model.

    Args:
        model: native, of the family, with an adapter, or quantized; in any precision.
        batch_size: rows in one pass.
    """

    def __init__(self, model: "PreTrainedModel", batch_size: int = 8):
        check_positive(batch_size=batch_size)
        self.model, self.batch_size = model, batch_size
        takes = forward_parameters(model)
        self._keeps_logits = "logits_to_keep" in takes
        # Where the rotation of a whole text changes with its length.
        self._limits = longrope_limits(model.config.get_text_config(decoder=True))
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in takes), None)
        self._can_share: bool | None = None if self._cache_name else False
        self._shared: tuple[list[int], Cache] | None = None

    @property
    def can_share(self) -> bool:
        """Whether the model reads a text in two parts as it reads it whole; tried once, on a few tokens.

        Recurrent layers often do not continue from more than a token, nor do adapters of virtual tokens.
        """
        if self._can_share is None:
            self._can_share = self._reads_in_parts()
        return self._can_share

    def score(
        self, items: Sequence[Sequence[Pair]], shared: Sequence[int] = (), names: Sequence[str] | None = None
    ) -> Iterator[list[Likelihood] | None]:
        """Yield for each item the likelihoods of its continuations; `None` for one too long for the context.

        Args:
            items: the pairs of each, most useful where their contexts are the same.
            shared: common first tokens of all contexts, such as of worked examples; read once, and not again by the
                next call with the same. An item with another beginning is read by itself.
            names: of the items, for errors.

        Raises:
            InputError: for NaN logits, naming the item.
        """
        longest = max_length_of(self.model.config)
        for index, pairs in enumerate(items):
            # The last token is only predicted.
            if longest is not None and max(len(each.context) + len(each.continuation) - 1 for each in pairs) > longest:
                yield None
                continue
            name = f"item {index + 1}" if names is None else names[index]
            yield self._score_item(pairs, list(shared), name)

    def _score_item(self, pairs: Sequence[Pair], shared: list[int], name: str) -> list[Likelihood]:
        import torch

        read = [[*each.context, *each.continuation[:-1]] for each in pairs]
        result: dict[int, Likelihood] = {}
        kinds = [self._rotation(len(each)) for each in read]
        with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
            # A pass rotates all of its rows as the longest one.
            for kind in sorted(set(kinds)):
                alike = [row for row, its_kind in enumerate(kinds) if its_kind == kind]
                common, cache = self._read_common([pairs[row] for row in alike], [read[row] for row in alike], shared)
                for start in range(0, len(alike), self.batch_size):
                    rows = alike[start : start + self.batch_size]
                    of_pass = [pairs[row] for row in rows], [read[row] for row in rows]
                    result.update(zip(rows, self._score_rows(*of_pass, common, cache, name), strict=True))
        return [result[row] for row in range(len(pairs))]

    def _rotation(self, length: int) -> int:
        """Return the kind of rotary factors for a text of so many tokens: a cache serves only texts of one kind."""
        return sum(length > limit for limit in self._limits)

    def _read_common(
        self, pairs: Sequence[Pair], read: list[list[int]], shared: list[int]
    ) -> "tuple[int, Cache | None]":
        """Return how many tokens of all rows are in the cache, and the cache; the rows' `_rotation` is one."""
        if not self.can_share:
            return 0, None
        # The last token of a context predicts the first of its continuation, and is read with it.
        most = min(len(each.context) for each in pairs) - 1
        common = common_length([each[:most] for each in read])
        first, cache, kind = 0, None, self._rotation(len(read[0]))
        is_same = common >= len(shared) and read[0][: len(shared)] == shared
        if shared and is_same and self._rotation(len(shared)) == kind:
            first, cache = len(shared), self._read_shared(shared)
        if len(pairs) == 1 or common - first < FEWEST_SHARED or self._rotation(common) != kind:
            return first, cache
        return common, self._read(read[0][first:common], cache)

    def _read_shared(self, shared: list[int]) -> "Cache":
        if self._shared is None or self._shared[0] != shared:
            self._shared = shared, self._read(shared, None)
        return self._shared[1]

    def _read(self, tokens: list[int], cache: "Cache | None") -> "Cache":
        """Return a cache of these tokens after another cache's, which stays unchanged."""
        import torch

        before = {} if cache is None else {self._cache_name: copy_of(cache)}
        ids = torch.tensor([tokens], device=self.model.device)
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        output = self.model(input_ids=ids, use_cache=True, **before, **keep)
        return output[self._cache_name] if self._cache_name in output else output["past_key_values"]

    def _score_rows(
        self, pairs: Sequence[Pair], read: list[list[int]], common: int, cache: "Cache | None", name: str
    ) -> list[Likelihood]:
        ids, mask = padded_batch([each[common:] for each in read], self.model.device, common)
        before = {}
        if cache is not None:
            before[self._cache_name] = copy_of(cache)
            before[self._cache_name].batch_repeat_interleave(len(read))
        # The head is applied from where the first continuation is predicted.
        first = min(len(each.context) for each in pairs) - 1 - common
        keep = {"logits_to_keep": ids.shape[1] - first} if self._keeps_logits else {}
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **before, **keep)
        logits = output.logits if self._keeps_logits else output.logits[:, first:]
        return [
            _likelihood(logits[row, len(pair.context) - 1 - common - first :], pair.continuation, name)
            for row, pair in enumerate(pairs)
        ]

    def _reads_in_parts(self) -> bool:
        """Return whether two parts of a text give the same result as the whole."""
        import torch

        size = min(self.model.config.get_text_config(decoder=True).vocab_size, 1000)
        ids = [(7 * index + 3) % size for index in range(24)]
        pair = Pair(ids[:13], ids[13:])
        read = [*pair.context, *pair.continuation[:-1]]
        with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
            try:
                (whole,) = self._score_rows([pair], [read], 0, None, "a trial")
                cache = self._read(read[:9], None)
                parts = self._score_rows([pair] * 2, [read] * 2, 9, cache, "a trial")
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                if is_out_of_memory(error):
                    raise
                return False
        is_exact = self.model.dtype == torch.float32 and not getattr(self.model, "is_quantized", False)
        limit = SAME if is_exact else SAME_ROUNDED
        return all(abs(each.logprob - whole.logprob) < limit for each in parts)


def _likelihood(logits: "torch.Tensor", continuation: Sequence[int], name: str) -> Likelihood:
    """Return the likelihood of a continuation.

    Args:
        logits: from the prediction of its first token on, (at least its length, vocabulary).
    """
    import torch

    targets = torch.tensor(continuation, device=logits.device)
    numbers = logits[: len(continuation)].float().log_softmax(-1)
    logprobs = numbers.gather(-1, targets[:, None])[:, 0]
    refuse_if(bool(logprobs.isnan().any()), f"{name}: {NOT_NUMBERS}")
    is_greedy = bool((numbers.argmax(-1) == targets).all())
    # Summed in 64 bits, unsupported by Apple's GPUs.
    return Likelihood(float(sum(logprobs.tolist())), len(continuation), is_greedy)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with."""
    shortest = min(map(len, rows))
    first = rows[0]
    return next((index for index in range(shortest) if any(row[index] != first[index] for row in rows[1:])), shortest)


def copy_of(cache: "Cache") -> "Cache":
    """Return a cache able to grow without changing another; the tensors of append-only layers are shared."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    grows = {DynamicLayer, DynamicSlidingWindowLayer}
    if not all(type(layer) in grows for layer in getattr(cache, "layers", [None])):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


# ---- passes ----
#
# Passes without gradients over sequences of different lengths: their grouping, their precision, and replies.


def batches_of_tokens(model: "PreTrainedModel", lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield rows from short to long in batches of at most `batch_tokens` tokens, padding included.

    Args:
        lengths: tokens of the rows.
        batch_tokens: most tokens in one pass; fewer where their logits would fill a GPU.
    """
    limit = min(batch_tokens, most_logits(model, model.device) or batch_tokens)
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[row] > limit:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def batches_of_like_length(model: "PreTrainedModel", lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield rows of similar length: on a CPU one more short pass costs less than padding.

    Args:
        lengths: tokens of the rows.
        batch_size: most rows in one pass; a device's memory may allow fewer.
    """
    most_padding = 8 if model.device.type == "cpu" else 256
    limit = most_tokens(model, model.device)
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        is_full = rows and limit is not None and (len(rows) + 1) * lengths[rows[0]] > limit
        if rows and (is_full or len(rows) == batch_size or lengths[rows[0]] - lengths[row] >= most_padding):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def pass_precision(model: "PreTrainedModel") -> "AbstractContextManager":
    """Return the context of a forward pass: flash attention takes no fp32, and nothing else is changed."""
    import torch

    needs_16_bits = "flash" in (model.config._attn_implementation or "") and model.dtype == torch.float32
    return torch.autocast(model.device.type, torch.bfloat16) if needs_16_bits else nullcontext()


def forward_parameters(model: "PreTrainedModel") -> Collection[str]:
    """Return the names of the arguments of a model's forward pass, also of one with an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def padded_batch(
    rows: Sequence[Sequence[int]], device: "torch.device", common: int = 0
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return rows of tokens as a batch and its attention mask; padding on the right is invisible to earlier tokens.

    Args:
        common: number of tokens before all of them, in a cache.
    """
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=device)
    mask = [[1] * (common + len(row)) + [0] * (longest - len(row)) for row in rows]
    return ids, torch.tensor(mask, device=device)


@contextmanager
def evaluating(model: "PreTrainedModel") -> Iterator[None]:
    """Put a model into evaluation mode, and back: it may be in training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def reply_log_odds(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Sequence[int]],
    first: int,
    second: int,
    batch_size: int,
) -> list[float]:
    """Return log P(first) - log P(second) of the token after every question, in nats.

    Args:
        questions: token ids, up to where the two replies differ.
        first, second: their different tokens, see `hfllm.rewards.judges.letter_tokens`.
        batch_size: questions in one pass.
    """
    import torch

    keeps_logits = "logits_to_keep" in forward_parameters(model)
    replies = [0.0] * len(questions)
    with evaluating(model), torch.inference_mode(), pass_precision(model):
        for rows in batches_of_like_length(model, [len(ids) for ids in questions], batch_size):
            padded = tokenizer.pad(
                {"input_ids": [list(questions[row]) for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(model.device)
            batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
            last = batch["attention_mask"].sum(1) - 1
            # The head is applied where a row ends, and nowhere else.
            indices, column = last.unique(return_inverse=True)
            keep = {"logits_to_keep": indices} if keeps_logits else {}
            logits = model(**batch, use_cache=False, **keep).logits
            logits = logits[torch.arange(len(rows), device=logits.device), column if keeps_logits else last]
            odds = logits[:, first].float() - logits[:, second].float()
            for row, value in zip(rows, odds.tolist(), strict=True):
                replies[row] = value
    return replies


# ---- positions ----
#
# How well a model predicts text at every distance from its beginning: its use of a long context.


# Tokens of one forward pass, whose logits are in memory at once.
BATCH_TOKENS = 4096


def nats_by_position(
    model: "PreTrainedModel", rows: Sequence[Sequence[int]], window: int | None = None, kept: int = 0
) -> "torch.Tensor":
    """Return minus the log-probability of all tokens but the first, (rows, length - 1), in nats.

    Args:
        rows: tokens, all rows of the same length.
        window: the most tokens read at once, at least 2; a token then has between half as many and as many before it,
            where there are any. `None` reads whole rows.
        kept: first tokens of a row repeated at the beginning of all its windows, such as a beginning-of-text token.
    """
    import torch

    ids = torch.tensor([list(row) for row in rows], device=model.device)
    length = ids.shape[1]
    window, result = length if window is None else min(window, length), []
    with evaluating(model), torch.inference_mode():
        for begin, end, new in progress(_windows(length, window)):
            inputs = torch.cat([ids[:, :kept], ids[:, begin + kept : end]], dim=1)
            parts = inputs.split(max(1, BATCH_TOKENS // (end - begin)))
            nats = [
                token_nats(model(input_ids=part, use_cache=False).logits[:, :-1], part[:, 1:]).cpu() for part in parts
            ]
            result.append(torch.cat([each[:, new - begin :] for each in nats]))
    return torch.cat(result, dim=1)


def _windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return the windows' first and last positions, and the position of the first token not predicted before."""
    indices, new = [(0, window, 0)], window
    while new < length:
        end = min(new + window // 2, length)
        indices.append((end - window, end, new - 1))
        new = end
    return indices


def token_nats(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """Return minus the log-probabilities of tokens (B, S) under logits (B, S, V), in nats; 0 at targets of -100."""
    from torch.nn.functional import cross_entropy

    # Not kept beside their copy in 32 bits: logits fill the memory.
    logits = logits.float().flatten(0, 1)
    return cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def bytes_of(rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", first: int, last: int) -> list[int]:
    """Return the UTF-8 bytes of the tokens from `first` to before `last` of all rows, special ones left out."""
    texts = tokenizer.batch_decode([list(row[first:last]) for row in rows], skip_special_tokens=True)
    return [max(1, len(text.encode())) for text in texts]


def edges_of(original: int, length: int) -> list[int]:
    """Return the borders of the figures' ranges: they double, and `original` is one of them."""
    edges, index = [length], original
    while index < length:
        edges.append(index)
        index *= 2
    edges += [original // share for share in (2, 4) if original // share > 1]
    return sorted({1, *edges})


def bits_by_range(
    nats: "torch.Tensor", rows: Sequence[Sequence[int]], tokenizer: "PreTrainedTokenizerBase", first: int, last: int
) -> list[float]:
    """Return the bits per byte of the rows' tokens from `first` (at least 1) to before `last`.

    Args:
        nats: (rows, length - 1), of `nats_by_position`.
    """
    sums = nats[:, first - 1 : last - 1].double().sum(1).tolist()
    sizes = bytes_of(rows, tokenizer, first, last)
    return [total / math.log(2) / size for total, size in zip(sums, sizes, strict=True)]


# ---- answers and their probabilities ----


Prompt = str | list
NOT_FINITE = "the model's logits are not finite: its weights may be damaged, or the precision too low"


@dataclass(frozen=True)
class ScoredAnswer:
    """A text and the log-probabilities of its tokens.

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


def prompt_tokens(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int = 0,
) -> list[list[int]]:
    """Return the token ids of the prompts.

    Raises:
        InputError: for a prompt without tokens, or without room for `max_new_tokens` more in the model's context, and
            for a tokenizer with tokens without embeddings in the model.
    """
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
        refuse_if(not tokens, f"prompt {number} has no token")
        if context is not None and len(tokens) + max_new_tokens > context:
            more = f" and leaves no room for {max_new_tokens} of an answer" if max_new_tokens else ""
            raise InputError(f"prompt {number} has {len(tokens)} tokens{more}: the model's context has {context}")
    return ids


# ---- scoring ----
#
# The log-probability of answers under a model, such as another member of an ensemble.


def score_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[str | ScoredAnswer],
    batch_size: int = 16,
) -> list[ScoredAnswer]:
    """Score answers after their prompts by a model, such as another member of an ensemble, in one pass.

    Args:
        answers: texts, ending as a turn does; or scored answers, with their `token_ids` used unchanged. Scored answers
            need a model with the same tokenizer, texts do not.
        batch_size: answers in one pass.

    Raises:
        InputError: for an answer or a prompt without tokens, one longer than the model's context, and non-finite
            logits.
    """
    import torch

    if len(prompts) != len(answers):
        raise InputError(f"there are {len(prompts)} prompts and {len(answers)} answers: expected one of each per row")
    before = prompt_tokens(model, tokenizer, prompts)
    after = [_answer_tokens(tokenizer, answer) for answer in answers]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(before, after, strict=True)]
    context = max_length_of(model.config)
    for row, (answer, size) in enumerate(zip(after, lengths, strict=True), 1):
        refuse_if(not answer, f"answer {row} has no token")
        if context is not None and size > context:
            raise InputError(f"row {row} takes {size} tokens with its answer, and the model's context has {context}")
    scored: list[tuple[float, ...]] = [()] * len(after)
    with evaluating(model), torch.inference_mode(), pass_precision(model):
        for rows in batches_of_like_length(model, lengths, batch_size):
            result = _teacher_forced(model, [before[row] for row in rows], [after[row] for row in rows])
            for row, numbers in zip(rows, result, strict=True):
                scored[row] = tuple(numbers)
    return [
        ScoredAnswer(answer.text if isinstance(answer, ScoredAnswer) else answer, numbers, tuple(tokens))
        for answer, numbers, tokens in zip(answers, scored, after, strict=True)
    ]


def _answer_tokens(tokenizer: "PreTrainedTokenizerBase", answer: str | ScoredAnswer) -> list[int]:
    if isinstance(answer, ScoredAnswer):
        return list(answer.token_ids)
    end = turn_end(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]


def _teacher_forced(
    model: "PreTrainedModel", before: Sequence[list[int]], after: Sequence[list[int]]
) -> list[list[float]]:
    """Return the log-probabilities of the tokens after the prompts."""
    import torch

    ids, mask = padded_batch([[*prompt, *answer] for prompt, answer in zip(before, after, strict=True)], model.device)
    # The head is applied from where the first answer begins, and nowhere before. Positions and not their number: a
    # head with biases rounds the two differently.
    first = min(map(len, before)) - 1
    keeps = "logits_to_keep" in forward_parameters(model)
    keep = {"logits_to_keep": torch.arange(first, ids.shape[1], device=model.device)} if keeps else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    if not keeps:
        logits = logits[:, first:]
    result = []
    for row, (prompt, answer) in enumerate(zip(before, after, strict=True)):
        start = len(prompt) - 1 - first
        numbers = logits[row, start : start + len(answer)].float().log_softmax(-1)
        target = ids[row, len(prompt) : len(prompt) + len(answer)]
        logprobs = numbers.gather(-1, target[:, None])[:, 0]
        refuse_if(bool(logprobs.isnan().any()), NOT_FINITE)
        result.append(logprobs.tolist())
    return result

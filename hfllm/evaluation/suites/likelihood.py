"""Log-likelihoods of continuations, with what they share computed once.

The choices of a question share all of its text, and the questions of a file often share worked examples. A model's
key-value cache holds what it has read, so that only the choices themselves are read again. The numbers are those of
reading each text whole, to rounding, and do not depend on how many rows a pass has: passes never mix questions, and
rows are padded on the right, which no token before sees.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hfllm.errors import InputError, is_out_of_memory
from hfllm.models.family.configuration_fields_hfllm import longrope_limits
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import evaluating, pass_precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

# A pass of its own for fewer tokens costs more than it saves.
FEWEST_SHARED = 8
# How far log-probabilities read in two parts may be from those read whole, in nats, before they are read whole.
SAME, SAME_ROUNDED = 1e-3, 0.1
NOT_NUMBERS = "the model's logits are not numbers; its weights may be damaged, or overflow"


class Pair(NamedTuple):
    """Token ids of a text and of what continues it."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """How likely a model finds a continuation.

    Args:
        logprob: natural logarithm of its probability, all tokens together.
        num_tokens: how many they are.
        is_greedy: whether each of them is the most likely one.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def encode_pair(tokenizer: "PreTrainedTokenizerBase", context: str, continuation: str) -> Pair:
    """Return the tokens of a text and its continuation, cut where lm-evaluation-harness cuts.

    White space at the end of the context belongs to the continuation, and the continuation's tokens are those that
    the whole text has beyond the number of the context's.

    Raises:
        InputError: for a continuation without a token, or no context and no token that begins a text.
    """
    trimmed = context.rstrip()
    whole = list(tokenizer(context + continuation)["input_ids"])
    before = list(tokenizer(trimmed)["input_ids"])
    after = whole[len(before) :]
    if not before:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError("a continuation of nothing: the tokenizer has no token that begins a text")
        before = [start]
    if not after:
        raise InputError(f"the continuation {continuation!r:.60} adds no token to {context[-40:]!r}")
    return Pair(before, after)


class Scorer:
    """Scores continuations under a causal model.

    Args:
        model: native, of the family, with an adapter, or quantized; in any precision.
        batch_size: rows in one pass.
    """

    def __init__(self, model: "PreTrainedModel", batch_size: int = 8):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(base.forward).parameters
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
        """Yield of each item the likelihoods of its continuations; `None` for one that does not fit the context.

        Args:
            items: of each its pairs, most useful where their contexts are the same.
            shared: tokens that all contexts begin with, such as those of worked examples; read once, and not again
                by the next call with the same. An item that begins otherwise is read by itself.
            names: of the items, for errors.

        Raises:
            InputError: for logits that are not numbers, naming the item.
        """
        longest = max_length_of(self.model.config)
        for place, pairs in enumerate(items):
            # The last token is only predicted.
            if longest is not None and max(len(each.context) + len(each.continuation) - 1 for each in pairs) > longest:
                yield None
                continue
            name = f"item {place + 1}" if names is None else names[place]
            yield self._score_item(pairs, list(shared), name)

    def _score_item(self, pairs: Sequence[Pair], shared: list[int], name: str) -> list[Likelihood]:
        import torch

        read = [[*each.context, *each.continuation[:-1]] for each in pairs]
        found: dict[int, Likelihood] = {}
        kinds = [self._rotation(len(each)) for each in read]
        with evaluating(self.model), torch.inference_mode(), pass_precision(self.model):
            # A pass rotates all of its rows as the longest one.
            for kind in sorted(set(kinds)):
                alike = [row for row, its_kind in enumerate(kinds) if its_kind == kind]
                common, cache = self._read_common([pairs[row] for row in alike], [read[row] for row in alike], shared)
                for start in range(0, len(alike), self.batch_size):
                    rows = alike[start : start + self.batch_size]
                    of_pass = [pairs[row] for row in rows], [read[row] for row in rows]
                    found.update(zip(rows, self._score_rows(*of_pass, common, cache, name), strict=True))
        return [found[row] for row in range(len(pairs))]

    def _rotation(self, length: int) -> int:
        """Return which rotary factors a text of so many tokens has: a cache serves only texts that have the same."""
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
        """Return a cache of these tokens after those of another, which stays as it is."""
        import torch

        before = {} if cache is None else {self._cache_name: copy_of(cache)}
        ids = torch.tensor([tokens], device=self.model.device)
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        output = self.model(input_ids=ids, use_cache=True, **before, **keep)
        return output[self._cache_name] if self._cache_name in output else output["past_key_values"]

    def _score_rows(
        self, pairs: Sequence[Pair], read: list[list[int]], common: int, cache: "Cache | None", name: str
    ) -> list[Likelihood]:
        import torch

        tails = [each[common:] for each in read]
        longest = max(map(len, tails))
        device = self.model.device
        ids = torch.tensor([[*each, *[each[-1]] * (longest - len(each))] for each in tails], device=device)
        lengths = [common + len(each) for each in tails]
        mask = torch.tensor([[1] * size + [0] * (common + longest - size) for size in lengths], device=device)
        before = {}
        if cache is not None:
            before[self._cache_name] = copy_of(cache)
            before[self._cache_name].batch_repeat_interleave(len(tails))
        # The head is applied from where the first continuation is predicted.
        first = min(len(each.context) for each in pairs) - 1 - common
        keep = {"logits_to_keep": longest - first} if self._keeps_logits else {}
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **before, **keep)
        logits = output.logits if self._keeps_logits else output.logits[:, first:]
        return [
            _likelihood(logits[row, len(pair.context) - 1 - common - first :], pair.continuation, name)
            for row, pair in enumerate(pairs)
        ]

    def _reads_in_parts(self) -> bool:
        """Return whether two parts of a text give what the whole gives."""
        import torch

        size = min(self.model.config.get_text_config(decoder=True).vocab_size, 1000)
        ids = [(7 * place + 3) % size for place in range(24)]
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
        logits: from the one that predicts its first token, (at least its length, vocabulary).
    """
    import torch

    chosen = torch.tensor(continuation, device=logits.device)
    numbers = logits[: len(continuation)].float().log_softmax(-1)
    logprobs = numbers.gather(-1, chosen[:, None])[:, 0]
    if bool(logprobs.isnan().any()):
        raise InputError(f"{name}: {NOT_NUMBERS}")
    is_greedy = bool((numbers.argmax(-1) == chosen).all())
    # Summed in 64 bits, which Apple's GPUs do not have.
    return Likelihood(float(sum(logprobs.tolist())), len(continuation), is_greedy)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with."""
    shortest = min(map(len, rows))
    first = rows[0]
    return next((place for place in range(shortest) if any(row[place] != first[place] for row in rows[1:])), shortest)


def copy_of(cache: "Cache") -> "Cache":
    """Return a cache that can grow without changing another; the tensors of layers that only grow are shared."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    grows = {DynamicLayer, DynamicSlidingWindowLayer}
    if not all(type(layer) in grows for layer in getattr(cache, "layers", [None])):
        return copy.deepcopy(cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied

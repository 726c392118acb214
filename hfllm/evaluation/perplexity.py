"""Measure how well a language model predicts text, comparable between tokenizers, and baselines to compare it with."""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfllm.errors import InputError, refuse_if
from hfllm.generation.scoring import batches_of_tokens, evaluating, token_nats
from hfllm.outputs.figures import with_error
from hfllm.outputs.intervals import ratio_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Token ids, the number of first tokens serving only as context, and the index of their text.
Window = tuple[list[int], int, int]


@dataclass(frozen=True)
class TextLikelihood:
    """The total negative log-likelihood of texts under a model.

    Args:
        nats: minus the natural logarithm of the texts' probability.
        tokens: number of predicted tokens.
        bytes: bytes of the predicted text, in UTF-8.
        rows: nats, tokens and bytes of each text, for errors over texts.
    """

    nats: float
    tokens: int
    bytes: int
    rows: Sequence[tuple[float, int, int]] = ()

    @property
    def bits_per_byte(self) -> float:
        """Return bits per byte, comparable between tokenizers, n-grams and compressors."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Return the perplexity per token."""
        return math.exp(self.nats / self.tokens)

    def metrics(self) -> dict[str, float]:
        """Return `bits_per_byte` and `perplexity` with their standard errors over texts and the number of texts."""
        nats, tokens, sizes = (list(column) for column in zip(*self.rows, strict=True))
        per_byte, per_token = ratio_error(nats, sizes), ratio_error(nats, tokens)
        bits = None if per_byte is None else per_byte / math.log(2)
        # The perplexity's error is its logarithm's error, times its slope.
        perplexity = None if per_token is None else per_token * self.perplexity
        return {
            "bits_per_byte": self.bits_per_byte,
            **with_error("bits_per_byte", bits, len(nats)),
            "perplexity": self.perplexity,
            **with_error("perplexity", perplexity, len(nats)),
        }


def perplexity_change(before: TextLikelihood, after: TextLikelihood) -> dict[str, float]:
    """Return the metrics of the perplexity of the same texts under two models, see `hfllm.outputs.report`."""
    result = {}
    for side, fit in (("before", before), ("after", after)):
        measured = fit.metrics()
        result[f"perplexity_{side}"] = measured["perplexity"]
        result |= {f"perplexity_{side}_se": measured[key] for key in ("perplexity_se",) if key in measured}
    # By linearization: the contribution of each text to the difference beyond its share.
    sums = [
        after.perplexity * late - before.perplexity * early
        for (early, _, _), (late, _, _) in zip(before.rows, after.rows, strict=True)
    ]
    error = ratio_error(sums, [tokens for _, tokens, _ in after.rows])
    result["perplexity_change"] = after.perplexity - before.perplexity
    return (
        result | with_error("perplexity", None, len(sums)) | ({} if error is None else {"perplexity_change_se": error})
    )


def text_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> TextLikelihood:
    """Predict every token of each text from the tokens before it in the same text.

    The first token follows the document token; if the tokenizer has none, it is not predicted or counted.

    Texts over `max_length` tokens are read in overlapping windows, and every token is counted once, in the first
    window containing it.

    Args:
        max_length: tokens per window, including the document token.
        stride: new tokens per window; by default half of it, so every token of a later window has half a window of
            context.
        batch_tokens: tokens per forward pass, padding included; fewer where their logits would fill a GPU.

    Raises:
        InputError: when there is no text, none has a token to predict, or the stride is not smaller than a window.
    """
    import torch

    stride = max(max_length // 2, 1) if stride is None else stride
    if not 1 <= stride < max_length:
        raise InputError(f"stride={stride} with max_length={max_length}: expected at least 1, and less than a window")
    windows = list(_windows(texts, tokenizer, max_length, stride))
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    with evaluating(model), torch.inference_mode():
        for rows in batches_of_tokens(model, [len(ids) for ids, _, _ in windows], batch_tokens):
            batch = [windows[row] for row in rows]
            width = max(len(ids) for ids, _, _ in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long, device=model.device)
            labels = torch.full_like(ids, -100)
            for row, (window, context_length, _) in enumerate(batch):
                ids[row, : len(window)] = torch.tensor(window)
                labels[row, context_length : len(window)] = ids[row, context_length : len(window)]
            # A causal model does not see padding on the right.
            losses = token_nats(model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:])
            by_row, counts = losses.double().sum(1).tolist(), (labels[:, 1:] != -100).sum(1).tolist()
            for (_, _, text), row_nats, count in zip(batch, by_row, counts, strict=True):
                nats[text] += row_nats
                tokens[text] += count
    refuse_if(not any(tokens), f"{len(texts)} text(s) without a token to predict")
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
    if tokenizer.bos_token_id is None:
        for index, text in enumerate(texts):
            first = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
            sizes[index] -= len(tokenizer.decode(first).encode())
    rows = tuple(row for row in zip(nats, tokens, sizes, strict=True) if row[1])
    return TextLikelihood(sum(nats), sum(tokens), sum(sizes), rows)


def _windows(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, stride: int
) -> Iterator[Window]:
    """Return the windows of texts, with the index of their text."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for text, ids in enumerate(tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        ids, tokens_seen = start + ids, 1
        while tokens_seen < len(ids):
            end = min(len(ids), max_length if tokens_seen == 1 else tokens_seen + stride)
            begin = max(0, end - max_length)
            yield ids[begin:end], tokens_seen - begin, text
            tokens_seen = end


# ---- baselines: gzip, and a byte n-gram model ----
#
# Bits per byte compare models with different tokenizers. All functions here give the cost of a text's bytes, coded as
# UTF-8, lower is better; texts without any bytes are refused (`ValueError`).

# The symbol after a text's last byte, and also before its first one.
END = 256
SYMBOLS = 257
BITS = 9
# As many symbols as an int64 holds.
MAX_ORDER = 63 // BITS
CHUNK = 1 << 19
SMALLEST_DISCOUNT = 0.1


def bits_per_byte(nats_per_token: float, num_tokens: int, num_bytes: int) -> float:
    """Convert a mean loss over tokens to bits per byte.

    Args:
        nats_per_token: the mean cross-entropy, as trainers report it.
        num_tokens: number of predicted tokens in this mean.
        num_bytes: bytes of the same text, as UTF-8.
    """
    _check_bytes(num_bytes)
    return nats_per_token * num_tokens / math.log(2) / num_bytes


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Return the cost of the texts in one gzip file at its best level, one text after the other."""
    packer, packed, num_bytes = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS), 0, 0
    for text in map(_encode, texts):
        packed += len(packer.compress(text))
        num_bytes += len(text)
    _check_bytes(num_bytes)
    return 8 * (packed + len(packer.flush())) / num_bytes


def ngram_bits_per_byte(train_texts: Iterable[str], test_texts: Iterable[str], order: int = 5) -> float:
    """Return the cost of held-out texts under an `NgramModel` of the training texts, without their ends."""
    return NgramModel(train_texts, order).bits_per_byte(test_texts, with_ends=False)


class NgramModel:
    """An n-gram model of bytes with interpolated, modified Kneser-Ney smoothing (Chen and Goodman 1999, section 3).

    The highest order counts occurrences; a lower one counts the different symbols before an n-gram, down to single
    symbols, interpolated with the uniform distribution. All orders have three discounts, computed from the numbers of
    n-grams with counts of 1 to 4 (equation 17). A text is followed by an end symbol and preceded by as many end
    symbols as the order looks back.

    Every order is a sorted array of n-grams, packed with 9 bits per symbol into int64, so training is sorting and a
    look-up is a binary search.

    Args:
        texts: the training texts; a byte takes about 25 bytes of memory at the peak (English, order 5).
        order: symbols of an n-gram, including the predicted one, from 1 to 7.

    Raises:
        ValueError: when `order` is outside this range, or the texts are empty.
    """

    def __init__(self, texts: Iterable[str], order: int = 5):
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order={order}; expected 1 to {MAX_ORDER}")
        self.order = order
        encoded = [_encode(text) for text in texts]
        _check_bytes(sum(map(len, encoded)))
        grams, counts = np.unique(_byte_windows(encoded, order), return_counts=True)
        tables = [_Order(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Every n-gram has a symbol before it, at least an end: the distinct longer ones contain all shorter ones.
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            tables.append(_Order(grams, counts))
        self.tables = tables[::-1]

    def probabilities(self, context: bytes) -> np.ndarray:
        """Return the next symbol's distribution after `context`, a text's start: (257,), the 256 bytes and the end."""
        window = ([END] * (self.order - 1) + list(context))[len(context) :]
        packed = sum(symbol << BITS * index for index, symbol in enumerate(reversed(window), start=1))
        return self._probabilities(np.int64(packed) + np.arange(SYMBOLS, dtype=np.int64))

    def bits_per_byte(self, texts: Iterable[str], with_ends: bool = True) -> float:
        """Return the cost of the texts under the model per byte, with or without the ends of texts."""
        encoded = [_encode(text) for text in texts]
        num_bytes = sum(map(len, encoded))
        _check_bytes(num_bytes)
        windows = _byte_windows(encoded, self.order)
        if not with_ends:
            windows = windows[(windows & _mask(1)) != END]
        parts = (windows[at : at + CHUNK] for at in range(0, len(windows), CHUNK))
        return -float(sum(np.log2(self._probabilities(part)).sum() for part in parts)) / num_bytes

    def _probabilities(self, windows: np.ndarray) -> np.ndarray:
        """Return the probability of a packed window's last symbol given its earlier ones: (N,) to (N,)."""
        probabilities = np.full(len(windows), 1 / SYMBOLS)
        for length, table in enumerate(self.tables, start=1):
            probabilities = table.interpolate(windows & _mask(length), probabilities)
        return probabilities


class _Order:
    """The n-grams of one length: their probabilities, and the mass left by each context to shorter ones.

    Args:
        grams: (N,) packed, sorted and distinct.
        counts: (N,) positive.
    """

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        contexts = grams >> BITS
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, starts)
        owners = np.repeat(totals, np.diff(starts, append=len(grams)))
        self.grams, self.contexts = grams, contexts[starts]
        self.shares = (counts - discounts) / owners
        self.left_over = np.add.reduceat(discounts, starts) / totals

    def interpolate(self, windows: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Return this order's probabilities from the next shorter one's, (N,); unseen contexts keep them."""
        left_over = _look_up(self.contexts, self.left_over, windows >> BITS, missing=1.0)
        return _look_up(self.grams, self.shares, windows, missing=0.0) + left_over * shorter


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts of counts 0, 1, 2 and of 3 or more: (4,)."""
    counts_of_counts = [int((counts == count).sum()) for count in range(1, 5)]
    # A text too small or too regular to have any n-gram once gives no estimate: half a count is usual.
    base = counts_of_counts[0] / (counts_of_counts[0] + 2 * counts_of_counts[1]) if counts_of_counts[0] else 0.5
    discounts = [0.0]
    for count in (1, 2, 3):
        ratio = counts_of_counts[count] / counts_of_counts[count - 1] if counts_of_counts[count - 1] else 0.0
        # Text with duplicate documents breaks the estimate. Some mass must be left to unseen symbols,
        # and the discount must not exceed the count.
        discounts.append(min(max(count - (count + 1) * base * ratio, SMALLEST_DISCOUNT), float(count)))
    return np.array(discounts)


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray, missing: float) -> np.ndarray:
    """Return the values at the wanted keys, `missing` where there is no such key; `keys` are sorted."""
    indices = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[indices] == queries, values[indices], missing)


def _byte_windows(texts: Sequence[bytes], order: int) -> np.ndarray:
    """Return each symbol and end of the texts, packed with the `order - 1` symbols before it: (bytes + texts,)."""
    # Enough ends before each text to keep windows out of the previous text.
    pad = np.full(order - 1, END, dtype=np.int16)
    end = np.array([END], dtype=np.int16)
    pieces, mask = [], []
    for text in texts:
        pieces += [pad, np.frombuffer(text, dtype=np.uint8).astype(np.int16), end]
        mask += [np.zeros(len(pad), dtype=bool), np.ones(len(text) + 1, dtype=bool)]
    symbols, mask = np.concatenate(pieces), np.concatenate(mask)
    windows = symbols.astype(np.int64)
    for index in range(1, order):
        windows[index:] |= symbols[:-index].astype(np.int64) << BITS * index
    return windows[mask]


def _mask(length: int) -> np.int64:
    return np.int64((1 << BITS * length) - 1)


def _encode(text: str) -> bytes:
    # Lone surrogates, only in broken input, count as three bytes.
    return text.encode("utf-8", "surrogatepass")


def _check_bytes(num_bytes: int) -> None:
    if num_bytes <= 0:
        raise ValueError("the texts are empty: bits per byte need at least one byte")

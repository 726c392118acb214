"""Measure how well a language model predicts text, comparable between tokenizers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextLikelihood:
    """The total negative log-likelihood of texts under a model.

    Args:
        nats: minus the natural logarithm of the texts' probability.
        tokens: number of predicted tokens.
        bytes: bytes of the predicted text, in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Return bits per byte, comparable between tokenizers, n-grams and compressors."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Return the perplexity per token."""
        return math.exp(self.nats / self.tokens)


def text_likelihood(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    max_length: int,
    stride: int | None = None,
    batch_tokens: int = 4096,
) -> TextLikelihood:
    """Predict every token of each text from those before it in the same text.

    The first token follows the document token; if the tokenizer has none, it is not predicted or counted.

    Texts over `max_length` tokens are read in overlapping windows, and each token is counted once, in the first
    window that contains it.

    Args:
        max_length: tokens per window, including the document token.
        stride: new tokens per window; by default half of it, so that each token of a later window has half a window
            of context.
        batch_tokens: tokens per forward pass, padding included; fewer where their logits would fill a GPU.

    Raises:
        InputError: when there is no text, none has a token to predict, or the stride is not smaller than a window.
    """
    import torch

    from hfllm.models.devices import most_logits

    batch_tokens = min(batch_tokens, most_logits(model, model.device) or batch_tokens)
    stride = max(max_length // 2, 1) if stride is None else stride
    if not 1 <= stride < max_length:
        raise InputError(f"stride={stride} with max_length={max_length}: expected at least 1, and less than a window")
    windows = sorted(_windows(texts, tokenizer, max_length, stride), key=lambda w: len(w[0]))
    nats, tokens, was_training = 0.0, 0, model.training
    model.eval()
    with torch.inference_mode():
        for batch in _batches(windows, batch_tokens):
            width = max(len(ids) for ids, _ in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long, device=model.device)
            labels = torch.full_like(ids, -100)
            for row, (window, seen) in enumerate(batch):
                ids[row, : len(window)] = torch.tensor(window)
                labels[row, seen : len(window)] = ids[row, seen : len(window)]
            # A causal model does not see padding on the right.
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:]
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            tokens += int((targets != -100).sum())
    model.train(was_training)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if tokenizer.bos_token_id is None:
        size -= sum(
            len(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:1]).encode())
            for text in texts
        )
    if not tokens:
        raise InputError(f"{len(texts)} text(s) without a token to predict")
    return TextLikelihood(nats, tokens, size)


def _windows(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", max_length: int, stride: int
) -> Iterator[tuple[list[int], int]]:
    """Return windows of token ids, with the number of their first tokens that serve only as context."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        ids, seen = start + ids, 1
        while seen < len(ids):
            end = min(len(ids), max_length if seen == 1 else seen + stride)
            begin = max(0, end - max_length)
            yield ids[begin:end], seen - begin
            seen = end


def _batches(windows: Sequence[tuple[list[int], int]], batch_tokens: int) -> Iterator[list[tuple[list[int], int]]]:
    """Yield windows, ordered from short to long, in batches of at most `batch_tokens` tokens."""
    batch: list[tuple[list[int], int]] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch

"""Measure how well a language model predicts text, comparable between tokenizers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfllm.errors import InputError, refuse_if
from hfllm.generation.scoring import batches_of_tokens, evaluating, token_nats
from hfllm.outputs.report import ratio_error, with_error

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

"""Answer from several passages apart, each in a prompt of its own: RAG-Sequence and RAG-Token.

Both are mixtures over the passages z of a question x (Lewis et al. 2020, arXiv:2005.11401, section 2.1). RAG-Sequence
takes one passage for the whole answer, RAG-Token may take another one for each token:

    p(y | x) = sum_z p(z | x) prod_i p(y_i | x, z, y_<i)
    p(y | x) = prod_i sum_z p(z | x) p(y_i | x, z, y_<i)

With a single passage both are what the model says with that passage.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hfllm.data.tokenizer import end_tokens, tokenize_prompts
from hfllm.errors import InputError
from hfllm.generation.responses import Response
from hfllm.grounding.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


class Marginal(NamedTuple):
    """Log-probabilities of an answer, in nats: by RAG-Sequence and by RAG-Token."""

    sequence: float
    token: float


def passage_weights(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return p(z | x) of the passages of a question: the softmax of their scores, as in the paper.

    Args:
        scores: of a retriever.
        temperature: what scores are divided by; cosines, from -1 to 1, are nearly uniform at 1.

    Raises:
        InputError: for a score that is not finite, or a temperature that is not above 0.
    """
    if not all(map(math.isfinite, scores)):
        raise InputError(f"scores of passages must be finite, got {list(scores)}"[:160])
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a number above 0, got {temperature}")
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
        prompts: the question with each passage.
        weights: p(z | x) of each, as `passage_weights` gives them.
        answer: its tokens, with the one that ends it if that is meant too.
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
    """Return the answer to each question that is likeliest by RAG-Sequence, of the greedy ones under each passage.

    Each is scored under all passages ("thorough decoding" of the paper, with greedy answers in place of beams).

    Args:
        prompts: for each question, it with each of its passages.
        weights: p(z | x) of each.
        max_new_tokens: of an answer; what it cuts off is scored as far as it goes.
        batch_size: prompts of a pass.
    """
    import torch

    flat = _tokens(tokenizer, prompts)
    said = _decoded(model, tokenizer, flat, max_new_tokens, batch_size)
    answers, start = [], 0
    for shares in weights:
        places = range(start, start + len(shares))
        start += len(shares)
        candidates = list(dict.fromkeys(said[place] for place in places))
        best = candidates[0]
        if len(candidates) > 1:
            pairs = [(flat[place], candidate) for candidate in candidates for place in places]
            scores = torch.stack([each.sum() for each in _log_probs(model, *zip(*pairs, strict=True), batch_size)])
            scores = scores.view(len(candidates), len(shares)) + torch.tensor(shares, dtype=torch.float64).log()
            best = candidates[int(torch.logsumexp(scores, 1).argmax())]
        answers.append(_response(tokenizer, model, best))
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
        batch_size: prompts of a pass, or those of one question if they are more.
    """
    flat, answers, start = _tokens(tokenizer, prompts), [], 0
    group: list[Sequence[float]] = []
    for place, shares in enumerate(weights):
        group.append(shares)
        is_last = place + 1 == len(weights)
        if is_last or sum(map(len, group)) + len(weights[place + 1]) > batch_size:
            rows = flat[start : start + sum(map(len, group))]
            said = _decoded(model, tokenizer, rows, max_new_tokens, len(rows), _mixture(group, model.device))
            first = 0
            for shares in group:
                answers.append(_response(tokenizer, model, said[first]))
                first += len(shares)
            start, group = start + len(rows), []
    return answers


def _tokens(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[Prompt]]) -> list[list[int]]:
    """Return the tokens of all prompts, question by question."""
    # One by one, since texts and messages may be mixed.
    return [tokenize_prompts([prompt], tokenizer)[0] for each in prompts for prompt in each]


def _mixture(weights: Sequence[Sequence[float]], device: "torch.device") -> "LogitsProcessor":
    """Return what gives all prompts of a question the mixture's log-probabilities, so that all get the same token."""
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
    """Return greedy answers to prompts, as tokens up to the one that ends them, with it."""
    import torch

    ends, answers = sorted(end_tokens(tokenizer, model)), []
    was_training = model.training
    model.eval()
    for start in range(0, len(tokens), batch_size):
        batch = {"input_ids": list(tokens[start : start + batch_size])}
        batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
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
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            answers.append(tuple(row[: end + 1]))
    model.train(was_training)
    return answers


def _log_probs(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int
) -> "list[torch.Tensor]":
    """Return the log-probability of each token of an answer after its prompt, in 64 bits."""
    import inspect

    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
    was_training, found = model.training, []
    model.eval()
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts[part], answers[part], strict=True)]
        longest = max(map(len, rows))
        # What is on the right of a causal model's tokens does not reach them, so that any token serves to pad.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
        # Logits of the answers alone, which are at the end: those of whole prompts would take much memory.
        first = min(len(prompt) for prompt in prompts[part]) - 1
        keep = {"logits_to_keep": longest - first} if keeps_logits else {}
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        left_out = longest - logits.shape[1]
        for place, (row, answer) in enumerate(zip(rows, answers[part], strict=True)):
            begins = len(row) - len(answer) - 1 - left_out
            predicted = logits[place, begins : begins + len(answer)].double().log_softmax(-1)
            targets = ids[place, len(row) - len(answer) : len(row), None]
            found.append(predicted.gather(1, targets)[:, 0].cpu())
    model.train(was_training)
    return found


def _response(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", tokens: Sequence[int]) -> Response:
    has_ended = bool(tokens) and tokens[-1] in end_tokens(tokenizer, model)
    return Response(tokenizer.decode(tokens, skip_special_tokens=True), has_ended)

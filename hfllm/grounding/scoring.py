"""The log-probability of answers under a model, such as another member of an ensemble."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfllm.data.tokenizer import turn_end
from hfllm.errors import InputError
from hfllm.grounding.samples import NOT_FINITE, Prompt, ScoredAnswer, prompt_tokens
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.passes import batches_of_like_length, evaluating, pass_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[str | ScoredAnswer],
    batch_size: int = 16,
) -> list[ScoredAnswer]:
    """Score each answer after its prompt by a model, such as another member of an ensemble, in one pass.

    Args:
        answers: texts, which end as a turn does; or scored answers, whose `token_ids` are taken as they are. Those
            need a model with the same tokenizer, texts do not.
        batch_size: answers in one pass.

    Raises:
        InputError: for an answer or a prompt without tokens, one longer than the model's context, and logits that are
            not finite.
    """
    import torch

    if len(prompts) != len(answers):
        raise InputError(f"there are {len(prompts)} prompts and {len(answers)} answers: expected one of each per row")
    before = prompt_tokens(model, tokenizer, prompts)
    after = [_answer_tokens(tokenizer, answer) for answer in answers]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(before, after, strict=True)]
    context = max_length_of(model.config)
    for row, (answer, size) in enumerate(zip(after, lengths, strict=True), 1):
        if not answer:
            raise InputError(f"answer {row} has no token")
        if context is not None and size > context:
            raise InputError(f"row {row} takes {size} tokens with its answer, and the model's context has {context}")
    scored: list[tuple[float, ...]] = [()] * len(after)
    with evaluating(model), torch.inference_mode(), pass_precision(model):
        for rows in batches_of_like_length(model, lengths, batch_size):
            found = _teacher_forced(model, [before[row] for row in rows], [after[row] for row in rows])
            for row, numbers in zip(rows, found, strict=True):
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
    """Return the log-probabilities of the tokens after each prompt.

    Rows are padded on the right, which no token before sees.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = [[*prompt, *answer] for prompt, answer in zip(before, after, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    # The head is applied from where the first answer begins, and nowhere before.
    first = min(map(len, before)) - 1
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    keep = {"logits_to_keep": torch.arange(first, longest, device=model.device)} if keeps else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    if not keeps:
        logits = logits[:, first:]
    found = []
    for row, (prompt, answer) in enumerate(zip(before, after, strict=True)):
        start = len(prompt) - 1 - first
        numbers = logits[row, start : start + len(answer)].float().log_softmax(-1)
        target = ids[row, len(prompt) : len(prompt) + len(answer)]
        chosen = numbers.gather(-1, target[:, None])[:, 0]
        if bool(chosen.isnan().any()):
            raise InputError(NOT_FINITE)
        found.append(chosen.tolist())
    return found

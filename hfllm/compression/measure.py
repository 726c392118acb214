"""Measure a quantized model: agreement with the original, and speed."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hfllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def token_windows(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int) -> list["torch.Tensor"]:
    """Return each text's first `max_length` tokens as a row, (1, T), after the document token if there is one.

    Raises:
        InputError: when no text has a token to predict.
    """
    import torch

    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = [start + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    windows = [torch.tensor([row[:max_length]]) for row in rows if len(row) > 1]
    if not windows:
        raise InputError(f"{len(texts)} text(s) without a token to predict")
    return windows


def greedy_tokens(model: "PreTrainedModel", windows: Sequence["torch.Tensor"]) -> "torch.Tensor":
    """Return the most likely next token at every position of the windows, concatenated, (N,) on the CPU."""
    import torch

    with torch.inference_mode():
        return torch.cat(
            [model(input_ids=ids.to(model.device), use_cache=False).logits[0].argmax(-1).cpu() for ids in windows]
        )


def agreement(before: "torch.Tensor", after: "torch.Tensor") -> float:
    """Return the share of positions with the same most likely next token."""
    return (before == after).float().mean().item()


def speeds(
    models: Mapping[str, "PreTrainedModel"],
    prompt_tokens: int = 128,
    batch_size: int = 4,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """Measure tokens per second of reading a prompt and of generating, for each model.

    The models take turns within each round, so that a busy machine affects them equally; the median round is reported.

    Args:
        models: label -> model in eval mode; all with one vocabulary.
        prompt_tokens: tokens of each of the `batch_size` random prompts.
        new_tokens: tokens that one sequence generates after a prompt, each in its own run.

    Returns:
        Label -> `prefill` (batch_size prompts at once) and `decode` (one sequence), in tokens per second.
    """
    import torch

    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    # The first round of each warms up.
    for round_number in range(rounds + 1):
        for name, model in models.items():
            generator = torch.Generator().manual_seed(round_number)
            words = model.config.get_text_config(decoder=True).vocab_size
            ids = torch.randint(words, (batch_size, prompt_tokens), generator=generator)
            # Where a token stands for a picture, there would have to be one.
            ids[torch.isin(ids, torch.tensor(_places(model)))] = 0
            took = _timed(model, ids.to(model.device), new_tokens)
            if round_number:
                for phase, value in took.items():
                    seconds[name][phase].append(value)
    tokens = {"prefill": batch_size * prompt_tokens, "decode": new_tokens}
    return {
        name: {phase: tokens[phase] / statistics.median(values) for phase, values in phases.items()}
        for name, phases in seconds.items()
    }


def _places(model: "PreTrainedModel") -> list[int]:
    """Return the ids of tokens that stand for pictures or sounds."""
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    found = [getattr(model.config, name, None) for name in names]
    return [number for number in found if isinstance(number, int)]


def _timed(model: "PreTrainedModel", ids: "torch.Tensor", new_tokens: int) -> dict[str, float]:
    """Return the seconds to read the prompts, and to generate `new_tokens` after the first."""
    import torch

    def now() -> float:
        if model.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        began = now()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = now()
        output = model(input_ids=ids[:1], use_cache=True, logits_to_keep=1)
        started = now()
        for _ in range(new_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, cache=output.cache, use_cache=True)
        return {"prefill": read - began, "decode": now() - started}

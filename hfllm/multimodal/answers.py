"""Answers of a vision-language model to questions about images."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hfllm.data.images.files import read_image
from hfllm.data.images.rows import conversation_batch
from hfllm.generation.scoring import evaluating
from hfllm.models.devices import forked_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def answer_pictures(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    prompts: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    max_new_tokens: int = 16,
    batch_size: int = 128,
    do_sample: bool = False,
    seed: int = 0,
) -> list[str]:
    """Return a model's answers to prompts, by default greedy ones, without special tokens.

    Args:
        model: a vision-language model; its mode is left as it was.
        processor: its processor.
        prompts: messages with parts.
        images: images of every prompt, or inputs of `hfllm.data.images.files.read_image`.
        max_new_tokens: of an answer at most.
        do_sample: sample at temperature 1 in place of it.
        seed: of the sampling; the caller's random state is not changed.
    """
    import torch

    answers: list[str] = []
    with evaluating(model), torch.no_grad(), forked_random(model.device) if do_sample else nullcontext():
        if do_sample:
            torch.manual_seed(seed)
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            pictures = [
                [read_image(each, "a prompt", max_pixels=sys.maxsize, min_side=1) for each in row]
                for row in images[rows]
            ]
            batch = conversation_batch(processor, prompts[rows], pictures, "left", add_generation_prompt=True)
            batch = batch.to(model.device)
            sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
            sequences = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling)
            ids = sequences[:, batch["input_ids"].shape[1] :]
            answers += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [answer.strip() for answer in answers]

"""Masks of attention in chunks, as Llama 4 has it, for packed rows with padding.

Transformers counts the chunks of a row from its first token. Here each document has chunks of its own.

This file imports only torch, transformers and files beside it, and is uploaded to the Hub with modeling_hfllm.py.
Shapes: B batch, S sequence, E hidden_size.
"""

from copy import copy

import torch
from torch import nn
from transformers import masking_utils

from .banded_hfllm import with_banded_masks
from .configuration_hfllm import HfllmConfig


def create_chunked_mask(
    config: HfllmConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, packed: torch.Tensor
) -> object:
    """Return the mask of layers of chunked attention for packed rows: a tensor or a block mask.

    Args:
        config: with `attention_chunk_size`.
        inputs_embeds: (B, S, E).
        attention_mask: (B, S) with 0 for padding, or `None`.
        packed: (B, S) or (1, S), the number of each token's document.
    """
    alone = copy(config)
    # A chunk is never longer than a window of its size.
    alone.sliding_window = config.attention_chunk_size
    chunks = chunk_numbers(packed.expand(inputs_embeds.shape[0], -1), attention_mask, config.attention_chunk_size)
    same = masking_utils.packed_sequence_mask_function(chunks)
    create = masking_utils.create_sliding_window_causal_mask
    return create(with_banded_masks(alone), inputs_embeds, attention_mask, None, and_mask_function=same)


def chunk_numbers(packed: torch.Tensor, attention_mask: torch.Tensor | None, size: int) -> torch.Tensor:
    """Return a number for each chunk of each document, (B, S); padding is not counted.

    Args:
        packed: (B, S), the number of each token's document.
        attention_mask: (B, S) with 0 for padding, or `None`.
        size: tokens of a chunk.
    """
    is_real = torch.ones_like(packed) if attention_mask is None else attention_mask.to(packed)
    before = is_real.cumsum(-1) - is_real
    begins = nn.functional.pad(packed.diff(dim=-1), (1, 0)).bool()
    rank = before - torch.where(begins, before, 0).cummax(-1).values
    return packed * (packed.shape[1] + 1) + rank // size

"""Memory across segments: what a model has read of a long document before the piece that it reads now.

A document is read piece by piece. Layers of attention keep the keys and values of the last tokens (Transformer-XL, Dai
et al. 2019, arXiv:1901.02860, section 3.2), layers of linear attention their state. No gradient goes back into earlier
pieces (the paper's stop-gradient), so that a step costs what its piece costs.

    memory = SegmentMemory(model, memory_length=256)
    for piece in document.split(256, dim=1):
        loss = model(input_ids=piece, labels=piece, cache=memory, use_cache=True).loss
        loss.backward()
"""

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from hfllm.errors import InputError
from hfllm.generation.sinks import CHUNKED, WITH_KEYS, SinkLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Layers that see no further than a number of tokens, which the config has under this name.
WINDOWS = {WITH_KEYS[1]: "sliding_window", CHUNKED: "attention_chunk_size"}


class MemoryLayer(SinkLayer):
    """Keys and values of the last tokens, without their gradients."""

    def __init__(self, memory_length: int, is_sliding: bool):
        super().__init__(memory_length + 1, 0, None, is_sliding)

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        # A slice that begins at the length itself, since one of the last 0 would hold all.
        return states[:, :, max(0, states.shape[-2] - self.window_length + 1) :].detach()


class MemoryState(LinearAttentionLayer):
    """State of linear attention, and the tokens of its convolution, without their gradients.

    Replaced and not written in place as in generation, since the backward pass of a piece needs the state before it.
    """

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> torch.Tensor:
        """Return the tokens before and the new ones, (B, F, S); keep the last ones."""
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        before = self.conv_states[state_idx]
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        elif conv_states.shape[-1] < size:
            conv_states = torch.nn.functional.pad(conv_states, (size - conv_states.shape[-1], 0))
        self.conv_states[state_idx] = conv_states[..., -size:].detach()
        self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Keep a state."""
        self.recurrent_states[state_idx] = recurrent_states.detach()
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states


class SegmentMemory(Cache):
    """What earlier pieces of a document leave to the next, for training and for reading.

    Args:
        model: a causal language model of layers of full, sliding, chunked or linear attention, whose positions
            have no table that ends.
        memory_length: tokens before a piece whose keys and values are kept; 0 for the states of linear attention
            alone. A layer with a window or chunks keeps no more than these.

    Raises:
        InputError: for a negative length, no memory at all, or layers of other kinds.
    """

    def __init__(self, model: "PreTrainedModel", memory_length: int):
        config = model.config.get_text_config(decoder=True)
        kinds = list(getattr(config, "layer_types", None) or [WITH_KEYS[0]] * config.num_hidden_layers)
        unknown = sorted(set(kinds) - {*WITH_KEYS, CHUNKED, "linear_attention"})
        if unknown:
            raise InputError(f"SegmentMemory: layer_types has {', '.join(unknown)}, which it does not know")
        if memory_length < 0 or (memory_length == 0 and "linear_attention" not in kinds):
            raise InputError(
                f"SegmentMemory: memory_length={memory_length}: expected at least 1, or 0 with linear attention"
            )
        if getattr(config, "position_embedding_type", "rope") == "learned" or not hasattr(config, "rope_parameters"):
            raise InputError(f"SegmentMemory: a model of type {config.model_type} has a table of positions that ends")
        windows = {kind: getattr(config, name, None) for kind, name in WINDOWS.items()}
        layers = DynamicCache(config=config).layers
        for index, kind in enumerate(kinds):
            if kind == "linear_attention" and isinstance(layers[index], LinearAttentionLayer):
                layer = MemoryState(layers[index].number_of_states)
            else:
                window = windows.get(kind)
                size = memory_length if window is None else min(memory_length, window - 1)
                layer = MemoryLayer(size, kind in WINDOWS)
            layers[index : index + 1] = [layer]
        super().__init__(layers=layers)

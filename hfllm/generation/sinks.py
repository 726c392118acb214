"""A cache for endless streams: the first tokens and the last ones (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453).

A model that reads on and on with only its last tokens in the cache breaks down as soon as the first ones have left
it: attention that has nothing to look at goes to them. Kept, a few of them are enough.

    cache = SinkCache(model, window_length=1024, num_sink_tokens=4)
    model.generate(**inputs, cache=cache, prefill_chunk_size=256, max_new_tokens=10_000)

Positions are counted within the cache (section 3.2 there): the first tokens are turned to the places just before the
last ones, so that no distance is longer than the cache. Transformers had a cache of this name until 4.53.
"""

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hfllm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Kinds of layers that hold keys and values; the state of others is of fixed size.
WITH_KEYS = ("full_attention", "sliding_attention")
CHUNKED = "chunked_attention"
# Rotary positions whose frequencies depend on the length so far, which here has no meaning.
BY_LENGTH = ("dynamic", "longrope")
Rotation = Callable[[torch.Tensor, int], torch.Tensor]


class SinkLayer(DynamicLayer):
    """Keys and values of the first and of the last tokens.

    Args:
        window_length: tokens that a new one attends to at most, itself and the first ones included.
        num_sink_tokens: first tokens that stay.
        rotate: turns keys by so many positions; `None` in a layer without positions.
        is_sliding: whether the layer has a window of its own.
        latent_size: of the vectors that latent attention has in the place of keys; rotated keys are then in the place
            of values. `None` for other attention.
    """

    def __init__(
        self,
        window_length: int,
        num_sink_tokens: int,
        rotate: Rotation | None,
        is_sliding: bool,
        latent_size: int | None = None,
    ):
        super().__init__()
        self.window_length, self.num_sink_tokens, self.rotate = window_length, num_sink_tokens, rotate
        self.is_sliding, self.latent_size = is_sliding, latent_size
        self.cumulative_length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that the new tokens attend to, (B, K, T, D), and keep the first and last ones.

        Tokens of one piece also attend to those before them in it, however many these are.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        left_out, sinks = self.cumulative_length - keys.shape[-2], self.num_sink_tokens
        self.keys, self.values = self._kept(keys), self._kept(values)
        if left_out and self.rotate is not None and sinks:
            if self.latent_size is None:
                keys = self._turned(keys, left_out)
            elif keys.shape[-1] == self.latent_size:
                values = self._turned(values, left_out)
            else:
                raise InputError(
                    "SinkCache: latent attention that keeps whole keys has no known place of rotated ones"
                )
        return keys, values

    def _turned(self, states: torch.Tensor, by: int) -> torch.Tensor:
        sinks = self.num_sink_tokens
        return torch.cat([self.rotate(states[:, :, :sinks], by), states[:, :, sinks:]], dim=-2)

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        excess = states.shape[-2] - self.window_length + 1
        if excess <= 0:
            return states
        sinks = self.num_sink_tokens
        return torch.cat([states[:, :, :sinks], states[:, :, sinks + excess :]], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there will be, and the position of the first if all stood side by side."""
        length = (self.keys.shape[-2] if self.is_initialized else 0) + query_length
        return length, self.cumulative_length + query_length - length

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.cumulative_length

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keys, self.values, self.is_initialized, self.cumulative_length = None, None, False, 0

    @property
    def is_croppable(self) -> bool:
        """Return that tokens cannot be undone: those that had to leave are gone."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to undo tokens."""
        raise InputError("a SinkCache cannot undo tokens, as speculative decoding does: those that left it are gone")


class SinkCache(Cache):
    """A cache of fixed size for a stream of any length, for any decoder with rotary positions or none at all.

    Layers that learned with a window or chunks no longer than this one keep them as they are; linear attention keeps
    its state. Give long prompts in pieces (`prefill_chunk_size` of `generate`), since a piece attends to all of
    itself, and without padding.

    Args:
        model: a causal language model, whose rotary embedding turns the first tokens.
        window_length: tokens that a new one attends to at most, itself and the first ones included; with the longest
            piece no more than the model was trained on.
        num_sink_tokens: first tokens that stay; 0 gives a plain window. Four are usual.

    Raises:
        InputError: when the sizes make no sense, or the positions of the model cannot be counted within the cache.
    """

    def __init__(self, model: "PreTrainedModel", window_length: int, num_sink_tokens: int = 4):
        if num_sink_tokens < 0 or window_length <= num_sink_tokens + 1:
            raise InputError(
                f"SinkCache: window_length={window_length} must be more than num_sink_tokens="
                f"{num_sink_tokens} and one, and both at least 0"
            )
        config = model.config.get_text_config(decoder=True)
        kinds = list(getattr(config, "layer_types", None) or ())
        if not kinds:
            is_sliding = bool(getattr(config, "sliding_window", None))
            kinds = [WITH_KEYS[is_sliding]] * config.num_hidden_layers
        layers: list = DynamicCache(config=config).layers or [None] * len(kinds)
        rotations = Rotations(model, config)
        for index, kind in enumerate(kinds):
            if kind == CHUNKED and config.attention_chunk_size > window_length:
                raise InputError(
                    f"SinkCache: window_length={window_length} is less than attention_chunk_size="
                    f"{config.attention_chunk_size}, and chunks cannot be cut"
                )
            if kind not in (*WITH_KEYS, CHUNKED, "linear_attention"):
                raise InputError(
                    f"SinkCache: layer_types has {kind!r}, and only {', '.join((*WITH_KEYS, CHUNKED))} can be kept so"
                )
            is_sliding = kind == "sliding_attention"
            if kind == "full_attention" or (is_sliding and config.sliding_window > window_length):
                rotate = rotations.of_layer(index, kind)
                latent_size = getattr(config, "kv_lora_rank", None)
                layers[index] = SinkLayer(window_length, num_sink_tokens, rotate, is_sliding, latent_size)
        super().__init__(layers=layers)


class Rotations:
    """How a model's layers turn keys by so many positions, by its own rotary embedding and function.

    Raises:
        InputError: when that is not known.
    """

    def __init__(self, model: "PreTrainedModel", config: "PreTrainedConfig"):
        self.what = f"a model of type {config.model_type}"
        self.base = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.rotary: nn.Module | None = getattr(self.base, "rotary_emb", None)
        self.rope = getattr(config, "rope_parameters", None) or {}
        nested = [each for each in self.rope.values() if isinstance(each, dict)]
        for rope in nested or [self.rope]:
            if rope.get("rope_type") in BY_LENGTH:
                raise InputError(f"SinkCache: rope_type={rope['rope_type']!r} depends on the length of the whole text")
        if self.rotary is None and getattr(config, "position_embedding_type", "") != "none":
            raise InputError(f"SinkCache needs rotary positions, and {self.what} has others")
        self.rotated = getattr(config, "no_rope_layers", None)
        self.known: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def of_layer(self, index: int, kind: str) -> Rotation | None:
        """Return the function of a layer, `None` if it has no positions."""
        if self.rotary is None or (self.rotated is not None and not self.rotated[index]):
            return None
        layers = getattr(self.base, "layers", None)
        attention = None if layers is None else getattr(layers[index], "self_attn", None)
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise InputError(
                f"SinkCache: {self.what} has no apply_rotary_pos_emb, by which first tokens would be turned"
            )

        def rotate(keys: torch.Tensor, by: int) -> torch.Tensor:
            cos, sin = self._angles(kind, by, keys)
            size = cos.shape[-1]
            turned, _ = apply(keys[..., :size], keys[..., :size], cos, sin)
            return torch.cat([turned, keys[..., size:]], dim=-1).to(keys.dtype)

        return rotate

    def _angles(self, kind: str, by: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines, (1, 1, R), of `by` positions; the same for all layers of a kind."""
        if (kind, by) not in self.known:
            for old in [each for each in self.known if each[0] == kind]:
                del self.known[old]
            places = torch.tensor([[by]], device=keys.device)
            # Not in the precision of the keys, which has none for such places.
            like = keys.new_empty(1, dtype=torch.float32)
            by_kind = {"layer_type": kind} if "layer_type" in inspect.signature(self.rotary.forward).parameters else {}
            found = self.rotary(like, places, **by_kind)
            cos, sin = found[kind] if isinstance(found, dict) else found
            # The keys are scaled already, where the rotary embedding scales (YaRN).
            scale = (cos.square() + sin.square())[..., :1].sqrt()
            self.known[kind, by] = cos / scale, sin / scale
        return self.known[kind, by]

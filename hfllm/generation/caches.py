"""Key-value caches: attention sinks, memory across segments, and the bytes and speed of all kinds for a model.

Speculative decoding has its own cache (`hfllm.generation.packed.model`), measured too.
"""

import inspect
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
    QuantizedCache,
    StaticCache,
)
from transformers.utils import is_optimum_quanto_available

from hfllm.errors import InputError, refuse_if
from hfllm.generation.packed.ragged_model import attention_windows
from hfllm.generation.speculative.measure import interleaved
from hfllm.models.family.configuration_fields_hfllm import cached_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# ---- kinds of caches ----


# transformers' caches by the names used here. "sliding" is the dynamic cache of a model with sliding windows.
KINDS = ("dynamic", "static", "sliding", "fp8", "int4", "offloaded")


def make_cache(model: "PreTrainedModel", kind: str, max_length: int) -> Cache:
    """Return an empty cache for `model.generate(cache=...)`.

    Args:
        model: a causal language model.
        kind: `"dynamic"` grows with the text; `"static"` has full size at once, to compile; `"sliding"` keeps the
            model's window; `"fp8"` and `"int4"` store fewer bits; `"offloaded"` keeps all layers but one in the
            machine's memory.
        max_length: longest sequence, in tokens; only for the static cache.

    Raises:
        InputError: when the model or the machine does not support it, with an alternative.
    """
    config = model.config.get_text_config(decoder=True)
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=max_length)
    if kind == "sliding":
        if not any(attention_windows(config).values()):
            raise InputError(
                f"cache 'sliding': this {config.model_type} has no sliding_window, and a cut context would change "
                "its output; use 'dynamic', or a model with a window"
            )
        return DynamicCache(config=config)
    if kind in ("fp8", "int4") and any(attention_windows(config).values()):
        raise InputError(f"cache {kind!r}: transformers quantizes no layer with a sliding_window; use 'sliding'")
    if kind in ("fp8", "int4") and "linear_attention" in attention_windows(config):
        raise InputError(f"cache {kind!r}: transformers quantizes no state of linear_attention; use 'dynamic'")
    if kind == "fp8":
        return QuantizedCache(backend="fp8", config=config)
    if kind == "int4":
        if not is_optimum_quanto_available():
            raise InputError("cache 'int4' needs optimum-quanto: pip install optimum-quanto, or use 'fp8'")
        return QuantizedCache(backend="quanto", config=config)
    if kind == "offloaded":
        if model.device.type == "cpu":
            raise InputError("cache 'offloaded' moves layers off an accelerator, and the model is on the CPU already")
        return DynamicCache(config=config, offloading=True)
    raise InputError(f"cache {kind!r} is not one of {', '.join(KINDS)}")


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors in a cache."""
    sizes: dict[int, int] = {}

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        elif isinstance(value, dict):
            add(list(value.values()))

    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values", "conv_states", "recurrent_states"):
            add(getattr(layer, name, None))
    return sum(sizes.values())


def bytes_per_token(config: "PreTrainedConfig", dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values without quantization: 2 * layers * heads * head_dim * size.

    With latent attention (DeepSeek), layers * (kv_lora_rank + qk_rope_head_dim) * size. Layers of linear attention
    have none: their state does not grow.

    Args:
        config: of a decoder; heads are its `num_key_value_heads`, not its query heads.
        dtype: of keys and values.
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return (len(kinds) - kinds.count("linear_attention")) * cached_numbers(config) * dtype.itemsize


def measure_caches(
    model: "PreTrainedModel",
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    kinds: Sequence[str] = KINDS,
    rounds: int = 3,
) -> list[dict[str, str | float]]:
    """Decode greedily with all caches, and compare them.

    Args:
        batch: left-padded `input_ids` and `attention_mask` (B, S).
        max_new_tokens: tokens to generate; rows do not end earlier.

    Returns:
        One row per kind: `cache`, `tokens_per_second`, `bytes_per_token` (held at the end, per token seen),
        `predicted_bytes_per_token` by the plain formula, `same_tokens` (the share of tokens also generated with the
        dynamic cache), and `note`: the reason if it could not be measured.
    """
    rows, runs, outputs, caches = [], {}, {}, {}
    length = batch["input_ids"].shape[1] + max_new_tokens
    for kind in dict.fromkeys(("dynamic", *kinds)):
        try:
            make_cache(model, kind, length)
        except InputError as error:
            rows.append({"cache": kind, "note": str(error)})
            continue
        runs[kind] = _decoding(model, batch, kind, length, max_new_tokens, outputs, caches)
    seconds = interleaved(runs, rounds)
    expected = bytes_per_token(model.config.get_text_config(decoder=True), model.dtype)
    # The last token is never read by the model.
    cached_tokens, new = len(batch["input_ids"]) * (length - 1), len(batch["input_ids"]) * max_new_tokens
    measured = [
        {
            "cache": kind,
            "tokens_per_second": new / statistics.median(seconds[kind]),
            "bytes_per_token": cache_bytes(caches[kind]) / cached_tokens,
            "predicted_bytes_per_token": expected,
            "same_tokens": float((outputs[kind] == outputs["dynamic"]).double().mean()),
            "note": "",
        }
        for kind in runs
    ]
    return measured + rows


def _decoding(
    model: "PreTrainedModel",
    batch: Mapping[str, torch.Tensor],
    kind: str,
    length: int,
    max_new_tokens: int,
    outputs: dict[str, torch.Tensor],
    caches: dict[str, Cache],
) -> Callable[[], None]:
    """Return a function to decode once with a new cache, and keep tokens and cache."""

    def decode() -> None:
        cache = make_cache(model, kind, length)
        settings = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
        ids = model.generate(**batch, cache=cache, **settings)
        outputs[kind], caches[kind] = ids[:, -max_new_tokens:], cache

    return decode


# ---- sinks ----
#
# A cache for endless streams: the first tokens and the last ones (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453).
#
# A model that reads on and on with only its last tokens in the cache breaks down as soon as the first ones have left
# it: attention without anything relevant goes to them. Kept, a few of them are enough.
#
#     cache = SinkCache(model, window_length=1024, num_sink_tokens=4)
#     model.generate(**inputs, cache=cache, prefill_chunk_size=256, max_new_tokens=10_000)
#
# Positions are counted within the cache (section 3.2 there): the first tokens are rotated to the positions just before
# the last ones, so no distance is longer than the cache. Transformers had a cache of this name until 4.53.


# Kinds of layers with keys and values; the state of others is of fixed size.
WITH_KEYS = ("full_attention", "sliding_attention")
CHUNKED = "chunked_attention"
# Rotary positions with frequencies depending on the length so far, meaningless here.
BY_LENGTH = ("dynamic", "longrope")
Rotation = Callable[[torch.Tensor, int], torch.Tensor]


class SinkLayer(DynamicLayer):
    """Keys and values of the first and of the last tokens.

    Args:
        window_length: tokens that a new one attends to at most, itself and the first ones included.
        num_sink_tokens: first tokens that stay.
        rotate: turns keys by so many positions; `None` in a layer without positions.
        is_sliding: whether the layer has a window of its own.
        latent_size: of latent attention's vectors in place of keys; rotated keys are then in the place of values.
            `None` for other attention.
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
        """Return the keys and values for the new tokens' attention, (B, K, T, D), and keep the first and last ones.

        Tokens of one piece also attend to all earlier tokens in it, regardless of their number.
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
        """Return that tokens cannot be undone: removed ones are gone."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to undo tokens."""
        raise InputError("a SinkCache cannot undo tokens, as speculative decoding does: those that left it are gone")


class SinkCache(Cache):
    """A cache of fixed size for a stream of any length, for any decoder with rotary positions or none at all.

    Layers trained with a window or chunks no longer than this one keep them as they are; linear attention keeps
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
        InputError: when this is not known.
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
            indices = torch.tensor([[by]], device=keys.device)
            # Not in the precision of the keys, too low for such positions.
            like = keys.new_empty(1, dtype=torch.float32)
            by_kind = {"layer_type": kind} if "layer_type" in inspect.signature(self.rotary.forward).parameters else {}
            result = self.rotary(like, indices, **by_kind)
            cos, sin = result[kind] if isinstance(result, dict) else result
            # The keys are scaled already, where the rotary embedding scales (YaRN).
            scale = (cos.square() + sin.square())[..., :1].sqrt()
            self.known[kind, by] = cos / scale, sin / scale
        return self.known[kind, by]


# ---- memory ----
#
# Memory across segments: a model's earlier pieces of a long document, for reading the current piece.
#
# A document is read piece by piece. Layers of attention keep the keys and values of the last tokens (Transformer-XL,
# Dai et al. 2019, arXiv:1901.02860, section 3.2), layers of linear attention their state. No gradient goes back into
# earlier pieces (the paper's stop-gradient), so a step costs as much as its piece.
#
#     memory = SegmentMemory(model, memory_length=256)
#     for piece in document.split(256, dim=1):
#         loss = model(input_ids=piece, labels=piece, cache=memory, use_cache=True).loss
#         loss.backward()


# Layers with a limited view of a number of tokens, given in the config under this name.
WINDOWS = {WITH_KEYS[1]: "sliding_window", CHUNKED: "attention_chunk_size"}


class MemoryLayer(SinkLayer):
    """Keys and values of the last tokens, without their gradients."""

    def __init__(self, memory_length: int, is_sliding: bool):
        super().__init__(memory_length + 1, 0, None, is_sliding)

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        # A slice beginning at the length itself, since one of the last 0 would hold all.
        return states[:, :, max(0, states.shape[-2] - self.window_length + 1) :].detach()


class MemoryState(LinearAttentionLayer):
    """State of linear attention, and the tokens of its convolution, without their gradients.

    Replaced and not written in place as in generation, since the backward pass of a piece needs the state before it.
    """

    def __init__(self, number_of_states: int = 1):
        super().__init__(number_of_states)
        self.num_seen = 0

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> torch.Tensor:
        """Return the tokens before and the new ones, (B, F, S); keep the last ones."""
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self.num_seen += conv_states.shape[-1] if state_idx == 0 else 0
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

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, which transformers 5.25 asks of a cache's first layer."""
        return self.num_seen

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_seen = 0


class SegmentMemory(Cache):
    """The memory of a document's earlier pieces for the next, for training and for reading.

    Args:
        model: a causal language model of layers of full, sliding, chunked or linear attention, without a finite table
            of positions.
        memory_length: tokens before a piece whose keys and values are kept; 0 for only the states of linear attention.
            A layer with a window or chunks keeps no more than these.

    Raises:
        InputError: for a negative length, no memory at all, or layers of other kinds.
    """

    def __init__(self, model: "PreTrainedModel", memory_length: int):
        config = model.config.get_text_config(decoder=True)
        kinds = list(getattr(config, "layer_types", None) or [WITH_KEYS[0]] * config.num_hidden_layers)
        unknown = sorted(set(kinds) - {*WITH_KEYS, CHUNKED, "linear_attention"})
        refuse_if(unknown, f"SegmentMemory: layer_types has {', '.join(unknown)}, which it does not know")
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

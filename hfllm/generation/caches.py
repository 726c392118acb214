"""Measure the available key-value caches for a model: memory per token, and speed.

Speculative decoding has its own cache (`hfllm.generation.packed.ragged_model`), which is measured too.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_optimum_quanto_available

from hfllm.errors import InputError
from hfllm.generation.packed.ragged_model import attention_windows
from hfllm.generation.speculative.measure import interleaved
from hfllm.models.family.configuration_fields_hfllm import cached_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# transformers' caches by the names used here. "sliding" is the dynamic cache of a model with sliding windows.
KINDS = ("dynamic", "static", "sliding", "fp8", "int4", "offloaded")


def make_cache(model: "PreTrainedModel", kind: str, max_length: int) -> Cache:
    """Return an empty cache for `model.generate(cache=...)`.

    Args:
        model: a causal language model.
        kind: `"dynamic"` grows with the text; `"static"` has full size at once, to compile; `"sliding"` keeps what
            is in the model's window; `"fp8"` and `"int4"` store fewer bits; `"offloaded"` keeps all layers but one
            in the machine's memory.
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
    seen: dict[int, int] = {}

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        elif isinstance(value, dict):
            add(list(value.values()))

    for layer in cache.layers:
        for name in ("keys", "values", "_quantized_keys", "_quantized_values", "conv_states", "recurrent_states"):
            add(getattr(layer, name, None))
    return sum(seen.values())


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
    """Decode greedily with each cache, and compare them.

    Args:
        batch: left-padded `input_ids` and `attention_mask` (B, S).
        max_new_tokens: tokens to generate; rows do not end earlier.

    Returns:
        One row per kind: `cache`, `tokens_per_second`, `bytes_per_token` (held at the end, per token seen),
        `predicted_bytes_per_token` by the plain formula, `same_tokens` (the share that the dynamic cache also
        generates), and `note`: the reason if it could not be measured.
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
    held, new = len(batch["input_ids"]) * (length - 1), len(batch["input_ids"]) * max_new_tokens
    measured = [
        {
            "cache": kind,
            "tokens_per_second": new / statistics.median(seconds[kind]),
            "bytes_per_token": cache_bytes(caches[kind]) / held,
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
    """Return a function that decodes once with a new cache, and keeps tokens and cache."""

    def decode() -> None:
        cache = make_cache(model, kind, length)
        settings = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
        ids = model.generate(**batch, cache=cache, **settings)
        outputs[kind], caches[kind] = ids[:, -max_new_tokens:], cache

    return decode

"""The fields of `HfllmConfig` for multi-head latent attention: what follows from them, and what is refused.

This file imports only the standard library, and is uploaded to the Hub with configuration_hfllm.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_hfllm import HfllmConfig

HEAD_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass
class LatentFields:
    """Fields of `HfllmConfig` for latent attention, with DeepSeek's names (arXiv:2405.04434, section 2.1).

    Args:
        kv_lora_rank: size of the one vector per token that keys and values of all heads are made of; `None` means
            plain attention, and the other fields have no place then.
        q_lora_rank: size of the vector that the queries are made of; `None` makes them of the hidden state.
        qk_nope_head_dim: size of the part of a query without positions; `None` means
            `hidden_size // num_attention_heads`.
        qk_rope_head_dim: size of its rotated part, even; `None` means half of that.
        v_head_dim: size of a value; `None` means `hidden_size // num_attention_heads`.
        rope_interleave: rotate pairs of neighbors, as DeepSeek's checkpoints want, in place of halves.
    """

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool = False


def fill_latent_sizes(config: "HfllmConfig") -> None:
    """Set the sizes of latent attention that are not given, if the model has it.

    A head without positions and a value have `hidden_size / num_attention_heads` numbers, and the rotated part half of
    that (DeepSeek-V2, section 3.1.2). `head_dim` is then the size of the rotated part, as in transformers' DeepSeek
    configs, and `qk_head_dim` that of a whole query, by which `generate` knows latent attention.
    """
    if config.kv_lora_rank is None or config.num_attention_heads < 1:
        return
    size = config.hidden_size // config.num_attention_heads
    for name, value in zip(HEAD_SIZES, (size, size // 4 * 2, size), strict=True):
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.head_dim is None:
        config.head_dim = config.qk_rope_head_dim
    config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


def check_latent(config: "HfllmConfig") -> None:
    """Refuse sizes of latent attention without it, and what does not fit it.

    Raises:
        ValueError: naming the field, its value and what is accepted.
    """
    if config.num_attention_heads < 1:
        return  # refused with the other sizes
    if config.kv_lora_rank is None:
        for field in ("q_lora_rank", *HEAD_SIZES, "rope_interleave"):
            if getattr(config, field):
                raise ValueError(f"{field}={getattr(config, field)} needs kv_lora_rank, got None")
        return
    for field in ("kv_lora_rank", "q_lora_rank", *HEAD_SIZES):
        value = getattr(config, field)
        if (value is not None or field in HEAD_SIZES) and (value is None or value < 1):
            raise ValueError(f"{field} must be at least 1, got {value}")
    rotated = config.qk_rope_head_dim
    if rotated % 2:
        raise ValueError(f"qk_rope_head_dim={rotated} must be even")
    if config.head_dim != rotated:
        raise ValueError(f"head_dim={config.head_dim} must be qk_rope_head_dim={rotated} with kv_lora_rank, or None")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads} must be "
            f"num_attention_heads={config.num_attention_heads} with kv_lora_rank, or None: one latent serves all heads"
        )
    if config.qk_norm:
        raise ValueError("qk_norm=True has no place with kv_lora_rank, where the latents are normalized")
    ropes = config.rope_parameters or {}
    for rope in (ropes, *(each for each in ropes.values() if isinstance(each, dict))):
        factor = rope.get("partial_rotary_factor", 1.0)
        if factor != 1:
            raise ValueError(
                f"partial_rotary_factor={factor} has no place with kv_lora_rank: qk_rope_head_dim is what is rotated"
            )


def latent_parameters(config: "HfllmConfig") -> int:
    """Return the weights of one layer's latent attention, with its norms."""
    hidden, heads, rank, value = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    nope, shared, compressed = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank
    query = heads * (nope + shared)
    queries = hidden * query if compressed is None else compressed * (hidden + query + 1)
    keys = hidden * (rank + shared) + rank * (heads * (nope + value) + 1)
    biases = ((compressed or 0) + rank + shared) * config.attention_bias + hidden * config.attention_output_bias
    return queries + keys + heads * value * hidden + biases


def cached_numbers(config: object) -> int | None:
    """Return the numbers that an attention layer's cache holds of each token, `None` if the config says no heads.

    Keys and values of all their heads; with latent attention the latent and one rotated key, which all heads share.

    Args:
        config: of a decoder, of any family of transformers.
    """
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        return rank + config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * size

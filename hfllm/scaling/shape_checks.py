"""What a shape leaves unsaid of its layers, and what is refused of it, as `HfllmConfig` would."""

from typing import TYPE_CHECKING

from hfllm.errors import InputError
from hfllm.scaling.shape_tables import LAYER_TYPES, MLP_LAYER_TYPES, WINDOWS

if TYPE_CHECKING:
    from hfllm.scaling.shapes import Shape

# A larger number is a typing error, and may overflow a float.
LARGEST = 10**9


def fill_latent(shape: "Shape") -> None:
    """Fill the sizes of latent attention."""
    if shape.kv_lora_rank is None:
        return
    size = shape.hidden_size // shape.num_attention_heads
    shape.qk_nope_head_dim = size if shape.qk_nope_head_dim is None else shape.qk_nope_head_dim
    shape.qk_rope_head_dim = size // 4 * 2 if shape.qk_rope_head_dim is None else shape.qk_rope_head_dim
    shape.v_head_dim = size if shape.v_head_dim is None else shape.v_head_dim
    shape.head_dim = shape.qk_rope_head_dim


def fill_layers(shape: "Shape") -> None:
    """Fill the list of layers and the sizes of linear attention, and refuse what `HfllmConfig` would."""
    if shape.layer_types is None:
        kind = "full_attention" if shape.attention_chunk_size is None else "chunked_attention"
        kind = kind if shape.sliding_window is None else "sliding_attention"
        shape.layer_types = [kind] * shape.num_hidden_layers
    known = isinstance(shape.layer_types, list) and set(map(str, shape.layer_types)) <= {*LAYER_TYPES}
    if not known or len(shape.layer_types) != shape.num_hidden_layers:
        raise InputError(
            f"layer_types={str(shape.layer_types)[:80]} must name one of {', '.join(LAYER_TYPES)} for each of "
            f"num_hidden_layers={shape.num_hidden_layers}"
        )
    for kind, field in WINDOWS.items():
        if kind in shape.layer_types:
            check_size(shape, field)
        elif getattr(shape, field) is not None:
            raise InputError(f"{field}={getattr(shape, field)!r} needs a {kind!r} in layer_types, which has none")
    if set(shape.layer_types) >= WINDOWS.keys():
        raise InputError(f"layer_types has {' and '.join(WINDOWS)}: a model has one of them")
    if set(shape.layer_types) == {"linear_attention"}:
        raise InputError("layer_types has linear_attention alone: at least one layer must be of another type")
    if not shape.linear_layers:
        return
    heads = shape.linear_num_key_heads or shape.num_attention_heads
    shape.linear_num_key_heads = heads
    shape.linear_num_value_heads = shape.linear_num_value_heads or shape.num_attention_heads
    shape.linear_key_head_dim = shape.linear_key_head_dim or int(0.75 * shape.hidden_size / heads)
    shape.linear_value_head_dim = shape.linear_value_head_dim or 2 * shape.linear_key_head_dim
    for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"):
        check_size(shape, f"linear_{name}")


def check_foreign(shape: "Shape") -> None:
    """Refuse sizes of mixtures and of latent attention that do not fit together."""
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    optional = ("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank")
    check_size(shape, "n_shared_experts", 0)
    for name in ("n_group", "topk_group", *(latent if shape.kv_lora_rank is not None else ())):
        check_size(shape, name)
    for name in optional:
        if getattr(shape, name) is not None:
            check_size(shape, name)
    kinds, number = shape.mlp_layer_types, shape.num_hidden_layers
    if kinds is None or not shape.num_local_experts:
        return
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {*MLP_LAYER_TYPES} or len(kinds) != number:
        raise InputError(
            f"mlp_layer_types={str(kinds)[:80]} must name one of {', '.join(MLP_LAYER_TYPES)} for each of "
            f"num_hidden_layers={number}"
        )


def check_size(shape: "Shape", name: str, least: int = 1) -> None:
    """Refuse a size that is no whole number of at least `least`."""
    value = getattr(shape, name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}, and at most {LARGEST:,}")

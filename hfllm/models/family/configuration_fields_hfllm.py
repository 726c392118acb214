"""Fields of `HfllmConfig` for experts, latent attention and types of layers: defaults, checks, sizes.

This file imports only the standard library, and is uploaded to the Hub with configuration_hfllm.py.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig


# ---- expert fields ----


MLP_LAYER_TYPES = ("dense", "sparse")
CHOICES = {
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
}
# Fields about experts only, and their values without any experts.
IDLE = {
    **{"moe_intermediate_size": None, "n_shared_experts": 0, "shared_expert_intermediate_size": None},
    **{"shared_expert_gate": False, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": True},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
}


@dataclass
class ExpertFields:
    """Fields of `HfllmConfig` for experts, with the names of DeepSeek, GLM and Qwen. The defaults are Mixtral's.

    Args:
        moe_intermediate_size: width of an expert; `None` means `intermediate_size`.
        n_shared_experts: experts for all tokens, in addition to the experts chosen by the router (DeepSeekMoE,
            arXiv:2401.06066, section 3.2): one MLP, so many times as wide as an expert.
        shared_expert_intermediate_size: width of this MLP, instead of `n_shared_experts` (Qwen2-MoE).
        shared_expert_gate: multiply its output by the sigmoid of a learned number per token (Qwen2-MoE).
        mlp_layer_types: `"dense"` or `"sparse"` for each layer: one MLP of `intermediate_size`, or experts. `None`
            means experts in all layers, if there are any.
        scoring_func: how a router turns its logits into scores: `"softmax"` over all experts, or `"sigmoid"` of each
            (DeepSeek-V3, arXiv:2412.19437, equation 15).
        topk_method: how it chooses: `"greedy"` takes the highest scores; `"group_limited_greedy"` the highest in the
            `topk_group` groups with the highest score (DeepSeek-V2, arXiv:2405.04434, section 2.2.2); `"noaux_tc"`
            the highest of scores plus a load-balancing bias, in the groups with the highest sum of two
            (DeepSeek-V3, section 2.1.2). The bias is a buffer of the router and has no gradient.
        norm_topk_prob: divide the weights of a token's experts by their sum.
        n_group: groups of experts of equal size; 1 means no groups.
        topk_group: number of groups for a token's experts.
        routed_scaling_factor: factor on the weights.
        router_bias_update_rate: how far an optimizer step moves the bias of an expert, up if it had less than the
            mean number of tokens since the last step and down if it had more (arXiv:2408.15664, algorithm 1).
            `None` means 0.001 with `"noaux_tc"`; 0 keeps the bias as it is.
    """

    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    mlp_layer_types: list[str] | None = None
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: int | float = 1.0
    router_bias_update_rate: int | float | None = None


def fill_experts(config: "PreTrainedConfig", others: dict[str, object]) -> None:
    """Set missing values: the way of load balancing, and `mlp_layer_types` to `None` where both mean the same.

    Args:
        others: arguments other than fields. Other names of the number of experts are taken out, and so is
            `first_k_dense_replace`, the number of dense layers before those with experts.

    Raises:
        ValueError: where `first_k_dense_replace` is no number of the model's layers.
    """
    for name in ("num_experts", "n_routed_experts"):
        config.num_local_experts = others.pop(name, config.num_local_experts)
    dense = others.pop("first_k_dense_replace", None)
    is_number = isinstance(dense, int) and not isinstance(dense, bool)
    if dense is not None and not (is_number and 0 <= dense <= config.num_hidden_layers):
        raise ValueError(
            f"first_k_dense_replace={dense!r} must be a whole number from 0 to "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    if dense and config.mlp_layer_types is None:
        config.mlp_layer_types = ["dense"] * dense + ["sparse"] * (config.num_hidden_layers - dense)
    has_bias = bool(config.num_local_experts) and config.topk_method == "noaux_tc"
    if config.router_aux_loss_coef is None:
        config.router_aux_loss_coef = 0.001 if config.num_local_experts and not has_bias else 0.0
    if config.router_bias_update_rate is None and has_bias:
        config.router_bias_update_rate = 0.001
    kind = "sparse" if config.num_local_experts else "dense"
    if config.mlp_layer_types == [kind] * config.num_hidden_layers:
        config.mlp_layer_types = None


def follow_layers(config: "PreTrainedConfig") -> None:
    """Let a config follow new `mlp_layer_types`: `None` where all are alike, and no experts where none are sparse."""
    kinds = set(config.mlp_layer_types or ())
    if kinds == {"dense"}:
        config.num_local_experts, config.router_aux_loss_coef, config.router_bias_update_rate = 0, 0.0, None
        for field, idle in IDLE.items():
            setattr(config, field, idle)
    if len(kinds) == 1:
        config.mlp_layer_types = None


def is_sparse(config: "PreTrainedConfig", layer_idx: int) -> bool:
    """Return whether a layer has experts."""
    if config.mlp_layer_types is None:
        return bool(config.num_local_experts)
    return config.mlp_layer_types[layer_idx] == "sparse"


def num_sparse_layers(config: "PreTrainedConfig") -> int:
    """Return the number of layers with experts."""
    kinds = config.mlp_layer_types
    return config.num_hidden_layers * bool(config.num_local_experts) if kinds is None else kinds.count("sparse")


def expert_width(config: "PreTrainedConfig") -> int:
    """Return the inner width of one expert."""
    return config.intermediate_size if config.moe_intermediate_size is None else config.moe_intermediate_size


def shared_width(config: "PreTrainedConfig") -> int:
    """Return the inner width of the MLP for all tokens, next to their experts, 0 if there is none."""
    if config.shared_expert_intermediate_size is not None:
        return config.shared_expert_intermediate_size
    return config.n_shared_experts * expert_width(config)


def mlp_parameters(config: "PreTrainedConfig", active_only: bool = False) -> int:
    """Return the number of weights of all layers' MLPs, experts and routers."""
    hidden, inner = config.hidden_size, 2 if config.mlp_type == "gated" else 1

    def mlp(width: int) -> int:
        return (inner + 1) * hidden * width + (inner * width + hidden) * config.mlp_bias

    experts = config.num_experts_per_tok if active_only else config.num_local_experts
    sparse = experts * mlp(expert_width(config)) + config.num_local_experts * hidden
    sparse += mlp(width) if (width := shared_width(config)) else 0
    sparse += hidden * config.shared_expert_gate
    layers = num_sparse_layers(config)
    return layers * sparse + (config.num_hidden_layers - layers) * mlp(config.intermediate_size)


def absent_rules(config: "PreTrainedConfig") -> list[str]:
    """Return parts of names in rules of parallelism without a layer of this model."""
    sparse = num_sparse_layers(config)
    absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if sparse == config.num_hidden_layers else []
    absent += [] if sparse else ["mlp.experts"]
    return absent + ([] if sparse and shared_width(config) else ["mlp.shared_experts"])


def check_experts(config: "PreTrainedConfig") -> None:
    """Refuse invalid fields of experts, or fields in conflict with one another.

    Raises:
        ValueError: naming the field, its value and the accepted values.
    """
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            raise ValueError(f"{field}={getattr(config, field)!r} is not one of {', '.join(allowed)}")
    number, chosen = config.num_local_experts, config.num_experts_per_tok
    if number < 0 or (number and not 1 <= chosen <= number):
        raise ValueError(f"num_experts_per_tok={chosen} must lie between 1 and num_local_experts={number}")
    if number and (config.mlp_type != "gated" or config.mlp_bias):
        raise ValueError(
            f"num_local_experts={number} needs mlp_type='gated' and mlp_bias=False, got mlp_type={config.mlp_type!r} "
            f"and mlp_bias={config.mlp_bias}"
        )
    _check_layers(config)
    for field, idle in IDLE.items():
        if not number and getattr(config, field) != idle:
            raise ValueError(f"{field}={getattr(config, field)!r} needs num_local_experts of at least 1, got {number}")
    _check_widths(config)
    _check_groups(config)
    if config.routed_scaling_factor <= 0:
        raise ValueError(f"routed_scaling_factor must be above 0, got {config.routed_scaling_factor}")
    rate = config.router_bias_update_rate or 0
    if rate < 0:
        raise ValueError(f"router_bias_update_rate must not be negative, got {rate}")
    if rate and config.topk_method != "noaux_tc":
        raise ValueError(f"router_bias_update_rate={rate} needs topk_method='noaux_tc', got {config.topk_method!r}")


def _check_layers(config: "PreTrainedConfig") -> None:
    kinds, number = config.mlp_layer_types, config.num_local_experts
    if kinds is None:
        return
    for kind in kinds:
        if kind not in MLP_LAYER_TYPES:
            near = get_close_matches(str(kind), MLP_LAYER_TYPES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mlp_layer_types: {kind!r} is not one of {', '.join(MLP_LAYER_TYPES)}{hint}")
    if len(kinds) != config.num_hidden_layers:
        layers = config.num_hidden_layers
        raise ValueError(f"mlp_layer_types names {len(kinds)} layers, and num_hidden_layers={layers}")
    if number and "sparse" not in kinds:
        raise ValueError(f"num_local_experts={number} needs a 'sparse' in mlp_layer_types, which has none")
    if not number and "sparse" in kinds:
        raise ValueError(f"mlp_layer_types with 'sparse' needs num_local_experts of at least 1, got {number}")


def _check_widths(config: "PreTrainedConfig") -> None:
    for field in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(config, field) is not None and getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1 or None, got {getattr(config, field)}")
    if config.n_shared_experts < 0:
        raise ValueError(f"n_shared_experts must not be negative, got {config.n_shared_experts}")
    if config.n_shared_experts and config.shared_expert_intermediate_size is not None:
        raise ValueError(
            f"n_shared_experts={config.n_shared_experts} and shared_expert_intermediate_size="
            f"{config.shared_expert_intermediate_size} both give the shared MLP its width: set one of them"
        )
    if config.shared_expert_gate and not shared_width(config):
        raise ValueError("shared_expert_gate=True needs n_shared_experts or shared_expert_intermediate_size")


def _check_groups(config: "PreTrainedConfig") -> None:
    groups, chosen, number = config.n_group, config.topk_group, config.num_local_experts
    if groups < 1 or (number and number % groups):
        raise ValueError(f"n_group={groups} must divide num_local_experts={number}")
    if not 1 <= chosen <= groups:
        raise ValueError(f"topk_group={chosen} must lie between 1 and n_group={groups}")
    if groups == 1:
        return
    if config.topk_method == "greedy":
        raise ValueError(f"n_group={groups} needs topk_method='group_limited_greedy' or 'noaux_tc', got 'greedy'")
    size = number // groups
    if config.topk_method == "noaux_tc" and size < 2:
        raise ValueError(f"n_group={groups} must leave two of num_local_experts={number} in each group")
    if config.num_experts_per_tok > chosen * size:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than the {chosen * size} experts in "
            f"topk_group={chosen} groups of {size}"
        )


# ---- latent fields ----
#
# The fields of `HfllmConfig` for multi-head latent attention: derived values, and refused ones.


HEAD_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass
class LatentFields:
    """Fields of `HfllmConfig` for latent attention, with DeepSeek's names (arXiv:2405.04434, section 2.1).

    Args:
        kv_lora_rank: size of the one vector per token for the keys and values of all heads; `None` means
            plain attention, without any of the other fields.
        q_lora_rank: size of the vector for computing the queries; `None` computes them from the hidden state.
        qk_nope_head_dim: size of the part of a query without positions; `None` means
            `hidden_size // num_attention_heads`.
        qk_rope_head_dim: size of its rotated part, even; `None` means half of `hidden_size // num_attention_heads`.
        v_head_dim: size of a value; `None` means `hidden_size // num_attention_heads`.
        rope_interleave: rotate pairs of neighbors, as DeepSeek's checkpoints need, instead of halves.
    """

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    rope_interleave: bool = False


def fill_latent_sizes(config: "PreTrainedConfig") -> None:
    """Set missing sizes of latent attention, if the model has it.

    A head without positions and a value have `hidden_size / num_attention_heads` numbers, and the rotated part half as
    many (DeepSeek-V2, section 3.1.2). `head_dim` is then the size of the rotated part, as in transformers' DeepSeek
    configs, and `qk_head_dim` the size of a whole query, from which `generate` recognizes latent attention.
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


def check_latent(config: "PreTrainedConfig") -> None:
    """Refuse sizes of latent attention in a model without it, and other fields in conflict with it.

    Raises:
        ValueError: naming the field, its value and the accepted values.
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


def latent_parameters(config: "PreTrainedConfig") -> int:
    """Return the weights of one layer's latent attention, with its norms."""
    hidden, heads, rank, value = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    nope, shared, compressed = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank
    query = heads * (nope + shared)
    queries = hidden * query if compressed is None else compressed * (hidden + query + 1)
    keys = hidden * (rank + shared) + rank * (heads * (nope + value) + 1)
    biases = ((compressed or 0) + rank + shared) * config.attention_bias + hidden * config.attention_output_bias
    return queries + keys + heads * value * hidden + biases


def cached_numbers(config: object) -> int | None:
    """Return how many numbers an attention layer's cache holds per token, `None` if the config says no heads.

    Keys and values of all their heads; with latent attention the latent and one rotated key, shared by all heads.

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


# ---- layer types ----
#
# Differences between layers: the kind of attention, and whether positions are rotated.


LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
# The types with a limited view, each with the field for its limit.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
LINEAR_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
# Of sparse attention, not a type of layer; absent in models without it.
SPARSE_SIZES = ("sparse_block_size", "sparse_num_blocks")

OPTIONAL_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", *OPTIONAL_ROPE_NUMBERS),
)


def filled_layer_types(config: "PreTrainedConfig") -> list[str]:
    """Return the config's own `layer_types`, or one type for all layers, decided by the window."""
    if config.layer_types is not None:
        return list(config.layer_types)
    return [_type_of_window(config)] * config.num_hidden_layers


def own_window(config: "PreTrainedConfig", layer_idx: int) -> int | None:
    """Return how many tokens a layer sees at most, its own included; `None` for no limit."""
    field = WINDOWS.get(config.layer_types[layer_idx])
    return None if field is None else getattr(config, field)


def _type_of_window(config: "PreTrainedConfig") -> str:
    """Return the type of layer with the first window of the config."""
    types = (kind for kind, field in WINDOWS.items() if getattr(config, field) is not None)
    return next(types, "full_attention")


def has_sparse_sizes(config: "PreTrainedConfig") -> bool:
    """Return whether a config has a size of sparse attention, as one of a model trained with it does."""
    return any(getattr(config, field, None) is not None for field in SPARSE_SIZES)


def follow_edits(config: "PreTrainedConfig") -> None:
    """Update filled-in values to fields set since then, when a model is built or the config saved.

    A list with the same value for all layers follows their number and the window, as `from_pretrained(name,
    num_hidden_layers=2)` and `sliding_window=None` set them without the list. Next to layers of linear
    attention, the others follow the window.
    """
    config.layer_types = filled_layer_types(config)
    fill_linear_sizes(config)
    kinds, number = set(config.layer_types), config.num_hidden_layers
    others = kinds - {"linear_attention"}
    if len(others) == 1 and others <= {"full_attention", *WINDOWS}:
        kind = _type_of_window(config)
        config.layer_types = [each if each == "linear_attention" else kind for each in config.layer_types]
    if len(kinds) == 1:
        config.layer_types = config.layer_types[:1] * number
    if config.no_rope_layers is not None and len(set(config.no_rope_layers)) == 1:
        config.no_rope_layers = config.no_rope_layers[:1] * number


def filled_no_rope_layers(config: "PreTrainedConfig") -> list[int] | None:
    """Return `no_rope_layers`, or `None`, its other form, if the list has 1 for every layer."""
    layers = config.no_rope_layers
    return None if layers is None or layers == [1] * config.num_hidden_layers else list(layers)


def fill_linear_sizes(config: "PreTrainedConfig") -> None:
    """Set missing sizes of linear attention to OLMo Hybrid's, if the model has such layers."""
    if "linear_attention" not in config.layer_types or config.num_attention_heads < 1:
        return
    for field in ("linear_num_key_heads", "linear_num_value_heads"):
        if getattr(config, field) is None:
            setattr(config, field, config.num_attention_heads)
    if config.linear_key_head_dim is None and config.linear_num_key_heads > 0:
        config.linear_key_head_dim = int(0.75 * config.hidden_size / config.linear_num_key_heads)
    if config.linear_value_head_dim is None and config.linear_key_head_dim is not None:
        config.linear_value_head_dim = 2 * config.linear_key_head_dim


def check_layers(config: "PreTrainedConfig") -> None:
    """Refuse lists of another length than the number of layers, unknown types, and fields in conflict with these.

    Raises:
        ValueError: naming the field, its value and the accepted values.
    """
    _check_types(config)
    kinds = set(config.layer_types)
    for kind, field in WINDOWS.items():
        window = getattr(config, field)
        if kind in kinds and window is None:
            raise ValueError(f"layer_types with {kind!r} needs {field}, got None")
        if kind not in kinds and window is not None:
            raise ValueError(f"{field}={window} needs a {kind!r} in layer_types, which has none")
    if kinds >= WINDOWS.keys():
        raise ValueError(f"layer_types has {' and '.join(WINDOWS)}: the masks of a cache are made for one of them")
    if "linear_attention" in kinds:
        _check_linear(config)
    layers = config.no_rope_layers
    if layers is None:
        return
    if len(layers) != config.num_hidden_layers or not set(layers) <= {0, 1}:
        raise ValueError(
            f"no_rope_layers={layers} must be one 0 (a layer without rotary positions) or 1 for each of "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    if config.position_embedding_type != "rope":
        raise ValueError(
            f"no_rope_layers needs position_embedding_type='rope', got {config.position_embedding_type!r}"
        )


def longrope_limits(config: "PreTrainedConfig") -> list[int]:
    """Return how long texts may be, in tokens, before rotary factors of `longrope` change (arXiv:2402.13753).

    The long factors then go for the beginning of the text too. There are several numbers where types of layers have
    their own parameters, and none without this type of rotation.

    Args:
        config: of a decoder, also of a native one.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    return [each["original_max_position_embeddings"] for each in ropes if each.get("rope_type") == "longrope"]


def check_rope_values(rope: "Mapping[str, object]") -> None:
    """Refuse values of rotary parameters without valid frequencies; transformers warns of some and takes them.

    Raises:
        ValueError: naming the key, its value and the accepted values.
    """
    for key in ROPE_NUMBERS:
        value, is_optional = rope.get(key), key in OPTIONAL_ROPE_NUMBERS
        if key not in rope or (value is None and (is_optional or rope["rope_type"] == "longrope")):
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf") or (value == 0 and not is_optional):
            least = "of at least 0" if is_optional else "above 0"
            raise ValueError(f"rope_parameters.{key} must be a number {least}, got {value!r}")


def _check_linear(config: "PreTrainedConfig") -> None:
    if set(config.layer_types) == {"linear_attention"}:
        raise ValueError(
            "layer_types has linear_attention alone: at least one layer must be full_attention, sliding_attention or "
            "chunked_attention, whose cache counts the tokens"
        )
    if not config.is_causal:
        raise ValueError("layer_types with 'linear_attention' needs is_causal=True, got False")
    if config.parallel_block or config.norm_placement not in ("pre", "output"):
        raise ValueError(
            "layer_types with 'linear_attention' needs parallel_block=False and norm_placement='pre' or 'output', got "
            f"{config.parallel_block} and {config.norm_placement!r}"
        )
    for field in LINEAR_SIZES:
        if getattr(config, field) is None or getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise ValueError(
            f"linear_num_key_heads={config.linear_num_key_heads} must divide "
            f"linear_num_value_heads={config.linear_num_value_heads}"
        )
    if config.linear_dt_min <= 0:
        raise ValueError(f"linear_dt_min={config.linear_dt_min} must be above 0")
    for least, most in (("linear_a_log_min", "linear_a_log_max"), ("linear_dt_min", "linear_dt_max")):
        if not 0 <= getattr(config, least) <= getattr(config, most):
            raise ValueError(f"{least}={getattr(config, least)} must lie between 0 and {most}={getattr(config, most)}")


def _check_types(config: "PreTrainedConfig") -> None:
    for kind in config.layer_types:
        if kind not in LAYER_TYPES:
            near = get_close_matches(str(kind), LAYER_TYPES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"layer_types: {kind!r} is not one of {', '.join(LAYER_TYPES)}{hint}")
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(config.layer_types)} layers, and num_hidden_layers={config.num_hidden_layers}"
        )

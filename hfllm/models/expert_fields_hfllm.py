"""The fields of `HfllmConfig` for a mixture of experts: their widths, their router, and the layers that have them.

This file imports only the standard library, and is uploaded to the Hub with configuration_hfllm.py.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_hfllm import HfllmConfig

MLP_LAYER_TYPES = ("dense", "sparse")
CHOICES = {
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
}
# Those that say something of experts alone, and what they say without any.
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
        n_shared_experts: experts that all tokens pass through beside those that the router chooses (DeepSeekMoE,
            arXiv:2401.06066, section 3.2): one MLP that is so many times as wide as an expert.
        shared_expert_intermediate_size: width of this MLP, in place of `n_shared_experts` (Qwen2-MoE).
        shared_expert_gate: multiply its output by the sigmoid of a learned number for each token (Qwen2-MoE).
        mlp_layer_types: `"dense"` or `"sparse"` for each layer: one MLP of `intermediate_size`, or experts. `None`
            means experts in all layers, if there are any.
        scoring_func: what a router makes of its logits: `"softmax"` over all experts, or the `"sigmoid"` of each
            (DeepSeek-V3, arXiv:2412.19437, equation 15).
        topk_method: how it chooses: `"greedy"` takes the highest scores; `"group_limited_greedy"` those in the
            `topk_group` groups with the highest score (DeepSeek-V2, arXiv:2405.04434, section 2.2.2); `"noaux_tc"`
            those of scores plus a bias that balances the load, in the groups with the highest sum of two
            (DeepSeek-V3, section 2.1.2). The bias is a buffer of the router and has no gradient.
        norm_topk_prob: divide the weights of a token's experts by their sum.
        n_group: groups of experts of equal size; 1 means no groups.
        topk_group: groups that a token's experts may come from.
        routed_scaling_factor: factor on the weights.
        router_bias_update_rate: how far an optimizer step moves the bias of each expert, up if it had less than the
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


def fill_experts(config: "HfllmConfig", others: dict[str, object]) -> None:
    """Set what is not given: how the load is balanced, and `mlp_layer_types` to `None` where it says so anyway.

    Args:
        others: arguments that are no fields. Other names of the number of experts are taken out, and so is
            `first_k_dense_replace`, the number of dense layers before those with experts.

    Raises:
        ValueError: where that is no number of the model's layers.
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


def follow_layers(config: "HfllmConfig") -> None:
    """Let a config follow new `mlp_layer_types`: `None` where all are alike, and no experts where none are sparse."""
    kinds = set(config.mlp_layer_types or ())
    if kinds == {"dense"}:
        config.num_local_experts, config.router_aux_loss_coef, config.router_bias_update_rate = 0, 0.0, None
        for field, idle in IDLE.items():
            setattr(config, field, idle)
    if len(kinds) == 1:
        config.mlp_layer_types = None


def is_sparse(config: "HfllmConfig", layer_idx: int) -> bool:
    """Return whether a layer has experts."""
    if config.mlp_layer_types is None:
        return bool(config.num_local_experts)
    return config.mlp_layer_types[layer_idx] == "sparse"


def num_sparse_layers(config: "HfllmConfig") -> int:
    """Return the number of layers that have experts."""
    kinds = config.mlp_layer_types
    return config.num_hidden_layers * bool(config.num_local_experts) if kinds is None else kinds.count("sparse")


def expert_width(config: "HfllmConfig") -> int:
    """Return the inner width of one expert."""
    return config.intermediate_size if config.moe_intermediate_size is None else config.moe_intermediate_size


def shared_width(config: "HfllmConfig") -> int:
    """Return the inner width of the MLP that all tokens pass through beside their experts, 0 if there is none."""
    if config.shared_expert_intermediate_size is not None:
        return config.shared_expert_intermediate_size
    return config.n_shared_experts * expert_width(config)


def mlp_parameters(config: "HfllmConfig", active_only: bool = False) -> int:
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


def absent_rules(config: "HfllmConfig") -> list[str]:
    """Return parts of the names in rules of parallelism that no layer of this model has."""
    sparse = num_sparse_layers(config)
    absent = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if sparse == config.num_hidden_layers else []
    absent += [] if sparse else ["mlp.experts"]
    return absent + ([] if sparse and shared_width(config) else ["mlp.shared_experts"])


def check_experts(config: "HfllmConfig") -> None:
    """Refuse fields of experts that are invalid or do not fit together.

    Raises:
        ValueError: naming the field, its value and what is accepted.
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


def _check_layers(config: "HfllmConfig") -> None:
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


def _check_widths(config: "HfllmConfig") -> None:
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


def _check_groups(config: "HfllmConfig") -> None:
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

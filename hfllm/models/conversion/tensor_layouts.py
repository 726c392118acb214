"""Tensor layouts of native checkpoints with the same numbers in another form: one rule per differing tensor.

A rule moves numbers and never computes, so applying it there and back gives the same bits. Shapes: E hidden_size,
D head_dim, K key-value heads, G query heads per key-value head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfllm.models.family.configuration_hfllm import HfllmConfig

if TYPE_CHECKING:
    from torch import Tensor


def _only(parts: Sequence["Tensor"]) -> "Tensor":
    return parts[0]


@dataclass(frozen=True)
class Rule:
    """`theirs` holds `join` of the tensors `ours`; `split` is its inverse."""

    theirs: str
    ours: tuple[str, ...]
    join: Callable[[Sequence["Tensor"]], "Tensor"] = _only
    split: Callable[["Tensor"], Sequence["Tensor"]] = lambda tensor: [tensor]


def to_ours(state: dict[str, "Tensor"], rules: Iterator[Rule]) -> dict[str, "Tensor"]:
    """Return our tensors from a native state dict; those without a rule keep their names."""
    rest, ours = dict(state), {}
    for rule in rules:
        if rule.theirs in rest:
            ours |= dict(zip(rule.ours, rule.split(rest.pop(rule.theirs)), strict=True))
    return rest | ours


def to_theirs(state: dict[str, "Tensor"], rules: Iterator[Rule]) -> dict[str, "Tensor"]:
    """Return native tensors from ours: the inverse of `to_ours`."""
    rest, theirs = dict(state), {}
    for rule in rules:
        if all(name in rest for name in rule.ours):
            theirs[rule.theirs] = rule.join([rest.pop(name) for name in rule.ours])
    return rest | theirs


# ---- layouts ----


def _transposed(theirs: str, ours: str) -> Rule:
    """Return the rule for linear weights stored as (in, out), as in GPT-1 and GPT-2."""
    return Rule(theirs, (ours,), lambda parts: parts[0].t().contiguous(), lambda tensor: [tensor.t().contiguous()])


def _stacked(
    theirs: str, ours: tuple[str, ...], is_transposed: bool = False, sizes: tuple[int, ...] | None = None
) -> Rule:
    """Return the rule for tensors stacked in parts of `sizes` rows, by default in equal ones."""
    import torch

    def join(parts: Sequence["Tensor"]) -> "Tensor":
        whole = torch.cat(list(parts))
        return whole.t().contiguous() if is_transposed else whole

    def split(tensor: "Tensor") -> Sequence["Tensor"]:
        whole = tensor.t() if is_transposed else tensor
        parts = whole.split(sizes) if sizes else whole.chunk(len(ours))
        return [part.contiguous() for part in parts]

    return Rule(theirs, ours, join, split)


def _grouped(theirs: str, ours: tuple[str, ...], config: HfllmConfig) -> Rule:
    """Return the rule for G query heads, key and value grouped by key-value head: (K, G + 2, D, ...)."""
    import torch

    heads, size = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // heads

    def join(parts: Sequence["Tensor"]) -> "Tensor":
        by_head = [part.reshape(heads, -1, size, *part.shape[1:]) for part in parts]
        return torch.cat(by_head, dim=1).flatten(0, 2)

    def split(tensor: "Tensor") -> Sequence["Tensor"]:
        by_head = tensor.reshape(heads, group + 2, size, *tensor.shape[1:])
        return [part.flatten(0, 2).contiguous() for part in by_head.split((group, 1, 1), dim=1)]

    return Rule(theirs, ours, join, split)


def _rotary_pairs(name: str, config: HfllmConfig) -> Rule:
    """Return the rule for rotary pairs of neighbors (0, 1), (2, 3), ...; ours are half the rotated size apart."""
    import torch

    rope = config.rope_parameters
    # A rotation of type "proportional" goes over the whole head, and turns a part of the pairs by nothing.
    factor = 1.0 if rope["rope_type"] == "proportional" else rope.get("partial_rotary_factor", 1.0)
    size = int(config.head_dim * factor)

    def moved(tensor: "Tensor", shape: tuple[int, int]) -> "Tensor":
        heads = tensor.reshape(-1, config.head_dim, *tensor.shape[1:])
        rotated = heads[:, :size].unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        return torch.cat((rotated, heads[:, size:]), dim=1).flatten(0, 1)

    return Rule(
        name, (name,), lambda parts: moved(parts[0], (2, size // 2)), lambda tensor: [moved(tensor, (size // 2, 2))]
    )


def _renamed(pairs: dict[str, str], theirs: str = "", ours: str = "") -> Iterator[Rule]:
    """Yield rules for renamed weights and biases, with the prefixes `theirs` and `ours`."""
    for their_name, our_name in pairs.items():
        for part in ("weight", "bias"):
            yield Rule(f"{theirs}{their_name}.{part}", (f"{ours}{our_name}.{part}",))


def _renamed_in_layers(pairs: dict[str, str], config: HfllmConfig, theirs: str = "model.layers.") -> Iterator[Rule]:
    """Yield `_renamed` of every layer; `theirs` is the native name of their list."""
    for index in range(config.num_hidden_layers):
        yield from _renamed(pairs, f"{theirs}{index}.", f"model.layers.{index}.")


def _head_sizes(config: HfllmConfig) -> tuple[int, int, int]:
    """Return the rows of a layer's queries, keys and values."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


def _qkv(layer: str, part: str) -> tuple[str, ...]:
    return tuple(f"{layer}self_attn.{name}_proj.{part}" for name in "qkv")


# ---- families ----


def gpt2_rules(config: HfllmConfig) -> Iterator[Rule]:
    outside = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
    yield from _renamed(outside, "transformer.", "model.")
    yield from _gpt_layers(config)


def bigcode_rules(config: HfllmConfig) -> Iterator[Rule]:
    outside = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
    yield from _renamed(outside, "transformer.", "model.")
    inside = {
        **{"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj"},
        **{"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    }
    is_multi_query = config.num_key_value_heads == 1
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}.", f"model.layers.{index}."
        yield from _renamed(inside, theirs, ours)
        for part in ("weight", "bias"):
            name, parts = f"{theirs}attn.c_attn.{part}", _qkv(ours, part)
            yield _stacked(name, parts, sizes=_head_sizes(config)) if is_multi_query else _grouped(name, parts, config)


def openai_rules(config: HfllmConfig) -> Iterator[Rule]:
    outside = {"tokens_embed": "embed_tokens", "positions_embed": "embed_positions"}
    yield from _renamed(outside, "transformer.", "model.")
    yield from _gpt_layers(config)


def _gpt_layers(config: HfllmConfig) -> Iterator[Rule]:
    projections = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
    norms = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}.", f"model.layers.{index}."
        yield from _renamed(norms, theirs, ours)
        yield _stacked(f"{theirs}attn.c_attn.weight", _qkv(ours, "weight"), is_transposed=True)
        yield _stacked(f"{theirs}attn.c_attn.bias", _qkv(ours, "bias"))
        for their_name, our_name in projections.items():
            yield _transposed(f"{theirs}{their_name}.weight", f"{ours}{our_name}.weight")
            yield Rule(f"{theirs}{their_name}.bias", (f"{ours}{our_name}.bias",))


def neox_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed({"embed_in": "embed_tokens", "final_layer_norm": "norm"}, "gpt_neox.", "model.")
    inside = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    for index in range(config.num_hidden_layers):
        theirs, ours = f"gpt_neox.layers.{index}.", f"model.layers.{index}."
        yield from _renamed(inside, theirs, ours)
        for part in ("weight", "bias"):
            yield _grouped(f"{theirs}attention.query_key_value.{part}", _qkv(ours, part), config)


def falcon_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed({"word_embeddings": "embed_tokens", "ln_f": "norm"}, "transformer.", "model.")
    inside = {
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    if config.parallel_block and not config.shared_norm:
        inside |= {"ln_attn": "input_layernorm", "ln_mlp": "post_attention_layernorm"}
    else:
        inside |= {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}.", f"model.layers.{index}."
        yield from _renamed(inside, theirs, ours)
        for part in ("weight", "bias"):
            yield _grouped(f"{theirs}self_attention.query_key_value.{part}", _qkv(ours, part), config)


def rotary_pairs_rules(config: HfllmConfig) -> Iterator[Rule]:
    for index in range(config.num_hidden_layers):
        for projection in ("q_proj", "k_proj"):
            for part in ("weight", "bias"):
                yield _rotary_pairs(f"model.layers.{index}.self_attn.{projection}.{part}", config)


def starcoder2_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed_in_layers({"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}, config)


def phi3_rules(config: HfllmConfig) -> Iterator[Rule]:
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        yield _stacked(f"{layer}self_attn.qkv_proj.weight", _qkv(layer, "weight"), sizes=_head_sizes(config))
    yield from _gate_up_rules(config)


def gptj_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed({"wte": "embed_tokens", "ln_f": "norm"}, "transformer.", "model.")
    inside = {
        **{"ln_1": "input_layernorm", "attn.v_proj": "self_attn.v_proj", "attn.out_proj": "self_attn.o_proj"},
        **{"mlp.fc_in": "mlp.up_proj", "mlp.fc_out": "mlp.down_proj"},
    }
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}.", f"model.layers.{index}."
        yield from _renamed(inside, theirs, ours)
        for name in ("q_proj", "k_proj"):
            rule = _rotary_pairs(f"{ours}self_attn.{name}.weight", config)
            yield replace(rule, theirs=f"{theirs}attn.{name}.weight")


def gpt_neo_rules(config: HfllmConfig) -> Iterator[Rule]:
    outside = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
    yield from _renamed(outside, "transformer.", "model.")
    inside = {
        **{"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"},
        **{f"attn.attention.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")},
        **{"attn.attention.out_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    }
    yield from _renamed_in_layers(inside, config, "transformer.h.")


def phi_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed({"final_layernorm": "norm"}, "model.", "model.")
    inside = {
        **{"self_attn.dense": "self_attn.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
        **{f"self_attn.{name}_layernorm": f"self_attn.{name}_norm" for name in "qk"},
    }
    yield from _renamed_in_layers(inside, config)


def glm4_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from glm_rules(config)
    norms = {
        **{"post_self_attn": "post_attention", "post_attention": "pre_feedforward"},
        "post_mlp": "post_feedforward",
    }
    inside = {f"{theirs}_layernorm": f"{ours}_layernorm" for theirs, ours in norms.items()}
    yield from _renamed_in_layers(inside, config)


def llama4_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from rotary_pairs_rules(config)
    parts = ("gate_proj", "up_proj", "down_proj")
    yield from _renamed_in_layers({f"feed_forward.{part}": f"mlp.{part}" for part in parts}, config)


def glm_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from rotary_pairs_rules(config)
    yield from _gate_up_rules(config)


def _gate_up_rules(config: HfllmConfig) -> Iterator[Rule]:
    for index in range(config.num_hidden_layers):
        mlp = f"model.layers.{index}.mlp."
        yield _stacked(f"{mlp}gate_up_proj.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"))


def persimmon_rules(config: HfllmConfig) -> Iterator[Rule]:
    yield from _renamed({"final_layernorm": "norm"}, "model.", "model.")
    inside = {"dense": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm"}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        yield from _renamed(inside, f"{layer}self_attn.", f"{layer}self_attn.")
        yield from _renamed({"dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj"}, f"{layer}mlp.", f"{layer}mlp.")
        for part in ("weight", "bias"):
            yield _grouped(f"{layer}self_attn.query_key_value.{part}", _qkv(layer, part), config)


def qwen2_moe_rules(config: HfllmConfig) -> Iterator[Rule]:
    names = {f"mlp.shared_expert.{name}_proj": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    yield from _renamed_in_layers(names, config)


def token_classifier_rules(name: str) -> Iterator[Rule]:
    """Yield the rules for the head of a token classifier, called `classifier` in some families."""
    yield from _renamed({name: "score"})


def with_prefix(state: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """Return a trunk's tensors, named as they are inside a model with a head."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def without_prefix(state: Mapping[str, "Tensor"], prefix: str) -> dict[str, "Tensor"]:
    """Return the inverse of `with_prefix`."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}

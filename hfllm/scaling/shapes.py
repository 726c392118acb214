"""A model's shape: the sizes that determine its parameters, its FLOPs and its memory.

    shape = Shape.from_config(preset("llama-2-70b"))      # or the content of a config.json, also of other families
    shape.num_parameters(), shape.kv_bytes_per_token()

Fields have the names of `HfllmConfig`, and the same defaults. Names in formulas: h hidden_size, l layers, a heads,
s sequence length, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from hfllm.errors import InputError
from hfllm.scaling.shape_checks import LARGEST, check_foreign, check_size, fill_latent, fill_layers
from hfllm.scaling.shape_tables import CHOICES, NAMED_SHAPES, mlp_layers
from hfllm.scaling.towers import WITH_TOWER, Tower

# Fields that say something of latent attention alone.
LATENT = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
# Fields that say something of experts alone.
MIXTURE = {"moe_intermediate_size", "n_shared_experts", "shared_expert_intermediate_size", "shared_expert_gate"}
MIXTURE |= {"mlp_layer_types", "n_group", "topk_group"}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass
class Shape:
    """Sizes of a decoder. Unset sizes follow from the others, as in `HfllmConfig`.

    Args:
        loss_chunk_size: tokens per chunk of logits; 0 means all at once, `None` leaves it open.
        layer_types: the attention of each layer, as in `HfllmConfig`; `None` means the same for all.
        linear_num_key_heads: with the other sizes of linear attention; unset ones are as in `HfllmConfig`.
        moe_intermediate_size: width of an expert, by default `intermediate_size`.
        n_shared_experts: experts that every token passes through, beside `num_experts_per_tok` others; or the width
            of them all, `shared_expert_intermediate_size`.
        mlp_layer_types: "dense" or "sparse" for each layer, as in `HfllmConfig`; `None` means experts in all, if any.
        topk_group: with several groups (`n_group`), at most so many nodes hold the experts of one token.
        kv_lora_rank: width of the latent that keys and values are made of (multi-head latent attention, DeepSeek-V2,
            arXiv:2405.04434); with `q_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim`, as in
            `HfllmConfig`.
        tower: what sees, in front of the decoder; `None` for a model of text.
        images_per_row: pictures in a row of training.

    Raises:
        InputError: when a size is missing, not positive, or does not divide another, or a value is of another type.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 2048
    norm_type: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_bias: bool = True
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    parallel_block: bool = False
    shared_norm: bool = True
    mlp_type: str = "gated"
    position_embedding_type: str = "rope"
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    loss_chunk_size: int | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: list[str] | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    mlp_layer_types: list[str] | None = None
    n_group: int = 1
    topk_group: int = 1
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    tower: Tower | None = None
    images_per_row: int = 1

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size < self.num_attention_heads:
                raise InputError(
                    f"hidden_size={self.hidden_size} is less than num_attention_heads={self.num_attention_heads}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        fill_latent(self)
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            self.intermediate_size = wide if self.mlp_type == "plain" else -(-wide * 2 // 3 // 16) * 16
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        for name in ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"):
            check_size(self, name)
        check_foreign(self)
        fill_layers(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise InputError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and "
                f"num_local_experts={self.num_local_experts}"
            )

    def _check_kinds(self) -> None:
        """Refuse values of other types than `HfllmConfig` takes, which would be counted wrongly."""
        for name in (*_REQUIRED, "num_experts_per_tok"):
            check_size(self, name)
        check_size(self, "num_local_experts", 0)
        if self.loss_chunk_size is not None:
            check_size(self, "loss_chunk_size", 0)
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise InputError(f"{name}={getattr(self, name)!r} is not one of {', '.join(accepted)}")
        for item in fields(self):
            value = getattr(self, item.name)
            is_unset = value is None and item.default is None
            if "bool" in str(item.type) and not (isinstance(value, bool) or is_unset):
                raise InputError(f"{item.name}={value!r} must be true or false")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config") -> "Shape":
        """Return the shape that a configuration describes.

        Args:
            config: fields of `HfllmConfig`, or the content of a config.json of a family that converts. Such a one is
                read by transformers' class of it and by the conversion's table, which import torch.
            source: its origin, for messages.

        Raises:
            InputError: for another `model_type`, a missing or an impossible size.
        """
        kind = config.get("model_type", "hfllm")
        if kind in list(WITH_TOWER):
            return cls._with_tower(config, source)
        try:
            values = dict(config) if kind == "hfllm" else _converted(config)
            # Other names of the number of experts.
            values.setdefault("num_local_experts", values.get("num_experts", values.get("n_routed_experts", 0)))
            values.setdefault("mlp_layer_types", mlp_layers(values))
            known = {item.name: values[item.name] for item in fields(cls) if values.get(item.name) is not None}
            missing = [name for name in _REQUIRED if name not in known]
            if missing:
                raise InputError(f"{missing[0]} is missing")
            return cls(**known)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def _with_tower(cls, config: Mapping[str, Any], source: str) -> "Shape":
        """Return the shape of a model of Llava's layout, ours or another."""
        text = config.get("text_config")
        if not isinstance(text, Mapping) or text.get("model_type", "llama") in list(WITH_TOWER):
            raise InputError(f"{source}: text_config must be the config of a text model")
        if "vision_config" not in config:
            raise InputError(f"{source}: vision_config is missing")
        implied = {"model_type": WITH_TOWER[config["model_type"]]}
        is_tied = {"tie_word_embeddings": True} if config.get("tie_word_embeddings") else {}
        shape = cls.from_config({**implied, **text, **is_tied}, f"{source}: text_config")
        return replace(shape, tower=Tower.from_config(config, shape.hidden_size, source))

    @property
    def linear_layers(self) -> int:
        """Return the number of layers of linear attention."""
        return self.layer_types.count("linear_attention")

    @property
    def state_size(self) -> int:
        """Return the numbers in the state of one layer of linear attention, H D W; 0 without such layers."""
        sizes = self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim
        return sizes[0] * sizes[1] * sizes[2] if self.linear_layers else 0

    @property
    def query_size(self) -> int:
        """Return the width of all query heads together."""
        if self.kv_lora_rank is not None:
            return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Return the width of all key heads together. A latent is spread to a key for each head."""
        return self.query_size if self.kv_lora_rank is not None else self.num_key_value_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Return the width of all value heads together."""
        return self.key_size if self.kv_lora_rank is None else self.num_attention_heads * self.v_head_dim

    @property
    def output_size(self) -> int:
        """Return the width of all heads' outputs together."""
        return self.query_size if self.kv_lora_rank is None else self.value_size

    @property
    def latent_size(self) -> int:
        """Return the width of the latents of queries, keys and values, 0 without."""
        return 0 if self.kv_lora_rank is None else (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cached_size(self) -> int:
        """Return the numbers per token in the cache of one layer of attention: keys and values, or latents."""
        return 2 * self.key_size if self.kv_lora_rank is None else self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def expert_size(self) -> int:
        """Return the inner width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def shared_size(self) -> int:
        """Return the inner width of the experts that all tokens share, together; 0 without."""
        if not self.num_local_experts:
            return 0
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.expert_size

    def dense_layers(self, start: int = 0, stop: int | None = None) -> int:
        """Return how many of these layers of a mixture have one dense MLP in place of experts."""
        kinds = self.mlp_layer_types if self.num_local_experts else None
        return 0 if kinds is None else kinds[start:stop].count("dense")

    @property
    def is_gated(self) -> bool:
        return self.mlp_type == "gated"

    @property
    def norms_per_layer(self) -> int:
        return 4 if self.norm_placement == "both" else 1 if self.parallel_block and self.shared_norm else 2

    def layer_parameters(self) -> dict[str, int]:
        """Return the parameters of one layer by part; `mlp` is the dense one, `experts` are all experts together."""
        return dict(self._layer)

    @cached_property
    def _layer(self) -> dict[str, int]:
        # Cached, since a search over layouts needs these thousands of times.
        hidden = self.hidden_size
        norm = 2 if self.norm_type == "layernorm" and self.norm_bias else 1
        normed = 2 * self.head_dim if self.qk_norm_scope == "head" else self.query_size + self.key_size
        norms = self.norms_per_layer * hidden + normed * self.qk_norm
        return {
            "attention": self._attention_parameters(),
            "mlp": (self._mlp(self.shared_size) if self.shared_size else 0)
            if self.num_local_experts
            else self._mlp(self.intermediate_size),
            "experts": self.num_local_experts * self._mlp(self.expert_size),
            "router": (self.num_local_experts + (self.shared_expert_gate and self.shared_size > 0)) * hidden,
            "norms": norm * norms + self._latent_norms,
        }

    @property
    def _latent_norms(self) -> int:
        """Return the weights of the latents' norms, which never have biases."""
        return 0 if self.kv_lora_rank is None else (self.q_lora_rank or 0) + self.kv_lora_rank

    def _mlp(self, width: int) -> int:
        projections = 3 if self.is_gated else 2
        return projections * self.hidden_size * width + ((projections - 1) * width + self.hidden_size) * self.mlp_bias

    def _attention_parameters(self) -> int:
        hidden, query, key = self.hidden_size, self.query_size, self.key_size
        if self.kv_lora_rank is not None:
            rank = self.q_lora_rank
            queries = hidden * query if rank is None else rank * (hidden + query)
            latent = hidden * (self.kv_lora_rank + self.qk_rope_head_dim)
            spread = self.kv_lora_rank * (self.num_attention_heads * self.qk_nope_head_dim + self.value_size)
            biases = self.latent_size * self.attention_bias + hidden * self.attention_output_bias
            return queries + latent + spread + self.value_size * hidden + biases
        biases = (query + 2 * key) * self.attention_bias + hidden * self.attention_output_bias
        return hidden * (query + 2 * key) + query * hidden + biases

    def dense_layer_change(self) -> dict[str, int]:
        """Return what a dense layer of `mlp_layer_types` has more than a sparse one, by part."""
        layer = self._layer
        dense = self._mlp(self.intermediate_size) - layer["mlp"]
        return {"mlp": dense, "experts": -layer["experts"], "router": -layer["router"]}

    def _linear_change(self) -> dict[str, int]:
        """Return what a layer of linear attention has more than one of another type, by part."""
        heads, value = self.linear_num_value_heads, self.linear_num_value_heads * self.linear_value_head_dim
        channels = 2 * self.linear_num_key_heads * self.linear_key_head_dim + value
        linear = self.hidden_size * (channels + 2 * value + 2 * heads) + channels * self.linear_conv_kernel_dim
        linear += 2 * heads
        norm = 2 if self.norm_type == "layernorm" and self.norm_bias else 1
        normed = 2 * self.head_dim if self.qk_norm_scope == "head" else self.query_size + self.key_size
        return {
            "attention": linear - self._attention_parameters(),
            "norms": self.linear_value_head_dim - norm * normed * self.qk_norm - self._latent_norms,
        }

    def parameters(self) -> dict[str, int]:
        """Return the parameters of the model by part. Tied embeddings are counted once, as embeddings."""
        return dict(self._model)

    @cached_property
    def _model(self) -> dict[str, int]:
        layers = {part: self.num_hidden_layers * count for part, count in self.layer_parameters().items()}
        if self.linear_layers:
            for part, count in self._linear_change().items():
                layers[part] += self.linear_layers * count
        if dense := self.dense_layers():
            for part, count in self.dense_layer_change().items():
                layers[part] += dense * count
        norm = 2 if self.norm_type == "layernorm" and self.norm_bias else 1
        layers["norms"] += norm * self.hidden_size * (self.norm_placement != "post")
        positions = self.max_position_embeddings if self.position_embedding_type == "learned" else 0
        table = self.vocab_size * self.hidden_size
        return {
            "embeddings": table,
            "positions": positions * self.hidden_size,
            **layers,
            "head": (0 if self.tie_word_embeddings else table) + self.vocab_size * self.lm_head_bias,
            **self._media,
        }

    @property
    def _media(self) -> dict[str, int]:
        if self.tower is None:
            return {}
        return {"tower": self.tower.tower_parameters(), "projector": self.tower.projector_parameters()}

    def num_parameters(self, active_only: bool = False) -> int:
        """Return the number of all parameters, tied ones counted once.

        Args:
            active_only: count only the experts that one token passes through.
        """
        parts = self.parameters()
        if active_only and self.num_local_experts:
            parts["experts"] = parts["experts"] * self.num_experts_per_tok // self.num_local_experts
        return sum(parts.values())

    def multiplied_parameters(self) -> int:
        """Return the parameters multiplied with every token: no tables, no idle experts, and nothing that sees."""
        active = self.num_parameters(active_only=True) - sum(self._media.values())
        tables = self.parameters()
        looked_up = tables["positions"] + (0 if self.tie_word_embeddings else tables["embeddings"])
        return active - looked_up

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Return the bytes of the key-value cache per token, over all layers: 2 l K D values, or latents.

        Layers of linear attention have none, and layers with a window stop at its length: see `cache_bytes`.
        """
        return (self.num_hidden_layers - self.linear_layers) * self.cached_size * bytes_per_value

    def cache_bytes(self, length: int, bytes_per_value: int = 2) -> int:
        """Return the bytes of the cache of one sequence of this many tokens: keys and values, and states in fp32."""
        held = {"full_attention": length, "sliding_attention": min(length, self.sliding_window or length)}
        held["chunked_attention"] = min(length, self.attention_chunk_size or length)
        tokens = sum(held.get(kind, 0) for kind in self.layer_types)
        return tokens * self.cached_size * bytes_per_value + 4 * self.linear_layers * self.state_size


def _converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the family of a config.json of another architecture, as `hfllm.from_native` reads it."""
    from hfllm.models.native_families import fields_from_native

    return fields_from_native(config)


__all__ = ["LARGEST", "NAMED_SHAPES", "Shape"]

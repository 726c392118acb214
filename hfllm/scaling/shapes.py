"""A model's shape: the sizes that determine its parameters, FLOPs and memory, read from any config.

    shape = Shape.from_config(preset("llama-2-70b"))      # or the content of a config.json, also of other families
    shape.num_parameters(), shape.kv_bytes_per_token()

Fields have the names of `HfllmConfig`, and the same defaults. Names in formulas: h hidden_size, l layers, a heads,
s sequence length, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from hfllm.errors import InputError, check_choice, check_whole_number, refuse_if

# ---- shape checks ----
# Defaults for a shape's unset layers, and refusals of its sizes, as in `HfllmConfig`.


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
    """Fill the list of layers and the sizes of linear attention, with the refusals of `HfllmConfig`."""
    if shape.layer_types is None:
        kind = "full_attention" if shape.attention_chunk_size is None else "chunked_attention"
        kind = kind if shape.sliding_window is None else "sliding_attention"
        shape.layer_types = [kind] * shape.num_hidden_layers
    _check_types(shape, "layer_types", LAYER_TYPES)
    for kind, field in WINDOWS.items():
        if kind in shape.layer_types:
            check_sizes(shape, field)
        elif getattr(shape, field) is not None:
            raise InputError(f"{field}={getattr(shape, field)!r} needs a {kind!r} in layer_types, which has none")
    kinds = set(shape.layer_types)
    refuse_if(kinds >= WINDOWS.keys(), f"layer_types has {' and '.join(WINDOWS)}: a model has one of them")
    if kinds == {"linear_attention"}:
        raise InputError("layer_types has linear_attention alone: at least one layer must be of another type")
    if not shape.linear_layers:
        return
    heads = shape.linear_num_key_heads or shape.num_attention_heads
    shape.linear_num_key_heads = heads
    shape.linear_num_value_heads = shape.linear_num_value_heads or shape.num_attention_heads
    shape.linear_key_head_dim = shape.linear_key_head_dim or int(0.75 * shape.hidden_size / heads)
    shape.linear_value_head_dim = shape.linear_value_head_dim or 2 * shape.linear_key_head_dim
    check_sizes(shape, "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
    check_sizes(shape, "linear_value_head_dim", "linear_conv_kernel_dim")


def check_foreign(shape: "Shape") -> None:
    """Refuse inconsistent sizes of mixtures and of latent attention."""
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    optional = ("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank")
    check_sizes(shape, "n_shared_experts", least=0)
    check_sizes(shape, "n_group", "topk_group", *(latent if shape.kv_lora_rank is not None else ()))
    check_sizes(shape, *(name for name in optional if getattr(shape, name) is not None))
    if shape.mlp_layer_types is not None and shape.num_local_experts:
        _check_types(shape, "mlp_layer_types", MLP_LAYER_TYPES)


def check_sizes(shape: "Shape", *names: str, least: int = 1) -> None:
    """Refuse sizes other than whole numbers of at least `least`."""
    for name in names:
        check_whole_number(name, getattr(shape, name), least, LARGEST)


def _check_types(shape: "Shape", name: str, types: Sequence[str]) -> None:
    """Refuse another list than one with a known type for each layer."""
    kinds, number = getattr(shape, name), shape.num_hidden_layers
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {*types} or len(kinds) != number:
        raise InputError(
            f"{name}={str(kinds)[:80]} must name one of {', '.join(types)} for each of num_hidden_layers={number}"
        )


# ---- shape tables ----
# Values accepted by `HfllmConfig`, and shapes from papers.


# Values accepted by `HfllmConfig`; reading them from it would import transformers.
CHOICES = {
    "norm_type": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "output", "both"),
    "qk_norm_scope": ("head", "all_heads"),
    "mlp_type": ("gated", "plain"),
    "position_embedding_type": ("rope", "learned", "none"),
}
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
# The types with limited attention, each with the field for its extent.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
MLP_LAYER_TYPES = ("dense", "sparse")

_GPT = {
    "norm_type": "layernorm",
    "mlp_type": "plain",
    "position_embedding_type": "learned",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}


def mlp_layers(values: Mapping[str, Any]) -> list[str] | None:
    """Return `mlp_layer_types` of a config with experts after `first_k_dense_replace` dense layers.

    `None` means experts in all layers, if there are experts.

    Raises:
        InputError: for an invalid number, or more dense layers than there are layers.
    """
    number, first = values.get("num_hidden_layers"), values.get("first_k_dense_replace") or 0
    if not isinstance(number, int) or not first:
        return None
    if not isinstance(first, int) or not 0 <= first <= number:
        raise InputError(f"first_k_dense_replace={first!r} is more than num_hidden_layers={number}, or none")
    return ["dense"] * first + ["sparse"] * (number - first)


def _megatron(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**_GPT, **sizes, "vocab_size": 51200, "max_position_embeddings": 2048}


# Published shapes without a preset of the family: the ten models of Narayanan et al. 2021 (arXiv:2104.04473,
# table 1), the first of which are smaller versions of the last, MT-NLG (arXiv:2201.11990), and DeepSeek-V3.
NAMED_SHAPES: dict[str, dict[str, Any]] = {
    "megatron-1.7b": _megatron(24, 2304, 24),
    "megatron-3.6b": _megatron(30, 3072, 32),
    "megatron-7.5b": _megatron(36, 4096, 32),
    "megatron-18b": _megatron(40, 6144, 48),
    "megatron-39b": _megatron(48, 8192, 64),
    "megatron-76b": _megatron(60, 10240, 80),
    "megatron-145b": _megatron(80, 12288, 96),
    "megatron-310b": _megatron(96, 16384, 128),
    "megatron-530b": _megatron(105, 20480, 128),
    "gpt3-1t": _megatron(128, 25600, 160),
    # Without the module for predicting a second token (arXiv:2412.19437, section 4.2).
    "deepseek-v3": {
        **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280},
        **{"intermediate_size": 18432, "max_position_embeddings": 4096},
        **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "num_local_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
        **{"scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5},
    },
}


# ---- towers ----
# Count a vision tower: its parameters, the tokens of an image in a row, and the work of an image.
#
#     tower = Tower.from_config(config, text_size=4096)  # of a config.json with a vision_config
#     tower.num_parameters(), tower.tokens, tower.flops_per_picture()
# Names in formulas: h hidden_size, l layers, p patch_size, c channels, n patches of an image.


LARGEST_TOWER = 10**6
# Types of models with a vision tower, and their text models where a config names none.
WITH_TOWER = {"hfllm_vision": "hfllm", "llava": "llama"}
# Types of towers with exact counts of weights, and whether the first vector stands for the whole image.
CLASS_VECTOR = {"siglip_vision_model": False, "clip_vision_model": True, "vit": True, "dinov2": True}


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower with the projector of Llava behind it.

    Args:
        model_type: one of `CLASS_VECTOR`.
        hidden_size, intermediate_size, num_hidden_layers, image_size, patch_size, num_channels: of the tower.
        has_head: whether it has a pooling head, not read by any text model.
        text_size: width of the text model.
        num_layers_read: layers with joined vectors.
        has_projector_bias: whether the projector's two layers have biases.
        keeps_all: whether all vectors are taken (`"full"`), or all but the first (`"default"`).
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int
    num_channels: int
    has_head: bool
    text_size: int
    num_layers_read: int = 1
    has_projector_bias: bool = True
    keeps_all: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], text_size: int, source: str = "config") -> "Tower":
        """Return the tower of a config.json with a `vision_config`, of Llava's layout.

        Args:
            config: its content.
            text_size: width of the text model.
            source: its origin, for messages.

        Raises:
            InputError: for another type of tower, or a missing or impossible size.
        """
        vision = config["vision_config"]
        where = f"{source}: vision_config"
        refuse_if(not isinstance(vision, Mapping), f"{where} must be an object, got {type(vision).__name__}")
        kind = vision.get("model_type")
        # A list, since a value from a file may have no hash.
        check_choice(f"{where}: model_type {kind!r} is not one of", kind, list(CLASS_VECTOR))
        hidden = _size(vision, "hidden_size", where)
        wide = hidden * _size(vision, "mlp_ratio", where, 4) if kind == "dinov2" else None
        layers = config.get("vision_feature_layer", -1)
        tower = cls(
            model_type=kind,
            hidden_size=hidden,
            intermediate_size=wide or _size(vision, "intermediate_size", where),
            num_hidden_layers=_size(vision, "num_hidden_layers", where),
            image_size=_size(vision, "image_size", where),
            patch_size=_size(vision, "patch_size", where),
            num_channels=_size(vision, "num_channels", where, 3),
            has_head=bool(vision.get("vision_use_head", True)),
            text_size=text_size,
            num_layers_read=len(layers) if isinstance(layers, list) else 1,
            has_projector_bias=bool(config.get("multimodal_projector_bias", True)),
            keeps_all=config.get("vision_feature_select_strategy", "default") == "full",
        )
        if tower.patch_size > tower.image_size:
            raise InputError(f"{where}: patch_size={tower.patch_size} is more than image_size={tower.image_size}")
        return tower

    @property
    def patches(self) -> int:
        """Return the patches of an image, n."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def vectors(self) -> int:
        """Return the vectors inside the tower, n or n + 1."""
        return self.patches + CLASS_VECTOR[self.model_type]

    @property
    def tokens(self) -> int:
        """Return the tokens of an image in a row of the text model."""
        return self.vectors - (not self.keeps_all)

    def layer_parameters(self) -> int:
        """Return the parameters of one layer: 4 (h^2 + h), an MLP, two norms; DINOv2 also scales blocks."""
        hidden, wide = self.hidden_size, self.intermediate_size
        scales = 2 * hidden if self.model_type == "dinov2" else 0
        return 4 * (hidden * hidden + hidden) + 2 * hidden * wide + wide + hidden + 4 * hidden + scales

    def tower_parameters(self) -> int:
        """Return the parameters of the tower, its pooling head included."""
        hidden = self.hidden_size
        filters = self.num_channels * self.patch_size**2 * hidden
        tables = self.vectors * hidden + CLASS_VECTOR[self.model_type] * hidden
        norm = 2 * hidden
        beside = {
            # A norm before the layers and one after; its filters have no bias.
            "clip_vision_model": 2 * norm,
            # A learned query, attention, a norm and an MLP pool the vectors.
            "siglip_vision_model": hidden + norm + self.has_head * (hidden + self.layer_parameters() - norm),
            # A linear pooler.
            "vit": hidden + norm + hidden * hidden + hidden,
            # A vector for masked patches.
            "dinov2": hidden + norm + hidden,
        }[self.model_type]
        return filters + tables + beside + self.num_hidden_layers * self.layer_parameters()

    def projector_parameters(self) -> int:
        """Return the parameters of the projector: two linear layers."""
        wide = self.num_layers_read * self.hidden_size
        return self.text_size * (wide + self.text_size + 2 * self.has_projector_bias)

    def num_parameters(self) -> int:
        """Return the parameters of tower and projector."""
        return self.tower_parameters() + self.projector_parameters()

    def flops_per_picture(self) -> float:
        """Return the FLOPs of training on one image: 6 per multiplied parameter and vector, 12 h n in scores.

        As for text models: three passes of two FLOPs, every vector attends to all others.
        """
        multiplied = self.num_hidden_layers * self.layer_parameters() + self.projector_parameters()
        multiplied += self.num_channels * self.patch_size**2 * self.hidden_size
        scores = 12 * self.num_hidden_layers * self.hidden_size * self.vectors
        return float(self.vectors * (6 * multiplied + scores))

    def activation_bytes_per_picture(self, bytes_per_value: int, is_recomputed: bool = False) -> float:
        """Return the bytes kept by training for one image.

        Per vector and layer: the inputs of both norms and of the modules after them, queries, keys, values and
        attention's output (8 h), and an MLP's inner states before and after its activation. Scores are not kept.

        Args:
            is_recomputed: whether only each layer's input is kept.
        """
        layer = self.hidden_size if is_recomputed else 8 * self.hidden_size + 2 * self.intermediate_size
        projector = self.num_layers_read * self.hidden_size + 2 * self.text_size
        return float(self.vectors * (self.num_hidden_layers * layer + projector) * bytes_per_value)


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_TOWER:
        wrong = f"={value!r} must be a whole number from 1 to {LARGEST_TOWER:,}"
        raise InputError(f"{where}: {name}{' is missing' if value is None else wrong}")
    return value


# ---- shapes ----


# Fields only for latent attention.
LATENT = {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
# Fields only for experts.
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
        n_shared_experts: experts that every token passes through, in addition to `num_experts_per_tok` others; or the
            width of them all, `shared_expert_intermediate_size`.
        mlp_layer_types: "dense" or "sparse" for each layer, as in `HfllmConfig`; `None` means experts in all, if any.
        topk_group: with several groups (`n_group`), at most so many nodes hold the experts of one token.
        kv_lora_rank: width of the latent of keys and values (multi-head latent attention, DeepSeek-V2,
            arXiv:2405.04434); with `q_lora_rank`, `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim`, as in
            `HfllmConfig`.
        tower: the vision tower, in front of the decoder; `None` for a model of text.
        images_per_row: images in a row of training.

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
            hidden, heads = self.hidden_size, self.num_attention_heads
            refuse_if(hidden < heads, f"hidden_size={hidden} is less than num_attention_heads={heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        fill_latent(self)
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            self.intermediate_size = wide if self.mlp_type == "plain" else -(-wide * 2 // 3 // 16) * 16
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        check_sizes(self, "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
        check_foreign(self)
        fill_layers(self)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        refuse_if(heads % kv_heads, f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
        experts, drawn = self.num_local_experts, self.num_experts_per_tok
        if experts and not 1 <= drawn <= experts:
            raise InputError(f"num_experts_per_tok={drawn} must lie between 1 and num_local_experts={experts}")

    def _check_kinds(self) -> None:
        """Refuse values of types invalid in `HfllmConfig`, since they would be counted wrongly."""
        check_sizes(self, *_REQUIRED, "num_experts_per_tok")
        check_sizes(self, "num_local_experts", *([] if self.loss_chunk_size is None else ["loss_chunk_size"]), least=0)
        for name, accepted in CHOICES.items():
            check_choice(f"{name}={getattr(self, name)!r} is not one of", getattr(self, name), accepted)
        for item in fields(self):
            value = getattr(self, item.name)
            is_unset = value is None and item.default is None
            if "bool" in str(item.type) and not (isinstance(value, bool) or is_unset):
                raise InputError(f"{item.name}={value!r} must be true or false")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config") -> "Shape":
        """Return the shape of a configuration.

        Args:
            config: fields of `HfllmConfig`, or the content of a config.json of a convertible family. The latter is
                read by its class in transformers and by the conversion's table, both importing torch.
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
            kwargs = {item.name: values[item.name] for item in fields(cls) if values.get(item.name) is not None}
            missing = [name for name in _REQUIRED if name not in kwargs]
            if missing:
                raise InputError(f"{missing[0]} is missing")
            return cls(**kwargs)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def _with_tower(cls, config: Mapping[str, Any], source: str) -> "Shape":
        """Return the shape of a model of Llava's layout, ours or another."""
        text = config.get("text_config")
        if not isinstance(text, Mapping) or text.get("model_type", "llama") in list(WITH_TOWER):
            raise InputError(f"{source}: text_config must be the config of a text model")
        refuse_if("vision_config" not in config, f"{source}: vision_config is missing")
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
        """Return the inner width of the experts shared by all tokens, together; 0 without."""
        if not self.num_local_experts:
            return 0
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.expert_size

    def dense_layers(self, start: int = 0, stop: int | None = None) -> int:
        """Return the number of these layers of a mixture with one dense MLP in place of experts."""
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
        """Return the weights of the latents' norms, always without biases."""
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
        """Return the additional parameters of a dense layer of `mlp_layer_types` over a sparse one, by part."""
        layer = self._layer
        dense = self._mlp(self.intermediate_size) - layer["mlp"]
        return {"mlp": dense, "experts": -layer["experts"], "router": -layer["router"]}

    def _linear_change(self) -> dict[str, int]:
        """Return the additional parameters of a layer of linear attention over one of another type, by part."""
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
            active_only: count only the active experts of one token.
        """
        parts = self.parameters()
        if active_only and self.num_local_experts:
            parts["experts"] = parts["experts"] * self.num_experts_per_tok // self.num_local_experts
        return sum(parts.values())

    def multiplied_parameters(self) -> int:
        """Return the parameters multiplied with every token: no tables, no idle experts, and no vision tower."""
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
        cached_tokens = {"full_attention": length, "sliding_attention": min(length, self.sliding_window or length)}
        cached_tokens["chunked_attention"] = min(length, self.attention_chunk_size or length)
        tokens = sum(cached_tokens.get(kind, 0) for kind in self.layer_types)
        return tokens * self.cached_size * bytes_per_value + 4 * self.linear_layers * self.state_size


def _converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the family of a config.json of another architecture, as `hfllm.from_native` reads it."""
    from hfllm.models.conversion.convert import fields_from_native

    return fields_from_native(config)


# ---- mixed layers ----
# The cost of layers of different types: keys scored with a query, and bytes kept by linear attention.
# The sizes of blocks and pieces are copied from `attention_masks_hfllm.py` and `delta_rule_hfllm.py`, which import
# torch; a test compares them.


SMALLEST_BLOCK = 64


def banded_keys(window: int, length: int) -> int:
    """Return the number of keys scored per query in a layer with a window, by this family's attention in blocks.

    A block of half a window reads all keys within its reach. Texts of less than two such reaches are scored whole.
    """
    block = max(-(-window // 2), SMALLEST_BLOCK)
    reach = block * (1 + -(-(window - 1) // block))
    return reach if length > 2 * reach else length


def scored_keys(shape: Shape, length: int, attention: str = "flash") -> int:
    """Return the number of keys scored per token, over all layers. `"eager"` attention also scores masked keys."""
    keys = {"full_attention": length, "linear_attention": 0}
    # Chunks are computed as a window of their size.
    for kind, window in (
        ("sliding_attention", shape.sliding_window),
        ("chunked_attention", shape.attention_chunk_size),
    ):
        keys[kind] = length if attention == "eager" else banded_keys(window or length, length)
    return sum(keys[kind] for kind in shape.layer_types)


def chunk_and_piece(key_head_dim: int, rows: int, length: int) -> tuple[int, int]:
    """Return the tokens of a chunk and of a piece in this family's linear attention.

    Args:
        rows: heads times sequences of a batch.
    """
    chunk = min(32 if key_head_dim <= 64 else 64, length)
    return chunk, chunk * max(1, max(256, 4096 // rows) // chunk)


def linear_mixer_bytes(shape: Shape, size: int, sequences: int, length: int) -> float:
    """Return the bytes per token kept by a layer of linear attention, without the input of its projections.

    These are the outputs of its projections, their decays and strengths, the input of the last projection, and the
    state before each recomputed piece.

    Args:
        size: bytes per value of inputs and outputs of matrix products.
        sequences: rows of a micro-batch.
    """
    heads = shape.linear_num_value_heads
    keys, values = shape.linear_num_key_heads * shape.linear_key_head_dim, heads * shape.linear_value_head_dim
    _, piece = chunk_and_piece(shape.linear_key_head_dim, heads * sequences, length)
    states = 4 * shape.state_size * -(-length // piece) / length
    # Of the decays the argument and the result of softplus and their product; strengths and their sigmoids.
    return size * (2 * keys + 3 * values) + (12 + 2 * size) * heads + states

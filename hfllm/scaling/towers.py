"""Count a vision tower: its parameters, the tokens that a picture takes in a row, and the work of a picture.

    tower = Tower.from_config(config, text_size=4096)  # of a config.json with a vision_config
    tower.num_parameters(), tower.tokens, tower.flops_per_picture()

Names in formulas: h hidden_size, l layers, p patch_size, c channels, n patches of a picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfllm.errors import InputError

LARGEST = 10**6
# Types of models with a vision tower, and their text models where a config names none.
WITH_TOWER = {"hfllm_vision": "hfllm", "llava": "llama"}
# Types of towers whose weights are counted exactly, and whether the first vector stands for the whole picture.
CLASS_VECTOR = {"siglip_vision_model": False, "clip_vision_model": True, "vit": True, "dinov2": True}


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower with the projector of Llava behind it.

    Args:
        model_type: one of `CLASS_VECTOR`.
        hidden_size, intermediate_size, num_hidden_layers, image_size, patch_size, num_channels: of the tower.
        has_head: whether it has a pooling head, which no text model reads.
        text_size: width of the text model.
        num_layers_read: layers whose vectors are joined.
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
            InputError: for another type of tower, or a size that is missing or impossible.
        """
        vision = config["vision_config"]
        where = f"{source}: vision_config"
        if not isinstance(vision, Mapping):
            raise InputError(f"{where} must be an object, got {type(vision).__name__}")
        kind = vision.get("model_type")
        # A list, since what a file holds may have no hash.
        if kind not in list(CLASS_VECTOR):
            raise InputError(f"{where}: model_type {kind!r} is not one of {', '.join(CLASS_VECTOR)}")
        hidden = _size(vision, "hidden_size", where)
        wide = hidden * _size(vision, "mlp_ratio", where, 4) if kind == "dinov2" else None
        layers = config.get("vision_feature_layer", -1)
        made = cls(
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
        if made.patch_size > made.image_size:
            raise InputError(f"{where}: patch_size={made.patch_size} is more than image_size={made.image_size}")
        return made

    @property
    def patches(self) -> int:
        """Return the patches of a picture, n."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def vectors(self) -> int:
        """Return the vectors inside the tower, n or n + 1."""
        return self.patches + CLASS_VECTOR[self.model_type]

    @property
    def tokens(self) -> int:
        """Return the tokens that a picture takes in a row of the text model."""
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
        """Return the FLOPs of training on one picture: 6 per multiplied parameter and vector, 12 h n in scores.

        As for text models: three passes of two FLOPs, every vector attends to all others.
        """
        multiplied = self.num_hidden_layers * self.layer_parameters() + self.projector_parameters()
        multiplied += self.num_channels * self.patch_size**2 * self.hidden_size
        scores = 12 * self.num_hidden_layers * self.hidden_size * self.vectors
        return float(self.vectors * (6 * multiplied + scores))

    def activation_bytes_per_picture(self, bytes_per_value: int, is_recomputed: bool = False) -> float:
        """Return the bytes that training keeps of one picture.

        Per vector and layer: the inputs of both norms and of what follows them, queries, keys, values and attention's
        output (8 h), and an MLP's inner states before and after its activation. Scores are not kept.

        Args:
            is_recomputed: whether only each layer's input is kept.
        """
        layer = self.hidden_size if is_recomputed else 8 * self.hidden_size + 2 * self.intermediate_size
        projector = self.num_layers_read * self.hidden_size + 2 * self.text_size
        return float(self.vectors * (self.num_hidden_layers * layer + projector) * bytes_per_value)


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        what = "is missing" if value is None else f"{value!r} must be a whole number from 1 to {LARGEST:,}"
        raise InputError(f"{where}: {name} {what}" if value is None else f"{where}: {name}={what}")
    return value

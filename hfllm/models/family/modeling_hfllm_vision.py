"""A vision-language model: a vision tower, a projector and an hfllm decoder, as in Llava (arXiv:2310.03744).

Where the prompt has image tokens, the projected vectors of the images replace their embeddings; from there
on it is the text model, with its logits and losses.

This file imports only torch, transformers and files next to it, and is uploaded to the Hub with the weights.
Shapes: B batch, S sequence, E hidden_size, I images of the batch.
"""

from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_hfllm import HfllmConfig
from .configuration_hfllm_vision import HfllmVisionConfig, picture_size
from .modeling_hfllm import CausalHead, HfllmModel, keep_module

# Arguments of `generate` for images: the images, or the outputs of the tower for them.
PICTURES = ("pixel_values", "mm_encoder_outputs")
# Arguments of the tower; the rest are for the decoder.
OF_TOWER = ("output_attentions", "interpolate_pos_encoding")


@dataclass
class HfllmVisionModelOutput(MoeModelOutputWithPast):
    """The decoder's states, and in `image_outputs` the tower's, with projected vectors as its `pooler_output`."""

    image_outputs: ModelOutput | None = None


@dataclass
class HfllmVisionOutput(MoeCausalLMOutputWithPast):
    """A language model's output, and in `image_outputs` the tower's."""

    image_outputs: ModelOutput | None = None


class HfllmVisionPreTrainedModel(LlavaPreTrainedModel):
    config: HfllmVisionConfig

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        keep_module(cls)

    def __init__(self, config: HfllmVisionConfig, *args: object, **kwargs: object):
        # Again, since fields may have been set after the config was built.
        config.validate_architecture()
        # Not the next class in line: it is Llava's and would build the same parts as here.
        PreTrainedModel.__init__(self, config, *args, **kwargs)
        self._is_stateful = "linear_attention" in config.text_config.layer_types

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return whether the experts can run by other functions; transformers looks for them only in this file."""
        return True


class HfllmVisionModel(HfllmVisionPreTrainedModel, LlavaModel):
    """Tower, projector and decoder, without a head."""

    def __init__(self, config: HfllmVisionConfig):
        HfllmVisionPreTrainedModel.__init__(self, config)
        # A tower with code of its own is none of transformers'.
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        # Not through AutoModel, where code loaded from the Hub is not registered.
        self.language_model = HfllmModel(config.text_config)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HfllmVisionModelOutput:
        """Return the decoder's last hidden states (B, S, E).

        Args:
            pixel_values: (I, channels, height, width), in their order in the batch.
            mm_encoder_outputs: instead of pixels, `{"image": what get_image_features returned}`.

        Raises:
            ValueError: when there are more or fewer image tokens than vectors of the images, or images of
                a size unsupported by the tower.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("give pixel_values or mm_encoder_outputs['image'], not both")
        to_tower = {name: kwargs[name] for name in OF_TOWER if name in kwargs}
        kwargs.pop("interpolate_pos_encoding", None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **to_tower,
            )
        if image_outputs is not None:
            vectors = torch.cat(tuple(image_outputs.pooler_output), dim=0).to(
                inputs_embeds.device, inputs_embeds.dtype
            )
            indices = self.get_placeholder_mask(input_ids, inputs_embeds, vectors)
            inputs_embeds = inputs_embeds.masked_scatter(indices, vectors)
        elif (
            not torch.compiler.is_compiling()
            and input_ids is not None
            and (cache is None or cache.get_seq_length() == 0)
        ):
            self._check_no_image_tokens(input_ids)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return HfllmVisionModelOutput(**outputs, image_outputs=image_outputs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: object) -> ModelOutput | tuple:
        """Return the tower's output, with one list of projected vectors per image as its `pooler_output`.

        Args:
            pixel_values: (I, channels, height, width).
            kwargs: `vision_feature_layer`, `vision_feature_select_strategy`, `image_sizes`, and the tower's arguments.

        Raises:
            ValueError: for images of a size unsupported by the tower.
        """
        size, input_size = picture_size(self.config.vision_config), tuple(pixel_values.shape[-2:])
        if size is not None and input_size != size and not kwargs.get("interpolate_pos_encoding"):
            raise ValueError(
                f"pictures of {input_size[0]}x{input_size[1]} pixels do not fit the tower, which takes "
                f"{size[0]}x{size[1]} (image_size): make the processor with that size, or give "
                "interpolate_pos_encoding=True"
            )
        return super().get_image_features(pixel_values=pixel_values, **kwargs)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Return the positions for the vectors of images, (B, S, 1).

        Args:
            input_ids: (B, S), or `None`, and then image tokens are known by their embedding.
            inputs_embeds: (B, S, E).
            image_features: (vectors, E).

        Raises:
            ValueError: with both counts, when there are more or fewer image tokens than vectors.
        """
        token = self.config.image_token_id
        if input_ids is None:
            ids = torch.full((), token, dtype=torch.long, device=inputs_embeds.device)
            indices = (inputs_embeds == self.get_input_embeddings()(ids)).all(-1)
        else:
            indices = input_ids == token
        vectors = image_features.shape[0]
        # A compiler cannot look at numbers, and copies in the order of rows whatever there is.
        if not torch.compiler.is_compiling() and (count := int(indices.sum())) != vectors:
            raise ValueError(
                f"the prompts have {count} image tokens (id {token}) and their pictures have {vectors} vectors: each "
                "picture needs as many image tokens as it has vectors, which its processor writes"
            )
        return indices.unsqueeze(-1).to(inputs_embeds.device)

    def _check_no_image_tokens(self, input_ids: torch.LongTensor) -> None:
        if not torch.compiler.is_compiling() and (count := int((input_ids == self.config.image_token_id).sum())):
            raise ValueError(
                f"the prompts have {count} image tokens (id {self.config.image_token_id}) and no pictures: give "
                "pixel_values"
            )


class HfllmForConditionalGeneration(
    HfllmVisionPreTrainedModel, CausalHead, LlavaForConditionalGeneration, GenerationMixin
):
    """The vision-language model: text and images in, the next token out."""

    def __init__(self, config: HfllmVisionConfig):
        HfllmVisionPreTrainedModel.__init__(self, config)
        text = config.text_config
        self.model = HfllmVisionModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.lm_head_bias)
        self.post_init()

    @property
    def _decoder(self) -> PreTrainedModel:
        return self.model.language_model

    @property
    def _decoder_config(self) -> HfllmConfig:
        return self.config.text_config

    @wraps(CausalHead.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs) -> ModelOutput | torch.LongTensor:
        # transformers would look at images of value None.
        none = [name for name in ("pixel_values", "image_sizes") if name in kwargs and kwargs[name] is None]
        return super().generate(inputs, *args, **{name: kwargs[name] for name in kwargs if name not in none})

    @wraps(CausalHead.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args, **kwargs) -> dict:
        cache, has_pictures = kwargs.get("cache"), any(kwargs.get(name) is not None for name in PICTURES)
        if has_pictures and kwargs.get("next_sequence_length") != 1 and (cache is None or not cache.get_seq_length()):
            # transformers calls no pass of an assistant the first, and would read its prompt without the images.
            kwargs["is_first_iteration"] = True
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _output(self, outputs: ModelOutput, **fields: object) -> HfllmVisionOutput:
        return HfllmVisionOutput(**fields, image_outputs=outputs.image_outputs)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_chunk_size: int | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HfllmVisionOutput:
        """Return next-token logits, and the loss when `labels` are given.

        Args:
            pixel_values: (I, channels, height, width), in their order in the batch.

        The other arguments, and the losses, are as in `HfllmForCausalLM.forward`.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "use_cache": use_cache,
            "image_sizes": image_sizes,
            "mm_encoder_outputs": mm_encoder_outputs,
        }
        return self._run(inputs, labels, output_router_logits, logits_to_keep, loss_chunk_size, **kwargs)


class HfllmVisionForSequenceClassification(GenericForSequenceClassification, HfllmVisionPreTrainedModel):
    """Scores of a text with its images, at the last non-padding token: reward models (`num_labels=1`)."""

    def __init__(self, config: HfllmVisionConfig):
        # The mixin's own __init__ finds the trunk through AutoModel, where code loaded from the Hub is not registered.
        HfllmVisionPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfllmVisionModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Return logits (B, num_labels), and the loss when `labels` are given.

        Args:
            pixel_values: (I, channels, height, width), in their order in the batch.
            kwargs: as in `HfllmVisionModel.forward`, and `return_dict`.
        """
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


__all__ = [
    *("HfllmForConditionalGeneration", "HfllmVisionForSequenceClassification", "HfllmVisionModel"),
    "HfllmVisionPreTrainedModel",
]

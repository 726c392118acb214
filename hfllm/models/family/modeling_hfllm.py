"""The hfllm family: one transformer, its heads and its chunked loss, all chosen by the config.

This file imports only torch, transformers and files next to it, all saved and uploaded with the weights
(`auto_map`). Attention and its masks are in attention_hfllm.py; embeddings, norms and MLPs in layers_hfllm.py; experts
and their router in experts_hfllm.py; logits and losses are here.
Shapes: B batch, S sequence, E hidden_size. `HfllmDecoderLayer.forward` says where each option of the config acts.
"""

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MaskedLMOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hfllm import (
    HfllmAttention,
    HfllmLatentAttention,
    build_rotary,
    check_implementation,
    check_softcap,
    create_masks,
    keep_last_sequences,
    packed_sequences,
    positions_of_sequences,
    refuse_paging,
    restarted_positions,
    rotation_changes,
)
from .configuration_fields_hfllm import follow_edits, has_sparse_sizes
from .configuration_hfllm import HfllmConfig
from .experts_hfllm import (
    HfllmExperts,
    HfllmRouter,
    balance_loss,
    build_mlp,
    check_gradients,
    counts_load,
    fp32_names,
    init_experts,
    install_capturing_hooks,
    last_projections,
)
from .layers_hfllm import (
    HfllmEmbedding,
    HfllmPositionEmbedding,
    HfllmScore,
    build_norm,
    check_positions,
    is_unobserved,
    layer_norms,
    needs_autograd,
    saves_memory,
)
from .linear_attention_hfllm import HfllmGatedDeltaNet, init_gated_delta_net
from .real_tokens_hfllm import real_tokens

# ---- head ----
#
# Logits, losses and generated text from a decoder's states, in text models and in vision-language models.
#
# Shapes: B batch, S sequence, E hidden_size.


if TYPE_CHECKING:
    # At run time it would be a second base of the classes with this mixin.
    _Base = GenerationMixin
else:
    _Base = object


def logits_of(config: HfllmConfig, head: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the head's scores of states (..., E), scaled and limited as the config says."""
    logits = head(hidden_states)
    logits = logits if config.logit_scale == 1 else logits * config.logit_scale
    softcap = config.final_logit_softcapping
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class CausalHead(_Base):
    """Logits, losses and generation of a model whose decoder is an `HfllmModel`.

    A class with this mixin has `model`, for the decoder's states, and `lm_head`. Where the decoder is a
    part of `model`, it overrides the two properties.
    """

    @property
    def _decoder(self) -> PreTrainedModel:
        """The decoder."""
        return self.model

    @property
    def _decoder_config(self) -> HfllmConfig:
        """The decoder's config."""
        return self.config

    def _output(self, outputs: ModelOutput, **fields: object) -> ModelOutput:
        """Return the output of `forward`, from the output of `model` and the fields of a language model's output."""
        return MoeCausalLMOutputWithPast(**fields)

    def _run(
        self,
        inputs: dict[str, Any],
        labels: torch.LongTensor | None,
        output_router_logits: bool | None,
        logits_to_keep: int | torch.Tensor,
        loss_chunk_size: int | None,
        **kwargs: object,
    ) -> ModelOutput:
        """Return logits and losses: see `HfllmForCausalLM.forward`.

        Args:
            inputs: the arguments of `model`, without the ones for the losses.
        """
        config = self._decoder_config
        # Not in the signature, where Trainer would take it for a label column because of its name.
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        is_balanced = self.training and labels is not None and config.router_aux_loss_coef > 0
        requested = config.output_router_logits if output_router_logits is None else output_router_logits
        output_router_logits = bool(config.num_local_experts) and (requested or is_balanced)
        if output_router_logits:
            install_capturing_hooks(self._decoder)
        if config.num_local_experts:
            kwargs["output_router_logits"] = output_router_logits
        # Trainer's evaluation gives the logits to `compute_metrics`; a call with its own chunks needs none.
        is_evaluation = loss_chunk_size is None and not self.training and not torch.is_grad_enabled()
        loss_chunk_size = config.loss_chunk_size if loss_chunk_size is None else loss_chunk_size
        reads_targets = labels is not None and loss_chunk_size and self.training and "is_read" not in kwargs
        if reads_targets and self.model is self._decoder:
            targets = kwargs.get("shift_labels")
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=-100) if targets is None else targets
            inputs = {**inputs, "is_read": targets != kwargs.get("ignore_index", -100)}
        outputs = self.model(**inputs, **kwargs)
        states, logits, loss, aux_loss = outputs.last_hidden_state, None, None, None
        if labels is None or not loss_chunk_size or is_evaluation:
            logits = logits_of(config, self.lm_head, slice_logits_to_keep(states, logits_to_keep))
        if labels is not None:
            whole = None if loss_chunk_size else logits
            loss = self._loss(states, whole, labels, loss_chunk_size, label_smoothing, **kwargs)
        if output_router_logits:
            aux_loss = balance_loss(config, outputs.router_logits, inputs.get("attention_mask"))
            if is_balanced:
                check_gradients(self._decoder.layers, outputs.router_logits, states)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        return self._output(
            outputs,
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _loss(self, hidden_states, logits, labels, chunk_size, label_smoothing, **kwargs) -> torch.Tensor:
        config = self._decoder_config
        if logits is not None and not label_smoothing:
            return self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        targets, num_items = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
        ignored = kwargs.get("ignore_index", -100)
        if targets is None:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)
        targets = targets.reshape(-1).to(hidden_states.device)
        states = hidden_states.flatten(0, 1) * config.logit_scale
        chunk_size = chunk_size or len(targets)
        softcap = config.final_logit_softcapping
        total = linear_cross_entropy(states, self.lm_head, targets, chunk_size, label_smoothing, ignored, softcap)
        return total / ((targets != ignored).sum() if num_items is None else num_items)

    @wraps(GenerationMixin.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs) -> ModelOutput | torch.LongTensor:
        return super().generate(inputs, *args, **keep_last_sequences(inputs, kwargs))

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args, **kwargs) -> dict:
        kwargs = self._with_one_rotation(input_ids, kwargs)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("position_ids") is not None:
            # Here, outside of a possibly compiled forward.
            mask = kwargs.get("attention_mask")
            length = max(input_ids.shape[1], mask.shape[-1] if isinstance(mask, torch.Tensor) else 0)
            self._decoder.check_context(length, inputs["position_ids"])
        return inputs

    def _with_one_rotation(self, input_ids: torch.LongTensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments for reading all tokens again where `longrope` changes its factors, as in Phi-3.

        The cache is emptied for this.

        Raises:
            ValueError: when the tokens in the cache are not known.
        """
        cache, embeds = kwargs.get("cache"), kwargs.get("inputs_embeds")
        prompt = embeds if kwargs.get("is_first_iteration") and embeds is not None else input_ids
        new = kwargs.get("next_sequence_length") or prompt.shape[1]
        if not rotation_changes(self._decoder_config, cache, kwargs.get("position_ids"), new):
            return kwargs
        length = int(cache.get_seq_length()) + new
        kwargs = {**kwargs, "next_sequence_length": None, "is_first_iteration": True}
        if embeds is not None and 0 <= (later := length - embeds.shape[1]) <= input_ids.shape[1]:
            # Generated tokens follow a prompt given as embeddings.
            generated = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] - later :])
            kwargs["inputs_embeds"] = torch.cat((embeds, generated.to(embeds)), dim=1)
        elif input_ids.shape[1] < length:
            raise ValueError(
                f"rope_type='longrope' has other factors for {length} tokens than for those in the cache, which are "
                "not known here: give all input_ids, and no prefill_chunk_size"
            )
        cache.reset()
        return kwargs

    @wraps(GenerationMixin.init_continuous_batching)
    def init_continuous_batching(self, *args, **kwargs) -> object:
        refuse_paging(self._decoder_config)
        return super().init_continuous_batching(*args, **kwargs)


# ---- modeling ----


class HfllmDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP around a residual stream."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.norm_placement, norms = layer_norms(config, self.layer_type)
        self.parallel_block, self.shared_norm = config.parallel_block, config.shared_norm
        self.hidden_dropout = config.hidden_dropout
        if self.layer_type == "linear_attention":
            self.linear_attn = attention = HfllmGatedDeltaNet(config, layer_idx)
        else:
            kind = HfllmLatentAttention if config.kv_lora_rank else HfllmAttention
            self.self_attn = attention = kind(config, layer_idx)
        self.mlp = build_mlp(config, layer_idx)
        for name in norms:
            setattr(self, name, build_norm(config, config.hidden_size))
        # For _init_weights: it gets the two projections into the residual stream one at a time.
        residual_terms = {"plain": 1, "gpt2": 2 * config.num_hidden_layers, "depth": 2 * (layer_idx + 1)}
        for module in (attention.o_proj, *last_projections(self.mlp)):
            module.residual_init_scale = residual_terms[config.residual_init] ** -0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map (B, S, E) to (B, S, E). Where each option of the config acts:

        - `norm_placement`, `parallel_block` and `shared_norm` select one of the four paths through this function;
        - `norm_type`, `norm_bias` and `norm_unit_offset` are inside the norms;
        - `position_embedding_type`: rotary angles come in as `position_embeddings`, learned positions were added
          before the first layer;
        - `is_causal`, `layer_types` and `sliding_window` are in `attention_mask`; grouped queries, `qk_norm` and
          `no_rope_layers` in `self.self_attn`;
        - layers of linear attention have `self.linear_attn` instead, and no rotary angles;
        - `mlp_type`, `hidden_act`, `mlp_layer_types` and experts are inside `self.mlp`.
        """

        def attention(states: torch.Tensor) -> torch.Tensor:
            if self.layer_type == "linear_attention":
                return self._drop(self.linear_attn(states, attention_mask=attention_mask, **kwargs))
            output, _ = self.self_attn(
                hidden_states=states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return self._drop(output)

        def mlp(states: torch.Tensor) -> torch.Tensor:
            # For the load of experts, where a bias follows it.
            return self._drop(self.mlp(states) if token_mask is None else self.mlp(states, token_mask))

        if self.norm_placement == "post":
            hidden_states = self.input_layernorm(hidden_states + attention(hidden_states))
            return self.post_attention_layernorm(hidden_states + mlp(hidden_states))
        if self.norm_placement in ("output", "both"):
            has_both = self.norm_placement == "both"
            states = attention(self.input_layernorm(hidden_states) if has_both else hidden_states)
            hidden_states = hidden_states + self.post_attention_layernorm(states)
            states = mlp(self.pre_feedforward_layernorm(hidden_states) if has_both else hidden_states)
            return hidden_states + self.post_feedforward_layernorm(states)
        normed = self.input_layernorm(hidden_states)
        if self.parallel_block:
            mlp_input = normed if self.shared_norm else self.post_attention_layernorm(hidden_states)
            return hidden_states + attention(normed) + mlp(mlp_input)
        tokens = kwargs.get("tokens")
        residual = hidden_states if tokens is None else tokens.drop_unread(hidden_states)
        hidden_states = residual + attention(normed)
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        p = self.hidden_dropout
        return nn.functional.dropout(states, p, training=True) if self.training and p else states


def keep_module(cls: type[PreTrainedModel]) -> None:
    """Give a class derived by torch from a model's own at run time, as in `fully_shard`, the latter's module.

    `save_pretrained` copies the module's file and its imports: otherwise torch's instead of this one.
    """
    if cls.__module__.startswith("torch."):
        cls.__module__ = next(base.__module__ for base in cls.__mro__[1:] if issubclass(base, PreTrainedModel))


class HfllmPreTrainedModel(PreTrainedModel):
    config: HfllmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfllmDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HfllmDecoderLayer,
        "attentions": HfllmAttention,
        "router_logits": OutputRecorder(HfllmRouter, index=0),
    }

    def __init_subclass__(cls, **kwargs: object):
        super().__init_subclass__(**kwargs)
        keep_module(cls)

    def __init__(self, config: HfllmConfig, *args: object, **kwargs: object):
        # Again, since fields may have been set after the config was built.
        follow_edits(config)
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)
        # So that transformers before 5.25, whose caches cannot undo a state, refuses speculative decoding.
        self._is_stateful = "linear_attention" in config.layer_types
        self._keep_in_fp32_modules_strict = fp32_names(config)

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        """Return whether SDPA computes this model; transformers falls back to eager attention where it was no wish."""
        if self.config.attn_logit_softcapping is not None:
            check_softcap("sdpa")
        return super()._sdpa_can_dispatch(is_init_check)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: object, **kwargs: object
    ) -> str:
        """Return the attention function to use; if none is given, the one implied by the sizes in the config.

        Raises:
            ValueError: when it cannot compute this model.
        """
        if attn_implementation is None and has_sparse_sizes(self.config):
            attn_implementation = "sparse"
        chosen = super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        check_implementation(chosen, self.config)
        return chosen

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return whether the experts can run by other functions; transformers looks for them only in this file."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        residual_std = std * getattr(module, "residual_init_scale", 1.0)
        if isinstance(module, nn.Linear) and residual_std != std:
            init.normal_(module.weight, mean=0.0, std=residual_std)
        elif getattr(module, "unit_offset", False):
            init.zeros_(module.weight)
        elif isinstance(module, HfllmGatedDeltaNet):
            init_gated_delta_net(module, self.config)
        elif isinstance(module, (HfllmRouter, HfllmExperts)):
            init_experts(module, std, residual_std)


class HfllmModel(HfllmPreTrainedModel):
    """The trunk: embeddings, layers and a final norm, absent only from post-norm models."""

    def __init__(self, config: HfllmConfig):
        super().__init__(config)
        self.embed_tokens = HfllmEmbedding(config)
        if config.position_embedding_type == "learned":
            self.embed_positions = HfllmPositionEmbedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding_type == "rope":
            self.rotary_emb = build_rotary(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(HfllmDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size) if config.norm_placement != "post" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        is_read: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Return the last hidden states (B, S, E).

        `is_read` (B, S) is a hint: other states, and padding, need not be computed, and may be 0 then.

        Rows of `position_ids` that restart (fall, or return to 0) hold packed sequences without attention to each
        other. They need `cache=None` and are computed without one. Positions that jump forward are one sequence.
        Without `position_ids`, `cu_seq_lens_q` (in `kwargs`, for flash kernels) gives their beginnings.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Checkpointed layers would go without it, and the tokens read before would count for nothing.
            raise ValueError(
                f"activation checkpointing in training takes no cache, got a {type(cache).__name__}: "
                "turn one of them off (model.activation_checkpointing_disable())"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None and cache is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = positions_of_sequences(kwargs["cu_seq_lens_q"], *inputs_embeds.shape[:2])
        # `generate` makes the masks itself where it compiles the forward.
        masks = attention_mask if isinstance(attention_mask, dict) else None
        packed = packed_sequences(position_ids, attention_mask) if cache is None and masks is None else None
        if use_cache and cache is None and packed is None and self.config.is_causal:
            cache = DynamicCache(config=self.config)
        # Rows with equal tokens are equal where positions are counted.
        shared_ids = input_ids if position_ids is None else None
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        tokens = None
        is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == inputs_embeds.shape[:2]
        if is_padding and cache is None and packed is None:
            attention_mask, tokens = real_tokens(self, attention_mask, is_read, shared_ids)
        if masks is None:
            masks = create_masks(self.config, inputs_embeds, attention_mask, cache, packed)
        hidden_states, rotations = self._embed(inputs_embeds, position_ids, cache)
        if "flash" in self.config._attn_implementation:
            # Flash kernels take no mask and split a row wherever its positions jump.
            position_ids = None if packed is None else restarted_positions(packed)
        if tokens is not None:
            hidden_states, rotations = tokens.pick(hidden_states), tokens.pick_rotations(rotations)
        more = {"position_ids": position_ids, "cache": cache, "use_cache": use_cache, **kwargs}
        hidden_states = self.norm(self._layers(hidden_states, rotations, masks, tokens, packed, attention_mask, more))
        if tokens is not None:
            hidden_states = tokens.rows_of_read(hidden_states)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)

    def _layers(self, hidden_states, rotations, masks, tokens, packed, attention_mask, kwargs) -> torch.Tensor:
        """Return the last layer's output; rotations and masks are by type of layer where types differ."""
        last = self.config.num_hidden_layers - 1
        # Not a slice: it would make a new ModuleList for every generated token.
        for layer, index in zip(self.layers, range(last + 1), strict=False):
            # A layer in a wrapper has no type to ask for.
            kind = getattr(layer, "layer_type", None) or self.config.layer_types[index]
            more = {"packed": packed} if kind == "linear_attention" else {}
            if tokens is not None:
                more["tokens"] = tokens if index == last else tokens.all_read
            if self.training and counts_load(self.config, index, attention_mask):
                more["token_mask"] = attention_mask
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_embeddings=rotations.get(kind) if isinstance(rotations, dict) else rotations,
                **more,
                **kwargs,
            )
        return hidden_states

    @property
    def computes_by_token(self) -> bool:
        """Whether padding is left out now: only attention looks at a batch's shape, and nobody observes the layers."""
        if (torch.is_grad_enabled() and not (self.training and saves_memory())) or self.gradient_checkpointing:
            return False
        if torch.compiler.is_compiling() or needs_autograd():
            return False
        config = self.config
        if config.num_local_experts or config.kv_lora_rank or config._attn_implementation != "sdpa":
            return False
        kinds = (HfllmDecoderLayer, HfllmAttention)
        is_known = all((type(each), type(getattr(each, "self_attn", None))) == kinds for each in self.layers)
        return is_known and is_unobserved(*self.layers.modules(), self.norm)

    def _embed(self, inputs_embeds, position_ids, cache=None):
        """Return the first layer's input, and the rotary cosines and sines if there are any, perhaps by layer type."""
        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "learned":
            # A static cache counts on its device; `prepare_inputs_for_generation` checks for it.
            past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
            self.check_context(inputs_embeds.shape[1] + (past if isinstance(past, int) else 0), position_ids)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        return self.dropout(hidden_states) if self.training else hidden_states, position_embeddings

    def check_context(self, length: int, position_ids: torch.Tensor) -> None:
        """Refuse positions beyond a table of learned ones.

        Args:
            length: tokens so far, cache and padding included. Only where these are more than the table has are the
                positions themselves checked, and a GPU must wait: with padding they may be lower.
            position_ids: (B, S).

        Raises:
            ValueError: naming the position and `max_position_embeddings`.
        """
        size = self.config.max_position_embeddings
        if length > size and self.config.position_embedding_type == "learned":
            highest = torch.full((1,), length - 1) if torch.compiler.is_compiling() else position_ids
            check_positions(highest, size)


class _HfllmWithHead(HfllmPreTrainedModel):
    """The trunk with a linear head, tied to the embeddings if the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfllmConfig):
        super().__init__(config)
        if config.is_causal != self.is_causal:
            raise ValueError(f"{type(self).__name__} needs is_causal={self.is_causal}, got {config.is_causal}")
        self.model = HfllmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


class HfllmForCausalLM(_HfllmWithHead, CausalHead, GenerationMixin):
    """The causal language model: every position predicts the next token."""

    is_causal = True

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """Return next-token logits, and the loss when `labels` are given (shifted inside; -100 is ignored).

        Args:
            logits_to_keep: limits the head to so many last positions, or to the positions of a tensor.
            loss_chunk_size: with labels, compute the loss over this many tokens at a time and return no logits;
                0 means all at once. `None` follows the config, and in evaluation without gradients there are logits
                too, for Trainer's `compute_metrics`.
            label_smoothing: (in `kwargs`) share of the target spread over all tokens (arXiv:1512.00567, section 7).
            ignore_index: (in `kwargs`) the ignored label instead of -100.
            output_router_logits: with experts, return the routers' logits and the auxiliary loss, and add it to the
                loss. `None` follows the config; in training with labels this is always done.

        With `num_items_in_batch` in `kwargs` the loss is a sum divided by it instead of a mean over targets.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        return self._run(inputs, labels, output_router_logits, logits_to_keep, loss_chunk_size, **kwargs)


class HfllmForMaskedLM(_HfllmWithHead):
    """A bidirectional trunk with the same head, trained to restore masked tokens (Devlin et al. 2018)."""

    is_causal = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Return logits at every position, and the loss over positions whose label is not -100 (without a shift)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits, loss = logits_of(self.config, self.lm_head, outputs.last_hidden_state), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class HfllmForSequenceClassification(GenericForSequenceClassification, HfllmPreTrainedModel):
    """Scores at the last non-padding token: reward and value models (`num_labels=1`)."""

    def __init__(self, config: HfllmConfig):
        # The mixin's own __init__ finds the trunk through AutoModel, where code loaded from the Hub is not registered.
        HfllmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfllmModel(config)
        self.score = HfllmScore(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @wraps(GenericForSequenceClassification.forward)
    def forward(self, input_ids: torch.LongTensor | None = None, *args: Any, **kwargs: Any) -> ModelOutput:
        padding = self.config.pad_token_id
        if self.training and input_ids is not None and padding is not None:
            # The token whose state is read, as in the mixin.
            index = torch.arange(input_ids.shape[1], device=input_ids.device)
            last = torch.where(input_ids != padding, index, 0).argmax(-1, keepdim=True)
            kwargs.setdefault("is_read", index == last)
        return super().forward(input_ids, *args, **kwargs)


class HfllmForTokenClassification(GenericForTokenClassification, HfllmPreTrainedModel):
    """A score for every token: tagging, and per-token rewards or values."""

    def __init__(self, config: HfllmConfig):
        HfllmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfllmModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout if (p := config.classifier_dropout) is None else p)
        self.score = HfllmScore(config.hidden_size, config.num_labels)
        self.post_init()


class HfllmForQuestionAnswering(GenericForQuestionAnswering, HfllmPreTrainedModel):
    """Two scores for every token, of being the first and the last of the answer (Devlin et al. 2018, section 4.2)."""

    def __init__(self, config: HfllmConfig):
        HfllmPreTrainedModel.__init__(self, config)
        self.model = HfllmModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


# ---- loss ----
#
# The cross-entropy of a language model's head, computed per chunk of tokens without all logits at once.
#
# Shapes: N tokens, E hidden_size, V vocab_size.


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear head, computed per chunk of tokens together with its gradient."""

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, targets_N, chunk_size, label_smoothing, ignore_index, softcap, has_grad):
        needs_grad, trains_head = has_grad and any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        grad_hidden, grad_weight = torch.empty_like(hidden_NE), None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NE.device)
        for start in range(0, len(hidden_NE), chunk_size):
            rows = slice(start, start + chunk_size)
            mask = (targets_N[rows] != ignore_index).unsqueeze(1)
            column = targets_N[rows].unsqueeze(1).where(mask, 0)
            scores = nn.functional.linear(hidden_NE[rows], weight_VE)
            capped = None if softcap is None else torch.tanh(scores / softcap)
            scores = scores if softcap is None else softcap * capped
            probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
            # The highest probability is one over the sum of exp(score - highest): less time than a `log_softmax`.
            normalizer = scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
            score = scores.gather(1, column) - normalizer
            if label_smoothing:
                mean = scores.mean(-1, keepdim=True, dtype=torch.float32) - normalizer
                score = (1 - label_smoothing) * score + label_smoothing * mean
            total -= (score * mask).sum()
            if not needs_grad:
                continue
            # The gradient with respect to the logits: probabilities minus targets.
            grad = probabilities
            if label_smoothing:
                grad -= label_smoothing / len(weight_VE)
            grad.scatter_add_(1, column, grad.new_full((1, 1), label_smoothing - 1).expand_as(column))
            if capped is not None:
                # The derivative of c * tanh(x / c) is 1 - tanh(x / c)^2.
                grad *= 1 - capped.square()
            grad = grad.to(scores.dtype)
            grad_hidden[rows] = (grad @ weight_VE) * mask
            if not trains_head:
                continue
            hidden = (hidden_NE[rows] * mask).to(grad.dtype)
            if grad_weight is None:
                grad_weight = (grad.t() @ hidden).float()
            elif grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.t(), hidden)
            else:
                grad_weight += grad.t() @ hidden
        ctx.gradients = grad_hidden, grad_weight, weight_VE.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # In place, since a copy of the head's gradient would be the largest tensor here; this works only once.
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss has one backward pass only: use loss_chunk_size=0 to keep the graph")
        (grad_hidden, grad_weight, dtype), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight if grad_weight is None else grad_weight.mul_(grad_output).to(dtype)
        return grad_hidden.mul_(grad_output), grad_weight, *(None,) * 6


def linear_cross_entropy(
    hidden_NE: torch.Tensor,
    head: nn.Linear,
    targets_N: torch.Tensor,
    chunk_size: int,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of `head(hidden)`, summed over tokens, without holding all logits at once.

    Peak memory holds `chunk_size` rows of logits and one gradient of the head.

    Args:
        hidden_NE: the inputs of the head.
        head: a linear layer; a wrapped, hooked or sharded one is called as a module.
        targets_N: the indices of the rows' targets.
        chunk_size: rows at a time.
        label_smoothing: share of the target spread over all tokens.
        ignore_index: the target of ignored rows.
        softcap: soft limit c of the logits, `c * tanh(logits / c)`; `None` means no limit.

    Raises:
        ValueError: for a negative `chunk_size`.
    """
    if chunk_size < 0:
        raise ValueError(f"loss_chunk_size must be at least 0 or None, got {chunk_size}")
    weight, settings = head.weight, (chunk_size, label_smoothing, ignore_index, softcap, torch.is_grad_enabled())
    is_plain = type(head) is nn.Linear and head.bias is None and type(weight) is nn.Parameter
    is_plain = is_plain and weight.shape == (head.out_features, head.in_features)
    runs_once = needs_autograd() or not is_unobserved(head)
    if is_plain and not runs_once:
        return _LinearCrossEntropy.apply(hidden_NE, weight, targets_N, *settings)

    def chunk_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        options = {"reduction": "sum", "label_smoothing": label_smoothing, "ignore_index": ignore_index}
        scores = head(hidden)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        return nn.functional.cross_entropy(scores.float(), targets, **options)

    chunks = zip(hidden_NE.split(chunk_size), targets_N.split(chunk_size), strict=True)
    if runs_once:
        return sum(chunk_loss(*chunk) for chunk in chunks)
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)

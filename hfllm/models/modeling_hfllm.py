"""The hfllm family: one transformer whose norms, blocks, positions and attention are chosen by its config.

This file imports only torch, transformers and files beside it, which are saved and uploaded with the weights
(`auto_map`). Attention and its masks are in attention_hfllm.py; embeddings, norms and MLPs in layers_hfllm.py; experts
and their router in experts_hfllm.py; logits and losses in head_hfllm.py.
Shapes: B batch, S sequence, E hidden_size. `HfllmDecoderLayer.forward` says where each option of the config acts.
"""

import torch
from torch import nn
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
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_hfllm import (
    HfllmAttention,
    build_rotary,
    check_implementation,
    check_softcap,
    create_masks,
    packed_sequences,
    positions_of_sequences,
    restarted_positions,
)
from .balance_hfllm import counts_load
from .configuration_hfllm import HfllmConfig
from .experts_hfllm import HfllmExperts, HfllmRouter, build_mlp, fp32_names, init_experts, last_projections
from .head_hfllm import CausalHead, logits_of
from .latent_hfllm import HfllmLatentAttention
from .layer_types_hfllm import follow_edits, has_sparse_sizes
from .layers_hfllm import HfllmEmbedding, HfllmPositionEmbedding, build_norm, check_positions, layer_norms
from .linear_hfllm import HfllmGatedDeltaNet, init_gated_delta_net


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
        # For _init_weights, which gets the two projections into the residual stream one at a time.
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
        - layers of linear attention have `self.linear_attn` in its place, and no rotary angles;
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
        hidden_states = hidden_states + attention(normed)
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        p = self.hidden_dropout
        return nn.functional.dropout(states, p, training=True) if self.training and p else states


def keep_module(cls: type[PreTrainedModel]) -> None:
    """Give a class that torch derives from a model's own at run time, as `fully_shard` does, the latter's module.

    `save_pretrained` copies the module's file and what that imports: else torch's in place of this one.
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
        # So that transformers refuses to undo tokens, as speculative decoding does.
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
        """Return the attention function that is taken; if none is asked for, the one that the sizes in the config say.

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
        """Return whether the experts can run by other functions; transformers looks for them in this file alone."""
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
    """The trunk: embeddings, layers and a final norm, which only post-norm models lack."""

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Return the last hidden states (B, S, E).

        Rows of `position_ids` that restart (fall, or return to 0) hold packed sequences, which do not attend to each
        other. They need `cache=None` and are computed without one. Positions that jump forward are one sequence.
        Without `position_ids`, `cu_seq_lens_q` (in `kwargs`, for flash kernels) says where they begin.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # Checkpointed layers would go without it, and what was read before would count for nothing.
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
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        if masks is None:
            masks = create_masks(self.config, inputs_embeds, attention_mask, cache, packed)
        hidden_states, rotations = self._embed(inputs_embeds, position_ids, cache)
        if "flash" in self.config._attn_implementation:
            # Flash kernels take no mask and split a row wherever its positions jump.
            position_ids = None if packed is None else restarted_positions(packed)
        # Not a slice, which would make a new ModuleList for each generated token.
        for layer, index in zip(self.layers, range(self.config.num_hidden_layers), strict=False):
            # A layer in a wrapper has no type to ask for.
            kind = getattr(layer, "layer_type", None) or self.config.layer_types[index]
            more = {"packed": packed} if kind == "linear_attention" else {}
            if self.training and counts_load(self.config, index, attention_mask):
                more["token_mask"] = attention_mask
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=rotations.get(kind) if isinstance(rotations, dict) else rotations,
                **more,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

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
                positions themselves looked at, which makes a GPU wait: with padding they may be lower.
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
    """The causal language model: each position predicts the next token."""

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
            logits_to_keep: limits the head to that many last positions, or to the positions of a tensor.
            loss_chunk_size: with labels, compute the loss over this many tokens at a time and return no logits;
                0 means all at once. `None` follows the config, and in evaluation without gradients there are logits
                too, for Trainer's `compute_metrics`.
            label_smoothing: (in `kwargs`) share of the target spread over all tokens (arXiv:1512.00567, section 7).
            ignore_index: (in `kwargs`) the label that is ignored instead of -100.
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
    """Scores at the last token that is not padding: reward and value models (`num_labels=1`)."""

    def __init__(self, config: HfllmConfig):
        # The mixin's own __init__ finds the trunk through AutoModel, where code loaded from the Hub is not registered.
        HfllmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfllmModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HfllmForTokenClassification(GenericForTokenClassification, HfllmPreTrainedModel):
    """A score for every token: tagging, and per-token rewards or values."""

    def __init__(self, config: HfllmConfig):
        HfllmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfllmModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout if (p := config.classifier_dropout) is None else p)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HfllmForQuestionAnswering(GenericForQuestionAnswering, HfllmPreTrainedModel):
    """Two scores for every token, of being the first and the last of the answer (Devlin et al. 2018, section 4.2)."""

    def __init__(self, config: HfllmConfig):
        HfllmPreTrainedModel.__init__(self, config)
        self.model = HfllmModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    *("HfllmForCausalLM", "HfllmForMaskedLM", "HfllmForQuestionAnswering", "HfllmForSequenceClassification"),
    *("HfllmForTokenClassification", "HfllmModel", "HfllmPreTrainedModel"),
]

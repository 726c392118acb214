"""The hfllm family: one transformer whose norms, blocks, positions and attention are chosen by its config.

This file imports only torch, transformers and two files beside it, its config and its chunked loss: all three are
saved and uploaded with the weights (`auto_map`). Shapes: B batch, S sequence, H query heads, K key-value heads,
D head_dim, E hidden_size. `HfllmDecoderLayer.forward` says where each option of the config acts.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers import masking_utils
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MaskedLMOutput, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hfllm import HfllmConfig
from .loss_hfllm import linear_cross_entropy


def saves_memory() -> bool:
    """Return whether to save less for the backward pass than autograd does; a compiler decides that itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in fp32 that saves only its input for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        ctx.save_for_backward(hidden_states, weight)
        ctx.eps = eps
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight = ctx.saved_tensors
        inverse = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + ctx.eps)
        normed = hidden_states * inverse
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        grad = torch.addcmul(grad, normed, (grad * normed).mean(-1, keepdim=True), value=-1) * inverse
        return grad, grad_weight, None


class HfllmRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in fp32 (Zhang & Sennrich 2019, equation 4).

    With `unit_offset` the factor is `1 + weight`, multiplied in fp32 as Gemma does.
    """

    def __init__(self, size: int, eps: float, unit_offset: bool = False):
        super().__init__()
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype == torch.float32 and not self.unit_offset:
            if saves_memory():
                return _RMSNorm.apply(hidden_states, self.weight, self.eps)
            return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        normed = nn.functional.rms_norm(hidden_states.float(), self.weight.shape, eps=self.eps)
        if self.unit_offset:
            return (normed * (1.0 + self.weight.float())).to(hidden_states.dtype)
        return self.weight * normed.to(hidden_states.dtype)


def build_norm(config: HfllmConfig, size: int) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return HfllmRMSNorm(size, config.norm_eps, config.norm_unit_offset)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


class HfllmRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding (Su et al. 2021, equation 34), with transformers' scaling types."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        by_type = {**ROPE_INIT_FUNCTIONS, "default": self.compute_default_rope_parameters}
        inv_freq, self.attention_scaling = by_type[self.rope_type](config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: HfllmConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies `theta^(-2i/R)`, shape (R/2,), and the attention factor, which is 1 here.

        R is the number of rotated dimensions of a head: all of them unless `partial_rotary_factor` is set.
        """
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        # (B, 1, S, R); the minus sign is here so that `apply_rotary_pos_emb` need not negate half of every head.
        cos, sin = torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary_pos_emb(states_BHSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first dimensions of each head, as many as `cos` has; the others stay unchanged."""
    size = cos.shape[-1]
    if size == states_BHSD.shape[-1]:
        return torch.addcmul(states_BHSD * cos, states_BHSD.roll(size // 2, -1), sin)
    rotated, passed = states_BHSD.split((size, states_BHSD.shape[-1] - size), dim=-1)
    return torch.cat((apply_rotary_pos_emb(rotated, cos, sin), passed), dim=-1)


class HfllmEmbedding(nn.Embedding):
    """Token embeddings times `embedding_multiplier`, which is first rounded to the weights' precision, as in Gemma."""

    def __init__(self, config: HfllmConfig):
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.multiplier = config.embedding_multiplier

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = super().forward(input_ids)
        return embeddings if self.multiplier == 1 else embeddings * embeddings.new_tensor(self.multiplier)


class HfllmAttention(nn.Module):
    """Grouped-query self-attention through transformers' attention interface."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = config.is_causal
        # Copied, here and in the layer: a config looks up every name in its attribute map, too slow for decoding.
        self.attention_dropout, self.sliding_window = config.attention_dropout, config.sliding_window
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_and_length = hidden_states.shape[:-1]
        per_head = (*batch_and_length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(per_head)
        key = self.k_proj(hidden_states).view(per_head)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(per_head).transpose(1, 2)
        if position_embeddings is not None:
            query = apply_rotary_pos_emb(query, *position_embeddings)
            key = apply_rotary_pos_emb(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*batch_and_length, -1).contiguous()), weights


class HfllmMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` when gated, `down(act(up(x)))` when plain."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.is_gated = config.mlp_type == "gated"
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = [self.up_proj(hidden_states), *([self.gate_proj(hidden_states)] if self.is_gated else [])]
        keeps_all = not (self.training and saves_memory())
        # Do not recompute a layer with its own dropout (LoRA) or hooks that gather weights (ZeRO-3): both count calls.
        if keeps_all or type(self.down_proj) is not nn.Linear or hasattr(self.down_proj.weight, "ds_id"):
            return self._down(*inner)
        # Save the large products for the backward pass and recompute the rest, up to the input of `down_proj`.
        return torch.utils.checkpoint.checkpoint(self._down, *inner, use_reentrant=False, preserve_rng_state=False)

    def _down(self, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.act_fn(up if gate is None else gate)
        if gate is not None:
            inner = inner * up if torch.is_grad_enabled() else inner.mul_(up)
        return self.down_proj(inner)


class HfllmRouter(nn.Module):
    """Selects the experts of each token: softmax over all of them, the best k, renormalized (Mixtral, section 2.1)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))

    def forward(self, tokens_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (N, experts), and the weights and indices (N, k) of the chosen experts."""
        logits = nn.functional.linear(tokens_NE, self.weight)
        weights, indices = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), indices


@use_experts_implementation
class HfllmExperts(nn.Module):
    """Gated MLPs in two stacked tensors, (experts, 2 * intermediate_size, E) and (experts, E, intermediate_size)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        width = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, tokens_NE: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(tokens_NE)
        # Under expert parallelism, `num_experts` marks a choice that another rank computes.
        for expert in indices.unique().tolist():
            if expert == self.num_experts:
                continue
            rows, ranks = torch.where(indices == expert)
            gate, up = nn.functional.linear(tokens_NE[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            mixed = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[rows, ranks, None]
            output.index_add_(0, rows, mixed.to(output.dtype))
        return output


class HfllmSparseMLP(nn.Module):
    """A mixture of experts in place of the MLP (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, config: HfllmConfig):
        super().__init__()
        self.gate = HfllmRouter(config)
        self.experts = HfllmExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        return self.experts(tokens, indices, weights).reshape(hidden_states.shape)


class HfllmDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP around a residual stream."""

    def __init__(self, config: HfllmConfig, layer_idx: int):
        super().__init__()
        self.norm_placement = config.norm_placement
        self.parallel_block, self.shared_norm = config.parallel_block, config.shared_norm
        self.hidden_dropout = config.hidden_dropout
        self.self_attn = HfllmAttention(config, layer_idx)
        self.mlp = HfllmSparseMLP(config) if config.num_local_experts else HfllmMLP(config)
        self.input_layernorm = build_norm(config, config.hidden_size)
        if not (config.parallel_block and config.shared_norm):
            self.post_attention_layernorm = build_norm(config, config.hidden_size)
        # For _init_weights, which gets the two projections into the residual stream one at a time.
        residual_terms = {"plain": 1, "gpt2": 2 * config.num_hidden_layers, "depth": 2 * (layer_idx + 1)}
        for module in (self.self_attn.o_proj, self.mlp.experts if config.num_local_experts else self.mlp.down_proj):
            module.residual_init_scale = residual_terms[config.residual_init] ** -0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Map (B, S, E) to (B, S, E). Where each option of the config acts:

        - `norm_placement`, `parallel_block` and `shared_norm` select one of the three paths through this function;
        - `norm_type`, `norm_bias` and `norm_unit_offset` are inside the two norms;
        - `position_embedding_type`: rotary angles come in as `position_embeddings`, learned positions were added
          before the first layer;
        - `is_causal` and `sliding_window` are in `attention_mask`; grouped queries and `qk_norm` in `self.self_attn`;
        - `mlp_type`, `hidden_act` and `num_local_experts` are inside `self.mlp`.
        """

        def attention(states: torch.Tensor) -> torch.Tensor:
            return self._drop(self.self_attn(states, position_embeddings, attention_mask, **kwargs)[0])

        def mlp(states: torch.Tensor) -> torch.Tensor:
            return self._drop(self.mlp(states))

        if self.norm_placement == "post":
            hidden_states = self.input_layernorm(hidden_states + attention(hidden_states))
            return self.post_attention_layernorm(hidden_states + mlp(hidden_states))
        normed = self.input_layernorm(hidden_states)
        if self.parallel_block:
            mlp_input = normed if self.shared_norm else self.post_attention_layernorm(hidden_states)
            return hidden_states + attention(normed) + mlp(mlp_input)
        hidden_states = hidden_states + attention(normed)
        return hidden_states + mlp(self.post_attention_layernorm(hidden_states))

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        p = self.hidden_dropout
        return nn.functional.dropout(states, p, training=True) if self.training and p else states


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        residual_std = std * getattr(module, "residual_init_scale", 1.0)
        if isinstance(module, nn.Linear) and residual_std != std:
            init.normal_(module.weight, mean=0.0, std=residual_std)
        elif isinstance(module, HfllmRMSNorm) and module.unit_offset:
            init.zeros_(module.weight)
        elif isinstance(module, (HfllmRouter, HfllmExperts)):
            for name, parameter in module.named_parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=residual_std if name == "down_proj" else std)


def packed_sequences(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the index of each token's packed sequence, (B, S), or `None` when no row holds more than one.

    A sequence begins where the position does not increase by one between two tokens that are not padding.
    """
    if position_ids is None or (attention_mask is not None and len(attention_mask.shape) != 2):
        return None
    begins = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if attention_mask is not None:
        begins = begins & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    if not torch.compiler.is_compiling() and not begins.any():
        return None
    return nn.functional.pad(begins, (1, 0)).cumsum(-1)


class HfllmModel(HfllmPreTrainedModel):
    """The trunk: embeddings, layers and, with pre-norm, a final norm."""

    def __init__(self, config: HfllmConfig):
        super().__init__(config)
        self.embed_tokens = HfllmEmbedding(config)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.position_embedding_type == "rope":
            self.rotary_emb = HfllmRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(HfllmDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size) if config.norm_placement == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Return the last hidden states (B, S, E).

        Rows of `position_ids` that restart hold packed sequences, which do not attend to each other. They need
        `cache=None` and are computed without one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        packed = packed_sequences(position_ids, attention_mask) if cache is None else None
        if use_cache and cache is None and packed is None and self.config.is_causal:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        mask = self._mask(inputs_embeds, attention_mask, position_ids, cache, packed)
        hidden_states, position_embeddings = self._embed(inputs_embeds, position_ids)
        # Not a slice, which would make a new ModuleList for each generated token.
        for layer, _ in zip(self.layers, range(self.config.num_hidden_layers), strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

    def _mask(self, inputs_embeds, attention_mask, position_ids, cache, packed):
        # Both mask functions become bidirectional when config.is_causal is False.
        create = masking_utils.create_causal_mask
        if packed is not None and "flash" in self.config._attn_implementation:
            # Flash kernels take no mask: they split only a single row without padding, at its position ids.
            if len(packed) > 1 or not (attention_mask is None or attention_mask.all()):
                raise ValueError("flash attention takes packed sequences as one row without padding only")
            attention_mask = None
        if self.config.sliding_window is not None:
            create = masking_utils.create_sliding_window_causal_mask
        allowed = None
        # The mask functions find packed sequences only in a causal model without a padding mask.
        if packed is not None and not (self.config.is_causal and attention_mask is None):
            allowed = masking_utils.packed_sequence_mask_function(packed.expand(inputs_embeds.shape[0], -1))
        return create(self.config, inputs_embeds, attention_mask, cache, position_ids, and_mask_function=allowed)

    def _embed(self, inputs_embeds, position_ids):
        """Return the first layer's input, and the rotary cosines and sines if there are any."""
        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.position_embedding_type == "learned":
            if inputs_embeds.shape[1] > self.config.max_position_embeddings:
                raise ValueError(
                    f"{inputs_embeds.shape[1]} tokens, but the learned positions end at "
                    f"max_position_embeddings={self.config.max_position_embeddings}"
                )
            hidden_states = hidden_states + self.embed_positions(position_ids)
        elif self.config.position_embedding_type == "rope":
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        return self.dropout(hidden_states) if self.training else hidden_states, position_embeddings


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        return logits if self.config.logit_scale == 1 else logits * self.config.logit_scale


class HfllmForCausalLM(_HfllmWithHead, GenerationMixin):
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
                0 means all at once, `None` follows the config.
            label_smoothing: (in `kwargs`) share of the target spread over all tokens (arXiv:1512.00567, section 7).
            output_router_logits: with experts, return the routers' logits and the auxiliary loss, and add it to the
                loss. `None` follows the config; in training with labels this is always done.

        With `num_items_in_batch` in `kwargs` the loss is a sum divided by it instead of a mean over targets.
        """
        # Not in the signature, where Trainer would take it for a label column because of its name.
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        is_balanced = self.training and labels is not None and self.config.router_aux_loss_coef > 0
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        output_router_logits = bool(self.config.num_local_experts) and (asked or is_balanced)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        loss_chunk_size = self.config.loss_chunk_size if loss_chunk_size is None else loss_chunk_size
        logits = loss = aux_loss = None
        if labels is None or not loss_chunk_size:
            logits = self._logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        if labels is not None:
            loss = self._loss(outputs.last_hidden_state, logits, labels, loss_chunk_size, label_smoothing, **kwargs)
        if output_router_logits:
            mask = attention_mask if attention_mask is not None and len(attention_mask.shape) == 2 else None
            experts = (self.config.num_local_experts, self.config.num_experts_per_tok)
            aux_loss = load_balancing_loss_func(outputs.router_logits, *experts, mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _loss(self, hidden_states, logits, labels, chunk_size, label_smoothing, **kwargs) -> torch.Tensor:
        if logits is not None and not label_smoothing:
            return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        targets, num_items = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
        if targets is None:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        targets = targets.reshape(-1).to(hidden_states.device)
        states = hidden_states.flatten(0, 1) * self.config.logit_scale
        total = linear_cross_entropy(states, self.lm_head, targets, chunk_size or len(targets), label_smoothing)
        return total / ((targets != -100).sum() if num_items is None else num_items)


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
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits, loss = self._logits(outputs.last_hidden_state), None
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


__all__ = [
    *("HfllmForCausalLM", "HfllmForMaskedLM", "HfllmForSequenceClassification", "HfllmForTokenClassification"),
    *("HfllmModel", "HfllmPreTrainedModel"),
]

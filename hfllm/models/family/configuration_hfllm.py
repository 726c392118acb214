"""Configuration of the hfllm family: every family member is this class with other values."""

import os

import transformers
from packaging.version import Version

# The oldest that runs this code, as in pyproject.toml; 5.23 knows no argument `cache`.
OLDEST_TRANSFORMERS = "5.24.0"
if Version(transformers.__version__).release < Version(OLDEST_TRANSFORMERS).release:
    # Before the imports below: in older releases these fail with missing names.
    raise ImportError(
        f"hfllm models need transformers {OLDEST_TRANSFORMERS} or newer, and this is {transformers.__version__}: "
        f"pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters  # noqa: E402

from .configuration_fields_hfllm import (  # noqa: E402
    ExpertFields,
    LatentFields,
    absent_rules,
    check_experts,
    check_latent,
    check_layers,
    check_rope_values,
    fill_experts,
    fill_latent_sizes,
    fill_linear_sizes,
    filled_layer_types,
    filled_no_rope_layers,
    follow_edits,
    latent_parameters,
    mlp_parameters,
)

CHOICES = {
    "norm_type": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "output", "both"),
    "qk_norm_scope": ("head", "all_heads"),
    "mlp_type": ("gated", "plain"),
    "position_embedding_type": ("rope", "learned", "none"),
    "residual_init": ("plain", "gpt2", "depth"),
}
AUTO_MAP = {
    "AutoConfig": "configuration_hfllm.HfllmConfig",
    "AutoModel": "modeling_hfllm.HfllmModel",
    "AutoModelForCausalLM": "modeling_hfllm.HfllmForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hfllm.HfllmForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hfllm.HfllmForTokenClassification",
    "AutoModelForMaskedLM": "modeling_hfllm.HfllmForMaskedLM",
    "AutoModelForQuestionAnswering": "modeling_hfllm.HfllmForQuestionAnswering",
}


TENSOR_PARALLEL_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}
ALL_HEADS_PLAN = {
    "layers.*.self_attn.q_proj": "colwise_gather_output",
    "layers.*.self_attn.k_proj": "colwise_gather_output",
    "layers.*.self_attn.v_proj": "colwise_gather_output",
    "layers.*.self_attn.o_proj": "rowwise_split_input",
}
EXPERT_PARALLEL_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}
PIPELINE_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


@strict
class HfllmConfig(LatentFields, ExpertFields, PreTrainedConfig):
    """Architecture of an hfllm model. The defaults describe a LLaMA-style decoder.

    Fields have Llama's names where Llama has the concept. The family's own options come first; they combine freely
    except where `Raises` says otherwise.

    Args:
        norm_type: `"rmsnorm"` (Zhang & Sennrich 2019, arXiv:1910.07467) or `"layernorm"` (arXiv:1607.06450).
        norm_placement: `"pre"` normalizes the input of every block and ends with a final norm (GPT-2, LLaMA);
            `"post"` normalizes the residual sum after every block and has no final norm (GPT-1, BERT); `"output"`
            normalizes every block's output before it is added (OLMo 2, arXiv:2501.00656, section 3.1), and `"both"`
            the input and the output (Gemma 2, arXiv:2408.00118), both with a final norm.
        norm_bias: whether a LayerNorm has a bias (PaLM's and Cohere's have none); RMSNorm never has one.
        norm_unit_offset: store norm weights minus one, as Gemma does.
        qk_norm: normalize queries and keys before the rotary embedding (Qwen3).
        qk_norm_scope: `"head"` normalizes each head by itself (Qwen3), `"all_heads"` all heads of a token together
            (OLMo 2).
        parallel_block: attention and MLP read the same input and are added together (GPT-J, PaLM;
            Chowdhery et al. 2022, arXiv:2204.02311, section 2).
        shared_norm: in a parallel block, one norm feeds both (PaLM, Cohere) or each has its own (GPT-NeoX).
        mlp_type: `"gated"` is `down(act(gate(x)) * up(x))` (GLU variants, Shazeer 2020, arXiv:2002.05202: with
            `hidden_act="silu"` SwiGLU, with `"gelu"` GeGLU); `"plain"` is `down(act(up(x)))`.
        position_embedding_type: `"rope"` (arXiv:2104.09864), `"learned"` absolute positions, or `"none"`.
        is_causal: `False` lets every token attend to all others, for masked language modeling.
        sliding_window: attend to this many tokens at most, the current one included (Mistral, arXiv:2310.06825);
            `None` means no limit. Causal models only, since attention kernels differ in their treatment of later
            tokens.
        layer_types: the attention of the layers: `"full_attention"`; `"sliding_attention"`, which needs a
            `sliding_window`; `"chunked_attention"`, which needs an `attention_chunk_size`; or `"linear_attention"`, a
            gated delta rule (arXiv:2412.06464) as in OLMo Hybrid. `None` means the same for all layers: sliding or
            chunked if there is a window or a chunk size, else full.
        attention_chunk_size: cut texts into chunks of this many tokens; each token sees only its own chunk, up to
            itself (Llama 4); they are counted from the first non-padding token.
        no_rope_layers: a number per layer: 0 for layers without rotary positions, 1 for the others (SmolLM3,
            after arXiv:2501.18795). `None` means rotary positions in all layers.
        num_local_experts: gated experts per layer (Mixtral, arXiv:2401.04088); 0 means one dense MLP. `ExpertFields`
            has their other fields: `moe_intermediate_size`, `n_shared_experts`, `mlp_layer_types`, `scoring_func` ...
        num_experts_per_tok: number of experts per token, picked by a router.
        router_aux_loss_coef: weight of the load-balancing loss (arXiv:2101.03961, equations 4 to 6), added
            to the loss in training; `None` means 0.001 with experts, and 0 where a bias balances them.
        output_router_logits: return the routers' logits and the auxiliary loss also outside training.
        intermediate_size: width of the MLP, or of one expert; `None` gives 4 * hidden_size for a plain MLP and
            8/3 * hidden_size, rounded up to a multiple of 16, for a gated one (the same number of weights).
        num_key_value_heads: heads of keys and values (grouped-query attention, arXiv:2305.13245); `None` means one
            per query head, 1 means multi-query attention.
        head_dim: size of one head; `None` means `hidden_size // num_attention_heads`. `LatentFields` has the fields of
            attention whose keys and values are made of one small vector per token (`kv_lora_rank`).
        max_position_embeddings: longest context of the model, in tokens; also the size of the learned
            position table.
        rope_parameters: transformers' RoPE dictionary (`rope_type`, `rope_theta`, `partial_rotary_factor`, ...), or
            one per type in `layer_types`, by its name (Gemma 3); ignored without RoPE.
        query_pre_attn_scalar: attention scores are divided by the square root of this (Gemma 2); `None` means
            `head_dim`.
        attn_logit_softcapping: soft limit c of the attention scores, `c * tanh(scores / c)` (Gemma 2); it needs eager,
            flex or flash attention, and the default is then eager. `None` means no limit.
        final_logit_softcapping: the same for the logits of the language model.
        attention_bias: biases of the query, key and value projections.
        attention_output_bias: bias of the attention's output projection; `None` follows `attention_bias`.
        lm_head_bias: bias of the language-model head (GPT-J, Phi); it needs logit_scale=1.
        embedding_multiplier: factor on the token embeddings (Gemma: the square root of hidden_size).
        logit_scale: factor on the logits (Cohere).
        linear_num_key_heads: heads of queries and keys in layers of linear attention; `None` means
            `num_attention_heads`, and so for `linear_num_value_heads`, a multiple of them.
        linear_key_head_dim: size of such a head; `None` gives three quarters of hidden_size over all heads.
        linear_value_head_dim: size of a value head; `None` means twice `linear_key_head_dim`.
        linear_conv_kernel_dim: tokens in the convolution before linear attention, the current one included.
        linear_allow_neg_eigval: let a token's change go up to twice as far, to allow reversing a state as well
            (arXiv:2411.12537).
        linear_a_log_min, linear_a_log_max, linear_dt_min, linear_dt_max, linear_dt_init_floor: limits of the initial
            decays.
        hidden_dropout: dropout probability on embeddings and on the blocks' outputs.
        classifier_dropout: dropout probability before a token classifier's head; `None` follows `hidden_dropout`.
        initializer_range: standard deviation of the initial weights.
        residual_init: how the initial weights of the projections into the residual stream are scaled: `"plain"` not
            at all, `"gpt2"` by 1/sqrt(2 * num_hidden_layers) (Radford et al. 2019, section 2.3), `"depth"` by
            1/sqrt(2 * l) in layer l = 1, 2, ... (depth-scaled initialization, arXiv:1908.11365, section 4.1).
        loss_chunk_size: compute the language-modeling loss over this many tokens at a time, so the logits of
            a whole batch are never all in memory; with labels the output then has no logits. In evaluation without
            gradients it has all of them (for Trainer's `compute_metrics`), and takes their memory, unless the call
            gives a `loss_chunk_size` of its own. `None` or 0 means all at once.

    Raises:
        StrictDataclassError: (of huggingface_hub) when a value or a combination of values is invalid; the
            message names the field.
    """

    model_type = "hfllm"
    attribute_map = {
        "rms_norm_eps": "norm_eps",
        "layer_norm_epsilon": "norm_eps",
        "layer_norm_eps": "norm_eps",
        "num_experts": "num_local_experts",
        "n_routed_experts": "num_local_experts",
    }
    norm_type: str = "rmsnorm"
    norm_placement: str = "pre"
    norm_bias: bool = True
    norm_unit_offset: bool = False
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    parallel_block: bool = False
    shared_norm: bool = True
    mlp_type: str = "gated"
    position_embedding_type: str = "rope"
    is_causal: bool = True
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float | None = None
    output_router_logits: bool = False

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    norm_eps: float = 1e-5
    query_pre_attn_scalar: int | float | None = None
    attn_logit_softcapping: int | float | None = None
    final_logit_softcapping: int | float | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    lm_head_bias: bool = False
    embedding_multiplier: int | float = 1.0
    logit_scale: int | float = 1.0
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = True
    linear_a_log_min: int | float = 0.0
    linear_a_log_max: int | float = 16.0
    linear_dt_min: int | float = 0.001
    linear_dt_max: int | float = 0.1
    linear_dt_init_floor: int | float = 1e-4
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    classifier_dropout: int | float | None = None
    initializer_range: float = 0.02
    residual_init: str = "plain"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    loss_chunk_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides: object) -> "HfllmConfig":
        """Return the configuration of a published model, with fields changed by `overrides`.

        Raises:
            ValueError: for an unknown name, with the nearest known ones.
        """
        from .presets import preset

        return cls(**preset(name) | overrides)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        fill_latent_sizes(self)
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            self.intermediate_size = wide if self.mlp_type == "plain" else -(-wide * 2 // 3 // 16) * 16
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        fill_experts(self, kwargs)
        self.layer_types = filled_layer_types(self)
        self.no_rope_layers = filled_no_rope_layers(self)
        fill_linear_sizes(self)
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None
        if not self.is_causal:
            self.use_cache = False
        self._set_parallel_plans()

    def _set_parallel_plans(self) -> None:
        """Set the parallelism rules for this model's modules."""
        absent = absent_rules(self)
        normalizes_all_heads = self.qk_norm and self.qk_norm_scope == "all_heads"
        absent += [] if self.qk_norm and not normalizes_all_heads else ["q_norm", "k_norm"]
        absent += ["mlp.gate_proj"] if self.mlp_type == "plain" else []
        # A single key-value head or latent cannot be split, and so neither can the query heads sharing it.
        absent += ["self_attn"] if self.num_key_value_heads == 1 or self.kv_lora_rank else []
        self.base_model_tp_plan = {
            rule: style for rule, style in TENSOR_PARALLEL_PLAN.items() if not any(name in rule for name in absent)
        }
        if normalizes_all_heads and self.num_key_value_heads > 1:
            # Every process needs all heads to normalize them, as in OLMo 2.
            self.base_model_tp_plan |= ALL_HEADS_PLAN
        self.base_model_ep_plan = dict(EXPERT_PARALLEL_PLAN) if self.num_local_experts else None
        # Later pipeline stages would add learned positions again.
        self.base_model_pp_plan = None if self.position_embedding_type == "learned" else dict(PIPELINE_PLAN)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Save as the base class does; if code is saved with the weights, `auto_map` names all family classes."""
        if self._auto_class is not None:
            self.auto_map = dict(AUTO_MAP)
        follow_edits(self)
        super().save_pretrained(save_directory, **kwargs)

    def num_parameters(self, active_only: bool = False) -> int:
        """Return the number of weights of the language model, tied ones counted once, without allocating any.

        Args:
            active_only: count only the experts used by one token.
        """
        hidden = self.hidden_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norm = hidden * (2 if self._norm_has_bias() else 1)
        attention = hidden * (query + 2 * key) + query * hidden
        attention += (query + 2 * key) * self.attention_bias + hidden * self.attention_output_bias
        normed = 2 * self.head_dim if self.qk_norm_scope == "head" else query + key
        attention += normed * (2 if self._norm_has_bias() else 1) * self.qk_norm
        attention = latent_parameters(self) if self.kv_lora_rank else attention
        norms = 4 if self.norm_placement == "both" else 1 if self.parallel_block and self.shared_norm else 2
        layers = mlp_parameters(self, active_only) + self.num_hidden_layers * norms * norm
        linear = self.layer_types.count("linear_attention")
        layers += (self.num_hidden_layers - linear) * attention
        layers += linear * self._linear_parameters() if linear else 0
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        embeddings += self.vocab_size * self.lm_head_bias
        embeddings += self.max_position_embeddings * hidden * (self.position_embedding_type == "learned")
        return embeddings + layers + norm * (self.norm_placement != "post")

    def _linear_parameters(self) -> int:
        """Return the weights of one layer's linear attention."""
        heads, value = self.linear_num_value_heads, self.linear_num_value_heads * self.linear_value_head_dim
        channels = 2 * self.linear_num_key_heads * self.linear_key_head_dim + value
        projections = self.hidden_size * (channels + 2 * value + 2 * heads)
        return projections + channels * self.linear_conv_kernel_dim + 2 * heads + self.linear_value_head_dim

    def validate_architecture(self):
        """Refuse invalid fields and combinations. `@strict` calls it once the fields are set."""
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")
        check_latent(self)
        self._check_sizes()
        self._check_combinations()
        check_layers(self)
        self._check_rope()

    def validate_layer_type(self):
        """Do nothing: transformers checks `layer_types` here, with a longer message than `check_layers` has."""

    def rotary_types(self) -> list[str]:
        """Return the layer types with `rope_parameters` of their own, none if all share one dictionary."""
        return self.nested_rope_parameter_keys(self.rope_parameters or {})

    def _check_sizes(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("initializer_range", "router_aux_loss_coef"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        for field in ("norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, field) is not None and getattr(self, field) <= 0:
                raise ValueError(f"{field} must be above 0, got {getattr(self, field)}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be below vocab_size={self.vocab_size}")
        if self.position_embedding_type == "learned" and self.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings must be at least 1, got {self.max_position_embeddings}")
        for field, least in (("sliding_window", 1), ("attention_chunk_size", 1), ("loss_chunk_size", 0)):
            if getattr(self, field) is not None and getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least} or None, got {getattr(self, field)}")
        for field in ("attention_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0 <= (getattr(self, field) or 0) < 1:
                raise ValueError(f"{field} must lie in [0, 1), got {getattr(self, field)}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim < 1:
            raise ValueError(
                f"head_dim={self.head_dim} (hidden_size={self.hidden_size} // "
                f"num_attention_heads={self.num_attention_heads}) must be at least 1"
            )

    def _check_combinations(self):
        check_experts(self)
        if self.parallel_block and self.norm_placement != "pre":
            raise ValueError(f"parallel_block=True needs norm_placement='pre', got {self.norm_placement!r}")
        for field in ("sliding_window", "attention_chunk_size", "num_local_experts", "loss_chunk_size"):
            if not self.is_causal and getattr(self, field):
                raise ValueError(f"{field}={getattr(self, field)} needs is_causal=True, got False")
        if self.lm_head_bias and self.logit_scale != 1:
            raise ValueError(f"lm_head_bias=True needs logit_scale=1, got {self.logit_scale}")
        if self.norm_unit_offset and self.norm_type != "rmsnorm":
            raise ValueError(f"norm_unit_offset=True needs norm_type='rmsnorm', got {self.norm_type!r}")

    def _check_rope(self):
        if self.position_embedding_type != "rope":
            return
        if not self.rope_parameters:
            raise ValueError(f"position_embedding_type='rope' needs rope_parameters, got {self.rope_parameters}")
        own = self.rotary_types()
        for name in dict.fromkeys(self.layer_types) if own else ():
            if name != "linear_attention" and not isinstance(self.rope_parameters.get(name), dict):
                raise ValueError(f"rope_parameters has dictionaries for {', '.join(own)}, and none for {name}")
        for rope in [self.rope_parameters[name] for name in own] or [self.rope_parameters]:
            kinds, kind = ("default", *ROPE_INIT_FUNCTIONS), rope["rope_type"]
            if kind not in kinds:
                raise ValueError(f"rope_parameters: rope_type={kind!r} is not one of {', '.join(kinds)}")
            check_rope_values(rope)
            factor = rope.get("partial_rotary_factor", 1.0)
            rotary = int(self.head_dim * factor)
            if rotary < 2 or rotary % 2 or rotary > self.head_dim:
                raise ValueError(
                    f"head_dim={self.head_dim} times partial_rotary_factor={factor} must be even, from 2 to head_dim"
                )

    def _norm_has_bias(self) -> bool:
        return self.norm_type == "layernorm" and self.norm_bias


__all__ = ["HfllmConfig"]

"""Configuration of the hfllm decoder family: every family member is this class with other values."""

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

NORM_TYPES = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post")
MLP_TYPES = ("gated", "plain")
POSITION_EMBEDDING_TYPES = ("rope", "learned", "none")


@strict
class HfllmConfig(PreTrainedConfig):
    """Architecture of an hfllm model. The defaults describe a LLaMA-style decoder.

    Fields carry Llama's names where Llama has the concept; the family's own axes are the first four.

    Args:
        norm_type: `"rmsnorm"` (Zhang & Sennrich 2019, arXiv:1910.07467) or `"layernorm"` (arXiv:1607.06450).
        norm_placement: `"pre"` normalises the input of each block and ends with a final norm (GPT-2, LLaMA);
            `"post"` normalises the residual sum after each block and has no final norm (GPT-1).
        mlp_type: `"gated"` is `down(act(gate(x)) * up(x))` (GLU variants, Shazeer 2020, arXiv:2002.05202: with
            `hidden_act="silu"` SwiGLU, with `"gelu"` GeGLU); `"plain"` is `down(act(up(x)))`.
        position_embedding_type: `"rope"` (arXiv:2104.09864), `"learned"` absolute positions, or `"none"`.
        intermediate_size: width of the MLP; `None` gives 4 * hidden_size for a plain MLP and 8/3 * hidden_size,
            rounded up to a multiple of 16, for a gated one (the same number of weights).
        num_key_value_heads: heads of keys and values (grouped-query attention, arXiv:2305.13245); `None` is one
            per query head, 1 is multi-query attention.
        head_dim: size of one head; `None` is `hidden_size // num_attention_heads`.
        max_position_embeddings: longest context the model is made for, in tokens; also the size of the learned
            position table.
        rope_parameters: transformers' RoPE dictionary (`rope_type`, `rope_theta`, ...); ignored without RoPE.
        hidden_dropout: dropout probability on embeddings and on each block's output.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: when a value or a combination of values describes no model; the message names the field.
    """

    model_type = "hfllm"
    attribute_map = {"rms_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    norm_type: str = "rmsnorm"
    norm_placement: str = "pre"
    mlp_type: str = "gated"
    position_embedding_type: str = "rope"

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
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            self.intermediate_size = wide if self.mlp_type == "plain" else -(-wide * 2 // 3 // 16) * 16
        super().__post_init__(**kwargs)
        if self.position_embedding_type != "rope":
            self.rope_parameters = None

    def validate_architecture(self):
        """Refuse what describes no model. Called by `@strict` once the fields are set."""
        self._check_choices()
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim < 1 or (self.position_embedding_type == "rope" and self.head_dim % 2):
            raise ValueError(
                f"head_dim={self.head_dim} (hidden_size={self.hidden_size} // "
                f"num_attention_heads={self.num_attention_heads}) must be positive, and even with RoPE"
            )
        for field in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must lie in [0, 1), got {getattr(self, field)}")

    def _check_choices(self):
        choices = {
            "norm_type": NORM_TYPES,
            "norm_placement": NORM_PLACEMENTS,
            "mlp_type": MLP_TYPES,
            "position_embedding_type": POSITION_EMBEDDING_TYPES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}")


__all__ = ["HfllmConfig"]

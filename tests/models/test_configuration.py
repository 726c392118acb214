"""A config that describes no model is refused, and the message names the field."""

import pytest

import hfllm
from hfllm import HfllmConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "batchnorm"),
        ("norm_placement", "middle"),
        ("mlp_type", "wide"),
        ("position_embedding_type", "alibi"),
        ("hidden_act", "softmaxish"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("hidden_dropout", 1.5),
        ("num_hidden_layers", 0),
        ("vocab_size", -1),
    ],
)
def test_nonsense_is_refused(field, value):
    with pytest.raises(Exception, match=field) as error:
        HfllmConfig(**{"hidden_size": 64, "num_attention_heads": 4, field: value})
    assert str(value) in str(error.value)


def test_derived_values():
    gated = HfllmConfig(hidden_size=64, num_attention_heads=4)
    assert (gated.intermediate_size, gated.head_dim, gated.num_key_value_heads) == (176, 16, 4)
    assert HfllmConfig(hidden_size=64, num_attention_heads=4, mlp_type="plain").intermediate_size == 256
    assert gated.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert HfllmConfig(rms_norm_eps=1e-3).norm_eps == 1e-3


def test_odd_heads_are_fine_without_rope():
    assert HfllmConfig(hidden_size=28, num_attention_heads=4, position_embedding_type="learned").head_dim == 7


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"parallel_block": True, "norm_placement": "post"}, "parallel_block"),
        ({"num_local_experts": 4, "mlp_type": "plain"}, "num_local_experts"),
        ({"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"norm_unit_offset": True, "norm_type": "layernorm"}, "norm_unit_offset"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"loss_chunk_size": -1}, "loss_chunk_size must be at least 0 or None, got -1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
        ({"residual_init": "xavier"}, "residual_init"),
        *(
            (
                {"num_local_experts": 4, "first_k_dense_replace": value},
                f"first_k_dense_replace={value!r} must be a whole number from 0 to num_hidden_layers=8",
            )
            for value in ("1", 9, -1, True)
        ),
        *(
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **wrong}}, message)
            for wrong, message in (
                ({"rope_theta": 0}, r"rope_parameters\.rope_theta must be a number above 0, got 0"),
                ({"rope_theta": "1e4"}, r"rope_parameters\.rope_theta must be a number above 0, got '1e4'"),
                ({"rope_theta": None}, r"rope_parameters\.rope_theta must be a number above 0, got None"),
                ({"rope_theta": -5.0}, r"rope_parameters\.rope_theta must be a number above 0, got -5\.0"),
                ({"factor": 0}, r"rope_parameters\.factor must be a number above 0, got 0"),
                ({"factor": "4"}, r"rope_parameters\.factor must be a number above 0, got '4'"),
                ({"partial_rotary_factor": "a"}, r"rope_parameters\.partial_rotary_factor must be a number"),
                ({"mscale_all_dim": "1"}, r"rope_parameters\.mscale_all_dim must be a number of at least 0, got '1'"),
            )
        ),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "rope_type='foo'"),
        ({"pad_token_id": 32000}, "pad_token_id=32000"),
        ({"position_embedding_type": "learned", "max_position_embeddings": 0}, "max_position_embeddings"),
        ({"norm_eps": -1.0}, "norm_eps"),
        ({"initializer_range": -0.1}, "initializer_range"),
        ({"router_aux_loss_coef": -1.0, "num_local_experts": 2}, "router_aux_loss_coef"),
        ({"is_causal": False, "sliding_window": 4}, "sliding_window=4"),
        ({"is_causal": False, "num_local_experts": 2}, "num_local_experts=2"),
        ({"is_causal": False, "loss_chunk_size": 8}, "loss_chunk_size=8"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(values, field):
    with pytest.raises(Exception, match=field):
        HfllmConfig(hidden_size=64, num_attention_heads=4, **values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "RMSNorm"),
        ("mlp_type", "Gated"),
        ("norm_placement", "sandwich"),
        ("position_embedding_type", "learnt"),
        ("rope_parameters", None),
        ("num_key_value_heads", 3),
        ("hidden_act", "swish!"),
    ],
)
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification"])
def test_fields_set_later_are_checked_when_a_model_is_built(field, value, head):
    config = HfllmConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=field):
        getattr(hfllm, f"Hfllm{head}")(config)

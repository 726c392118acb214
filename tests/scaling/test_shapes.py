"""Shapes against the models themselves, and against the configs that transformers writes."""

import json
from itertools import product

import pytest
import torch
import transformers
from parity.natives import NATIVES

import hfllm
from hfllm.errors import InputError
from hfllm.models.conversion.convert import config_from_native
from hfllm.models.conversion.families import FAMILIES as CONVERTED
from hfllm.models.family.presets import preset
from hfllm.scaling.layouts import Layout
from hfllm.scaling.memory import _stage_parameters, _stages
from hfllm.scaling.shapes import NAMED_SHAPES, Shape
from hfllm.scaling.speed import flops_per_token
from hfllm.stages.plan import _family_fields


@pytest.mark.slow
@pytest.mark.parametrize("name", hfllm.list_presets())
def test_presets_have_the_models_parameters(name):
    config, shape = hfllm.HfllmConfig.from_preset(name), Shape.from_config(preset(name))
    assert shape.num_parameters() == config.num_parameters()
    assert shape.num_parameters(active_only=True) == config.num_parameters(active_only=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"mlp_bias": True, "attention_bias": True},
        {"norm_type": "layernorm", "norm_bias": False, "qk_norm": True},
        {"norm_placement": "post", "mlp_type": "plain", "position_embedding_type": "learned"},
        {"parallel_block": True, "shared_norm": False, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 24},
        {"norm_placement": "both", "qk_norm": True, "norm_unit_offset": True},
        {"lm_head_bias": True},
        {"lm_head_bias": True, "tie_word_embeddings": True},
        {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads", "num_key_value_heads": 2}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        {
            "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "qk_norm": True,
        }
        | {"linear_num_key_heads": 2, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 3},
    ],
)
def test_every_axis_counts(fields):
    config = hfllm.HfllmConfig(vocab_size=300, hidden_size=64, num_attention_heads=4, num_hidden_layers=3, **fields)
    shape = Shape.from_config(config.to_dict())
    with torch.device("meta"):
        model = hfllm.HfllmForCausalLM(config)
    assert shape.num_parameters() == model.num_parameters()
    (held,) = (_stage_parameters(shape, Layout(), stage) for stage in _stages(shape, Layout(), 1))
    assert sum(held) == pytest.approx(shape.num_parameters())
    looked_up = [] if config.tie_word_embeddings else [model.get_input_embeddings().weight]
    if config.position_embedding_type == "learned":
        looked_up.append(model.model.embed_positions.weight)
    active = config.num_parameters(active_only=True)
    assert shape.multiplied_parameters() == active - sum(table.numel() for table in looked_up)


@pytest.mark.parametrize("name", NATIVES)
def test_config_json_of_native_models(name, tmp_path):
    kind, fields = NATIVES[name]
    config = transformers.AutoConfig.for_model(kind, **fields)
    config.save_pretrained(tmp_path)
    shape = Shape.from_config(json.loads((tmp_path / "config.json").read_text()))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters() == model.num_parameters()


def test_saved_config_of_the_family(make_config, tmp_path):
    config = make_config(mlp_type="plain", tie_word_embeddings=True, num_key_value_heads=1)
    config.save_pretrained(tmp_path)
    assert Shape.from_config(json.loads((tmp_path / "config.json").read_text())).num_parameters() == (
        config.num_parameters()
    )


def test_named_shapes_are_shapes_of_the_family():
    for name, fields in NAMED_SHAPES.items():
        shape, config = Shape.from_config(fields), hfllm.HfllmConfig(**fields)
        assert shape.num_parameters() == config.num_parameters()
        active = config.num_parameters(active_only=True)
        assert shape.num_parameters(active_only=True) == active
        # What `hfllm plan` writes describes the same model.
        assert hfllm.HfllmConfig(**_family_fields(shape)).num_parameters() == config.num_parameters()
        if name == "deepseek-v3":
            # Sizes of the class are those of the paper, but for the context.
            native = config_from_native(transformers.DeepseekV3Config(max_position_embeddings=4096))
            assert native.num_parameters() == config.num_parameters()
            assert round(config.num_parameters() / 1e9) == 671
            assert (active - config.vocab_size * config.hidden_size) / 1e9 == pytest.approx(37, abs=0.5)


def test_every_family_that_converts_is_planned():
    """Of the table of conversion one is here, with its own model's parameters, in the test above."""
    assert {kind for kind, _ in NATIVES.values()} == CONVERTED.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not one of hfllm, llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size=0 must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size='many' must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_attention_heads": 128, "head_dim": None}, "hidden_size=64 is less than num_attention_heads=128"),
        ({"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3 must lie between"),
        ({"num_local_experts": "8"}, "num_local_experts='8' must be a whole number of at least 0"),
        ({"num_local_experts": -1}, "num_local_experts=-1 must be"),
        ({"num_experts_per_tok": 1.5}, "num_experts_per_tok=1.5 must be a whole number of at least 1"),
        ({"loss_chunk_size": "x"}, "loss_chunk_size='x' must be a whole number of at least 0"),
        ({"loss_chunk_size": -4}, "loss_chunk_size=-4 must be"),
        ({"attention_bias": "yes"}, "attention_bias='yes' must be true or false"),
        ({"attention_output_bias": 1}, "attention_output_bias=1 must be true or false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings=0 must be true or false"),
        ({"mlp_type": "foo"}, "mlp_type='foo' is not one of gated, plain"),
        ({"mlp_type": ["gated"]}, r"mlp_type=\['gated'\] is not one of gated, plain"),
        ({"position_embedding_type": "sine"}, "position_embedding_type='sine' is not one of rope, learned, none"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm' is not one of rmsnorm, layernorm"),
        ({"hidden_size": 10**400}, "hidden_size=10+ must be a whole number of at least 1, and at most 1,000,000,000"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not one of hfllm, llama"),
    ],
)
def test_bad_configs(change, message):
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    with pytest.raises(InputError, match=message) as caught:
        Shape.from_config({**config, **change}, "my/config.json")
    assert str(caught.value).startswith("my/config.json: ")


def test_a_bad_field_has_the_name_that_the_file_gives_it():
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    with pytest.raises(InputError, match=r"^config: n_embd='64' must be"):
        Shape.from_config({**config, "n_embd": "64"})
    with pytest.raises(InputError, match=r"^config: n_layer is missing"):
        Shape.from_config({**config, "n_layer": None})


def test_choices_are_those_of_the_config():
    from hfllm.models.family import configuration_hfllm
    from hfllm.scaling.shapes import CHOICES

    assert {name: configuration_hfllm.CHOICES[name] for name in CHOICES} == CHOICES


def small_foreign(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
    mixture = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
    if kind in ("qwen3_moe", "qwen2_moe"):
        between = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
        return {**sizes, **mixture, **between, "num_experts": 8, "num_key_value_heads": 2, "head_dim": 16}
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    return {**sizes, **mixture, **(latent if kind == "deepseek_v3" else {}), **experts, "num_key_value_heads": 4}


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "glm4_moe", "dots1", "deepseek_v3"])
def test_mixtures_of_other_families_have_their_models_parameters(kind):
    config = transformers.AutoConfig.for_model(kind, **small_foreign(kind))
    shape = Shape.from_config(config.to_dict())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters() == sum(weight.numel() for weight in model.parameters())


def test_stages_of_a_pipeline_hold_their_dense_layers():
    """Two stages: the first has the dense layers of GLM-4.5, and the weights of all stages are those of the model."""
    shape, layout = Shape.from_config(preset("glm-4.5")), Layout(pipeline=2)
    held = [_stage_parameters(shape, layout, stage) for stage in _stages(shape, layout, 4)]
    assert sum(map(sum, held)) == shape.num_parameters()
    assert held[0][0] == held[1][0] - 3 * shape.layer_parameters()["experts"]


def test_deepseek_v3_has_671_billion_parameters_of_which_37_are_active():
    """arXiv:2412.19437, section 1 and 4.2; the paper's 37 leave out the embeddings."""
    shape = Shape.from_config(NAMED_SHAPES["deepseek-v3"])
    assert round(shape.num_parameters() / 1e9) == 671
    assert shape.multiplied_parameters() / 1e9 == pytest.approx(37, abs=0.5)
    # DeepSeek-V2, arXiv:2405.04434, section 2.1: the latent of 512 and a rotary key of 64 for each token and layer.
    assert shape.kv_bytes_per_token() == 2 * 61 * (512 + 64)


def test_dense_layers_of_a_mixture_that_are_none_are_refused():
    with pytest.raises(
        InputError, match="config: qwen3_moe: decoder_sparse_step=0 must be a whole number of at least 1"
    ):
        Shape.from_config({**small_foreign("qwen3_moe"), "model_type": "qwen3_moe", "decoder_sparse_step": 0})
    with pytest.raises(InputError, match=r"mlp_layer_types=.*must name one of dense, sparse for each"):
        Shape(64, 2, 4, 100, num_local_experts=4, mlp_layer_types=["dense"])
    with pytest.raises(InputError, match="first_k_dense_replace=9 is more than num_hidden_layers=4"):
        Shape.from_config({**small_foreign("deepseek_v3"), "first_k_dense_replace": 9})


@pytest.mark.parametrize(
    ("limit", "field"), [("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")]
)
def test_caches_by_type_of_layer(limit, field):
    """As transformers' caches of a model of these types hold them."""
    kinds = ["full_attention", limit, "linear_attention"]
    fields = {
        "vocab_size": 30,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        field: 9,
    }
    config = hfllm.HfllmConfig(**fields, layer_types=kinds)
    shape, model = Shape.from_config(config.to_dict()), hfllm.HfllmForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.ones(1, 20, dtype=torch.long)).cache
    keys = sum(2 * layer.keys.numel() for layer in cache.layers[:2])
    # transformers keeps one token fewer than the window, which the next one completes.
    assert shape.cache_bytes(20, 4) == 4 * (keys + 2 * 32 + cache.layers[2].recurrent_states[0].numel())
    assert shape.kv_bytes_per_token(4) == 4 * 2 * 2 * 32
    per_token = flops_per_token(shape, 1000)["attention"]
    # Of the window's blocks of 64 queries, each with 128 keys.
    assert per_token == 6 * 64 * (1000 + 128) + 18 * 4 * 6 * 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"]}, "for each of num_hidden_layers=2"),
        ({"layer_types": ["full", "full_attention"]}, "must name one of full_attention, sliding_attention"),
        ({"layer_types": ["chunked_attention"] * 2}, "attention_chunk_size=None must be a whole number"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window=None must be a whole number"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types has linear_attention alone"),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "sliding_window=8 needs a 'sliding_attention'"),
        ({"sliding_window": 8, "attention_chunk_size": 8}, "attention_chunk_size=8 needs a 'chunked_attention'"),
        (
            {
                "layer_types": ["sliding_attention", "chunked_attention"],
                "sliding_window": 8,
                "attention_chunk_size": 8,
            },
            "has sliding_attention and chunked_attention",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "1"},
            "'max_window_layers' expected int, got str",
        ),
        (
            {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 0},
            "linear_conv_kernel_dim",
        ),
    ],
)
def test_layers_that_are_none_are_refused(fields, message):
    sizes = {"vocab_size": 30, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises(InputError, match=message):
        Shape.from_config(sizes | fields)


@pytest.mark.parametrize("window", ["unsaid", None, 8])
@pytest.mark.parametrize(
    ("kind", "first", "asked"),
    [
        *product(["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"], [None, 1], [None, False, True]),
        # They have no such fields.
        *product(["mistral", "mixtral"], [None], [None]),
    ],
)
def test_windows_are_those_that_transformers_reads(kind, window, first, asked):
    """Where a config.json is silent as well; of the layers, those that its model gives a window."""
    if (kind, window, asked) == ("qwen2_moe", None, True):
        pytest.skip("transformers lets layers slide there that have no window")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    sizes["num_key_value_heads"] = 4
    said = {"use_sliding_window": asked, "max_window_layers": first}
    said = {name: value for name, value in said.items() if value is not None}
    said |= {} if window == "unsaid" else {"sliding_window": window}
    config = transformers.AutoConfig.for_model(kind, **sizes, **said)
    expected = [config.sliding_window or None] * 3
    if getattr(config, "layer_types", None) is not None:
        expected = [config.sliding_window if "sliding" in each else None for each in config.layer_types]
    for fields in ({**sizes, **said, "model_type": kind}, config.to_dict()):
        shape = Shape.from_config(fields)
        assert [shape.sliding_window if "sliding" in each else None for each in shape.layer_types] == expected

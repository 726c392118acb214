"""Length extension: frequencies by their papers' formulas, in any model, saved and loaded; what is refused."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Starcoder2Config,
)

import hfllm
from hfllm.errors import InputError
from hfllm.models.extension import ROPE_TYPES, extend_model, extended_config

LENGTH, FACTOR, DIMENSIONS, THETA = 32, 4.0, 16, 10000.0
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
}
BY_TYPE = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "default", "rope_theta": THETA},
    },
}
SCALED = {"rope_type": "default", "rope_theta": THETA, "mscale": 1.0, "mscale_all_dim": 1.0}
CONFIGS = {
    "ours latent": lambda: hfllm.HfllmConfig(**SIZES, kv_lora_rank=16, rope_parameters=dict(SCALED)),
    "ours": lambda: hfllm.HfllmConfig(**SIZES),
    "ours by type": lambda: hfllm.HfllmConfig(**SIZES, **BY_TYPE),
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, **BY_TYPE),
}


def frequencies(rope_type, length):
    """Radians per position of each pair of dimensions, and the factor on cosines and sines, as in the papers."""
    found, scale = [], 1.0
    for pair in range(DIMENSIONS // 2):
        plain = THETA ** (-2 * pair / DIMENSIONS)
        turns = LENGTH * plain / (2 * math.pi)
        if rope_type == "linear":
            found.append(plain / FACTOR)
        elif rope_type in ("ntk", "dynamic"):
            by = FACTOR if rope_type == "ntk" else max(1.0, FACTOR * length / LENGTH - (FACTOR - 1))
            found.append((THETA * by ** (DIMENSIONS / (DIMENSIONS - 2))) ** (-2 * pair / DIMENSIONS))
        elif rope_type == "llama3":
            share = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
            found.append(share * plain + (1 - share) * plain / FACTOR)
        else:
            scale = 0.1 * math.log(FACTOR) + 1

            def place(rotations):
                # The pair that turns so often over the trained length.
                return DIMENSIONS * math.log(LENGTH / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

            low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), DIMENSIONS - 1)
            ramp = min(1.0, max(0.0, (pair - low) / (high - low)))
            found.append(plain * (1 - ramp) + plain / FACTOR * ramp)
    return torch.tensor(found, dtype=torch.double), scale


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_the_frequencies_are_the_papers(rope_type):
    model = hfllm.HfllmForCausalLM(CONFIGS["ours"]())
    extend_model(model, extended_config(model.config, rope_type, FACTOR))
    length = 100
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    angles, scale = frequencies(rope_type, length)
    angles = (torch.arange(length).double()[:, None] * angles).repeat(1, 2)
    torch.testing.assert_close(cos[0].double(), angles.cos() * scale, atol=2e-5, rtol=0)
    torch.testing.assert_close(sin[0].double(), angles.sin() * scale, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_any_model_is_extended_in_place_and_loads_so(rope_type, name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    ids = torch.randint(0, 64, (1, 100))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        extend_model(model, extended_config(model.config, rope_type, FACTOR))
        after = model(ids, use_cache=False).logits
        short = model(ids[:, :20], use_cache=False).logits
    assert (after - before).abs().max() > 1e-3
    # Dynamic positions leave short texts as they were; the others do not.
    assert ((short - before[:, :20]).abs().max() < 1e-5) == (rope_type == "dynamic")
    assert model.config.max_position_embeddings == (LENGTH if rope_type == "dynamic" else LENGTH * FACTOR)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, after, atol=0, rtol=0)


def test_layers_with_a_window_keep_their_positions():
    config = extended_config(CONFIGS["ours by type"](), "yarn", FACTOR)
    assert config.rope_parameters["sliding_attention"] == BY_TYPE["rope_parameters"]["sliding_attention"]
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    model = hfllm.HfllmForCausalLM(CONFIGS["ours by type"]())
    extend_model(model, config)
    plain = 100.0 ** (-torch.arange(0, DIMENSIONS, 2) / DIMENSIONS)
    torch.testing.assert_close(model.model.rotary_emb["sliding_attention"].inv_freq, plain)


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (CONFIGS["ours"], ("yarm", 4), "'yarm' is not one of linear"),
        (CONFIGS["ours"], ("yarn", 1), "--factor 1: expected a number above 1"),
        (CONFIGS["ours"], ("yarn", float("nan")), "--factor nan"),
        (CONFIGS["ours"], ("yarn", 4, 1), "--original_max_position_embeddings 1"),
        (GPT2Config, ("yarn", 4), "gpt2 has no rotary positions"),
        (lambda: hfllm.HfllmConfig(**SIZES, position_embedding_type="none"), ("ntk", 4), "has no rotary positions"),
        (lambda: hfllm.HfllmConfig(**SIZES, sliding_window=8), ("ntk", 4), "sees further than its window"),
        (
            lambda: hfllm.HfllmConfig(
                **SIZES, layer_types=["linear_attention", "full_attention"], no_rope_layers=[1, 0]
            ),
            ("ntk", 4),
            "sees further than its window",
        ),
        (
            lambda: extended_config(CONFIGS["llama"](), "linear", 2),
            ("yarn", 4),
            "rope_type='linear' has been extended already",
        ),
        *(
            (lambda kind=kind: kind(**SIZES, sliding_window=127, pad_token_id=0), ("ntk", 4), "sliding_window=127")
            for kind in (MistralConfig, Phi3Config, Starcoder2Config)
        ),
        *(
            (
                lambda: Phi3Config(**SIZES, pad_token_id=0),
                (kind, 4),
                f"--rope_type {kind}: a model of type phi3 refuses it: ",
            )
            for kind in ROPE_TYPES
            if kind != "ntk"
        ),
        (lambda: hfllm.HfllmConfig(**{**SIZES, "head_dim": 2}), ("ntk", 4), "needs at least 4 rotated dimensions"),
    ],
)
def test_what_cannot_be_extended_is_refused(config, how, message):
    with pytest.raises(InputError, match=message):
        extended_config(config(), *how)


def test_a_hybrid_is_extended_where_it_has_positions():
    config = hfllm.HfllmConfig(**SIZES, layer_types=["linear_attention", "full_attention"])
    assert extended_config(config, "linear", 8).rope_parameters["factor"] == 8.0


def test_a_window_of_the_new_length_hides_nothing():
    config = MistralConfig(**SIZES, sliding_window=128)
    assert extended_config(config, "linear", FACTOR).rope_parameters["factor"] == FACTOR

"""A cache of the first and the last tokens: one layer reads what stands in it as if it were the whole text."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
)

import hfllm
from hfllm.errors import InputError
from hfllm.evaluation.long_texts import nats_by_segment
from hfllm.generation.caches import SinkCache

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "eos_token_id": None,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
CONFIGS = {
    "ours": lambda: hfllm.HfllmConfig(**SIZES),
    "ours, sliding": lambda: hfllm.HfllmConfig(**SIZES, sliding_window=16),
    "ours, partly rotated": lambda: hfllm.HfllmConfig(**SIZES, rope_parameters=PARTIAL),
    "ours, no positions": lambda: hfllm.HfllmConfig(**SIZES, no_rope_layers=[0]),
    "ours, latent": lambda: hfllm.HfllmConfig(**SIZES, **LATENT),
    "deepseek": lambda: DeepseekV3Config(**SIZES, **LATENT, first_k_dense_replace=1),
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, yarn": lambda: LlamaConfig(**SIZES, rope_parameters=YARN),
    "cohere": lambda: CohereConfig(**SIZES, bos_token_id=None),
    "phi": lambda: PhiConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, layer_types=["full_attention"]),
}


def make(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sinks", [0, 3])
def test_one_layer_reads_the_first_and_last_tokens_as_a_text(name, sinks):
    model, window = make(name), 12
    ids = torch.randint(0, 64, (2, 120))
    cache, found = SinkCache(model, window, sinks), []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            found.append(model(token, cache=cache, use_cache=True).logits)
        for place in (3, 11, 12, 40, 119):
            seen = ids[:, : place + 1]
            if place >= window:
                seen = torch.cat([ids[:, :sinks], ids[:, place + 1 - (window - sinks) : place + 1]], dim=1)
            expected = model(seen, use_cache=False).logits[:, -1]
            assert expected.std() > 0.1
            torch.testing.assert_close(found[place][:, 0], expected, atol=1e-4, rtol=1e-4)
    assert cache.layers[0].keys.shape[-2] == window - 1 and cache.get_seq_length() == 120


def test_generate_takes_it():
    model = make("ours")
    ids = torch.randint(1, 64, (2, 30))
    settings = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **settings)
    # As long as nothing has to leave it is a plain cache.
    assert torch.equal(model.generate(ids, cache=SinkCache(model, 64), **settings), plain)
    cache = SinkCache(model, 16)
    out = model.generate(ids, cache=cache, prefill_chunk_size=4, **settings)
    assert out.shape == plain.shape and cache.layers[0].keys.shape[-2] == 15
    with pytest.raises(InputError, match="cannot undo tokens"):
        cache.layers[0].crop(1)


def test_a_hybrid_keeps_its_state():
    torch.manual_seed(0)
    kinds = ["linear_attention", "sliding_attention", "full_attention"]
    config = hfllm.HfllmConfig(**{**SIZES, "num_hidden_layers": 3}, layer_types=kinds, sliding_window=16)
    model = hfllm.HfllmForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 40))
    whole = nats_by_segment(model, ids, 40)
    torch.testing.assert_close(nats_by_segment(model, ids, 4, cache=SinkCache(model, 64)), whole, atol=1e-3, rtol=1e-4)
    cache = SinkCache(model, 8, 2)
    nats_by_segment(model, ids, 4, cache=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers[1:]] == [7, 7]
    cache = SinkCache(model, 24, 2)
    nats_by_segment(model, ids, 4, cache=cache)
    # A window that the layer learned with needs no first tokens.
    assert [layer.keys.shape[-2] for layer in cache.layers[1:]] == [15, 23]


def test_chunks_that_fit_stay_as_they_are():
    torch.manual_seed(0)
    kinds = ["chunked_attention", "full_attention"]
    config = hfllm.HfllmConfig(**{**SIZES, "num_hidden_layers": 2}, layer_types=kinds, attention_chunk_size=8)
    model = hfllm.HfllmForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 40))
    whole = nats_by_segment(model, ids, 40)
    torch.testing.assert_close(nats_by_segment(model, ids, 3, cache=SinkCache(model, 64)), whole, atol=1e-3, rtol=1e-4)
    cache = SinkCache(model, 12, 2)
    nats_by_segment(model, ids, 3, cache=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 11]


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (CONFIGS["ours"], (4, 4), "window_length=4 must be more than num_sink_tokens=4"),
        (CONFIGS["ours"], (8, -1), "both at least 0"),
        (lambda: hfllm.HfllmConfig(**SIZES, attention_chunk_size=32), (16, 4), "less than attention_chunk_size=32"),
        (
            lambda: FalconConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=False
            ),
            (16, 4),
            "falcon has no apply_rotary_pos_emb",
        ),
        (lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2), (16, 4), "needs rotary positions"),
        (
            lambda: LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            (16, 4),
            "rope_type='dynamic' depends on the length",
        ),
    ],
)
def test_what_cannot_be_kept_so_is_refused(config, sizes, message):
    model = AutoModelForCausalLM.from_config(config())
    with pytest.raises(InputError, match=message):
        SinkCache(model, *sizes)

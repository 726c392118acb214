"""All weights of the files are in the model, and all of the model's in the files; only heads may be new on purpose."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    SiglipVisionConfig,
)

import hfllm
from hfllm.errors import InputError
from hfllm.models.loading.adapters import load_scorer
from hfllm.models.loading.weights import load_weights_of

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def saved(folder, model, change=None, **fields):
    """Save a model, its tensors changed by `change` and its config by `fields`; return the folder's name."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    for name, value in fields.items():
        setattr(model.config, name, value)
    model.config.save_pretrained(folder)
    return str(folder)


def llama(kind=LlamaForCausalLM, **more):
    return kind(LlamaConfig(**{**SIZES, **more}))


def test_a_layer_fewer_is_named_whatever_is_loaded(tmp_path):
    whole = saved(tmp_path / "whole", llama(), num_hidden_layers=1)
    # Its names have no prefix.
    trunk = saved(tmp_path / "trunk", llama(LlamaModel), num_hidden_layers=1)
    for name in (whole, trunk):
        for load in (load_scorer, lambda name: load_weights_of(AutoModelForSequenceClassification, name)):
            with pytest.raises(
                InputError, match=r"9 weights are in its files and not of .*, such as (model\.)?layers\.1"
            ):
                load(name)
    with pytest.raises(InputError, match="9 weights are in its files and not of the LlamaForCausalLM"):
        load_weights_of(AutoModelForCausalLM, whole)


def test_biases_that_the_config_does_not_name_are_not_left_out(tmp_path):
    name = saved(tmp_path, llama(attention_bias=True), attention_bias=False)
    with pytest.raises(
        InputError, match=r"8 weights are in its files .* such as model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        load_weights_of(AutoModelForCausalLM, name)


def test_heads_that_are_new_on_purpose_are_let_pass(tmp_path):
    scorer = load_scorer(saved(tmp_path / "causal", llama()))
    assert scorer.has_new_head
    # A trunk alone, and a reward model, whose head is kept.
    assert load_scorer(saved(tmp_path / "trunk", llama(LlamaModel))).has_new_head
    assert not load_scorer(saved(tmp_path / "reward", scorer)).has_new_head


def test_tied_weights_are_stored_once(tmp_path):
    model = llama(tie_word_embeddings=True)
    name = saved(tmp_path, model)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_weights_of(AutoModelForCausalLM, name)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_older_versions_stored_and_value_heads_do_no_harm(kind, tmp_path):
    small = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model, buffers = {
        "llama": (llama(), ("model.layers.{}.self_attn.rotary_emb.inv_freq",)),
        "gpt2": (GPT2LMHeadModel(small), ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias")),
    }[kind]
    added = {name.format(layer): torch.ones(3) for layer in (0, 1) for name in buffers}
    added["v_head.summary.weight"] = torch.ones(1, 16)
    name = saved(tmp_path, model, lambda tensors: tensors | added)
    loaded, _ = load_weights_of(AutoModelForCausalLM, name)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_model_that_sees_has_its_head(tmp_path):
    """A new head is what scorers and classifiers begin with; of a model that writes it would be random."""
    sizes = {name: number for name, number in SIZES.items() if name not in ("vocab_size", "pad_token_id")}
    tower = SiglipVisionConfig(**sizes, image_size=8, patch_size=4, vision_use_head=False)
    model = hfllm.with_vision(llama(tie_word_embeddings=False), tower, image_token_id=3)
    load_weights_of(AutoModelForImageTextToText, saved(tmp_path / "whole", model))

    def headless(weights):
        return {name: each for name, each in weights.items() if "lm_head" not in name}

    with pytest.raises(InputError, match="lm_head"):
        load_weights_of(AutoModelForImageTextToText, saved(tmp_path / "headless", model, headless))

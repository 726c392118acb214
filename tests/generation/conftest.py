"""Targets and drafts in fp64, where batches and single tokens round too finely to turn an argmax."""

import copy

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 3,
}


@pytest.fixture
def make_target(make_model):
    """A model of the family, of any axes; `llama` and `gpt2` are transformers' own classes."""

    def make(seed=0, **axes):
        model = make_model(seed, **{**SIZES, "bos_token_id": None, **axes}).double()
        # The grouped kernel of the experts knows no fp64.
        model.set_experts_implementation("eager")
        return model

    def native(kind, seed=0):
        torch.manual_seed(seed)
        if kind == "llama":
            config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
            return transformers.LlamaForCausalLM(config).eval().double()
        config = transformers.GPT2Config(
            **{name: SIZES[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id")},
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=128,
        )
        return transformers.GPT2LMHeadModel(config).eval().double()

    make.native = native
    return make


@pytest.fixture
def blurred():
    """A copy of a model with noise on its weights: a draft that is right about half of the time."""

    def blur(model, noise=0.015):
        draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
        for parameter in draft.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return draft

    return blur


@pytest.fixture
def prompts():
    """Left-padded prompts of different lengths, (ids, mask)."""

    def make(rows, length=9, seed=0, vocab_size=40):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, vocab_size, (rows, length), generator=generator)
        padding = torch.arange(rows).unsqueeze(1) * 2 % length
        mask = (torch.arange(length) >= padding).long()
        return ids * mask, mask

    return make

"""The fast decoder takes native models of the families that convert, and says what `generate` says."""

import pytest
import torch
from natives import NATIVES, build

from hfllm.errors import InputError
from hfllm.generation import fast_generate
from hfllm.generation.packed.model import packed_model, unsupported_reason

# Why the packed layers do not take the others: these and no more.
UNSUPPORTED = {
    **dict.fromkeys(("gpt1", "gpt-neo", "gemma2", "gemma2-uncapped"), "attn_implementation='eager'"),
    **dict.fromkeys(("gemma3", "gemma3-flat", "olmo3-long"), "rotary parameters of their own"),
    **dict.fromkeys(("olmo2", "olmo3", "olmo3-flat", "exaone4", "exaone4-no-window"), "norm_placement='output'"),
    **dict.fromkeys(("glm4", "glm4-proportional"), "norm_placement='both'"),
    **dict.fromkeys(("olmoe", "olmoe-raw"), "qk_norm_scope='all_heads'"),
    **dict.fromkeys(("olmo-hybrid", "olmo-hybrid-rope"), "layers of type linear_attention"),
    "llama4": "layers of type chunked_attention",
    **dict.fromkeys(("deepseek-v3", "deepseek-v3-plain", "deepseek-v3-experts"), "latent attention"),
    **dict.fromkeys(("deepseek-v2", "deepseek-v2-experts", "glm4-moe-lite"), "latent attention"),
    **dict.fromkeys(("youtu", "minicpm3"), "latent attention"),
}
# One of each way to store weights or to name the sizes of a model.
QUICK = ("llama", "gpt2", "neox", "falcon-40b", "phi3", "gptj", "bigcode", "cohere", "mistral", "qwen3", "glm4-moe")
DECODED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NATIVES if name not in UNSUPPORTED
]
# Where the factors of `longrope` change nothing is decoded.
LENGTHS = {"phi3-long": 16}


def prompts():
    """Six prompts of 1 to 9 tokens, padded on the left, and ends that random models meet at different times."""
    ids = torch.randint(3, 320, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) >= torch.arange(6).unsqueeze(1) * 2 % 9).long()
    return ids * mask, mask


@pytest.mark.parametrize("name", DECODED)
def test_greedy_tokens_are_those_of_generate(name):
    model, (ids, mask) = build(name), prompts()
    assert unsupported_reason(model) is None
    model.generation_config.update(eos_token_id=[*range(3, 320, 4)], pad_token_id=0)
    new = LENGTHS.get(name, 21) - ids.shape[1]
    settings = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, custom_generate=fast_generate, draft=None), wanted)
    assert len((wanted[:, 9:] > 0).sum(1).unique()) > 1


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_the_others_are_refused_by_name(name):
    model = build(name)
    assert UNSUPPORTED[name] in unsupported_reason(model)
    with pytest.raises(InputError, match="cannot decode over packed weights"):
        packed_model(model)

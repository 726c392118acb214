"""The next turn of an episode reads what is new alone, and is what it is when all is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

from hfllm.trainers.ppo.rollout import pad_prompts
from hfllm.trainers.ppo.sampling import TurnCaches

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODELS = {
    "rotary": lambda: LlamaForCausalLM(LLAMA),
    "learned positions": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def padded(sequences):
    return pad_prompts(sequences, 0, torch.device("cpu"))


def read(model, sequences, cache=None):
    """The logits after each sequence, and the cache."""
    ids, mask = padded(sequences)
    known = 0 if cache is None else cache.get_seq_length()
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
    with torch.no_grad():
        output = model(input_ids=ids[:, known:], attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
    return output.logits[:, -1], output.cache


def keep(caches, episodes, sequences, cache):
    ids, mask = padded(sequences)
    rows = torch.arange(len(ids))
    caches.keep(episodes, cache, rows, ids, mask.argmax(1), torch.full((len(ids),), ids.shape[1]))


def unread(old, sequence):
    """How many tokens of a sequence are to be read after an old one: the last one always is."""
    return min(len(sequence) - n for n in range(len(sequence)) if sequence[:n] == old[:n])


tokens = st.lists(st.integers(1, 63), min_size=1, max_size=7)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    episodes=st.lists(st.tuples(tokens, st.integers(0, 8), tokens), min_size=2, max_size=6),
    cut=st.integers(0, 6),
    order=st.randoms(use_true_random=False),
)
def test_what_was_read_changes_nothing(model, episodes, cut, order):
    """Whether sequences share all, some or none of their tokens with those that were kept, in one part or two."""
    caches = TurnCaches()
    for part in (range(len(episodes))[:cut], range(len(episodes))[cut:]):
        if part:
            old = [episodes[at][0] for at in part]
            keep(caches, part, old, read(model, old)[1])
    going = order.sample(range(len(episodes)), len(episodes) - 1)
    sequences = [[*episodes[at][0][: episodes[at][1]], *episodes[at][2]] for at in going]
    ids, mask = padded(sequences)
    cache = caches.before(going, ids, mask)
    new = max(unread(episodes[at][0], each) for at, each in zip(going, sequences, strict=True))
    assert (0 if cache is None else cache.get_seq_length()) == ids.shape[1] - new
    if cache is not None:
        torch.testing.assert_close(read(model, sequences, cache)[0], read(model, sequences)[0], atol=1e-5, rtol=1e-4)
    # It is known for one turn.
    assert caches.before(going, ids, mask) is None


def test_other_caches_are_not_kept():
    """Of layers that see a window, of a fixed size, or that were never filled; nor what is not known of each."""
    ids, mask = padded([[1, 2, 3, 4]])
    window = LlamaConfig(**{**LLAMA.to_dict(), "layer_types": ["full_attention", "sliding_attention"]})
    window.sliding_window = 2
    kinds = [DynamicCache(config=window), StaticCache(config=LLAMA, max_cache_len=8), DynamicCache(config=LLAMA), None]
    for cache in (*kinds, DynamicCache()):
        for layer in range(2 if cache in kinds[:2] else 0):
            cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), layer)
        caches = TurnCaches()
        keep(caches, [5], [[1, 2, 3]], cache)
        assert caches.before([5], ids, mask) is None
    caches = TurnCaches()
    keep(caches, [5], [[1, 2, 3]], DynamicCache([(torch.ones(1, 2, 3, 4),) * 2]))
    assert caches.before([5, 6], *padded([[1, 2, 3, 4]] * 2)) is None

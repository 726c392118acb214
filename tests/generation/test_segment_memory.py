"""Memory across segments: a long memory is the whole text, a window needs no longer one, and no gradient goes back."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hfllm
from hfllm.errors import InputError
from hfllm.evaluation.long_texts import nats_by_segment, streams
from hfllm.generation.caches import SegmentMemory

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MIXES = {
    "full": {},
    "sliding": {"sliding_window": 8},
    "chunked": {"attention_chunk_size": 8},
    "linear, full": {"layer_types": ["linear_attention", "full_attention"]},
    "sliding, linear": {"layer_types": ["sliding_attention", "linear_attention"], "sliding_window": 8},
}


def make(name):
    torch.manual_seed(0)
    return hfllm.HfllmForCausalLM(hfllm.HfllmConfig(**SIZES, **MIXES[name])).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("segment", [2, 16])
def test_with_all_in_memory_it_is_the_whole_text(name, segment):
    model = make(name)
    ids = torch.randint(0, 64, (2, 70))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    whole = whole.view(2, -1)
    torch.testing.assert_close(nats_by_segment(model, ids, segment, 1000), whole, atol=1e-4, rtol=1e-4)
    # A window or a chunk of 8 looks back at 7 tokens, and a state at none.
    is_enough = "full" not in name
    assert ((nats_by_segment(model, ids, segment, 7) - whole).abs().max() < 1e-3) == is_enough
    # Without memory only the first piece is the same.
    alone = nats_by_segment(model, ids, segment)
    torch.testing.assert_close(alone[:, :segment], whole[:, :segment], atol=1e-4, rtol=1e-4)
    # Segments of 16 are whole chunks of 8.
    assert ((alone - whole).abs().max() > 0.1) == ((name, segment) != ("chunked", 16))


@pytest.mark.parametrize("name", MIXES)
def test_no_gradient_goes_back_into_earlier_pieces(name):
    """Against finite differences of an embedding that both pieces have, with the memory held fixed."""
    model = make(name)
    weight, place, shift = model.model.embed_tokens.weight, (5, 3), 3e-3
    first, second = torch.randint(6, 64, (2, 2, 12))
    first[:, 8:] = second[:, 2:4] = second[:, 7:8] = 5

    def loss_of(memory):
        logits = model(input_ids=second, cache=memory, use_cache=True).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), second[:, 1:].flatten())

    def read():
        memory = SegmentMemory(model, 6)
        model(input_ids=first, cache=memory, use_cache=True)
        return memory

    loss_of(read()).backward()
    gradient, losses = weight.grad[place].item(), {"fixed": [], "moved": []}
    with torch.no_grad():
        for sign in (1, -1):
            fixed = read()
            weight[place] += sign * shift
            losses["fixed"].append(loss_of(fixed).item())
            losses["moved"].append(loss_of(read()).item())
            weight[place] -= sign * shift
    fixed, moved = ((up - down) / (2 * shift) for up, down in losses.values())
    assert gradient == pytest.approx(fixed, rel=0.02, abs=1e-4)
    assert abs(moved - fixed) > 0.05 * abs(fixed)


def test_streams_go_on_row_by_row():
    batches = streams(torch.arange(50), 3, 4)
    assert batches.shape == (4, 3, 4)
    for row in range(3):
        assert batches[:, row].flatten().tolist() == list(range(16 * row, 16 * row + 16))
    with pytest.raises(InputError, match="50 tokens are fewer than 13 rows of 4"):
        streams(torch.arange(50), 13, 4)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="memory_length=0: expected at least 1"):
        SegmentMemory(make("full"), 0)
    SegmentMemory(make("linear, full"), 0)
    with pytest.raises(InputError, match="gpt2 has a table of positions that ends"):
        SegmentMemory(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)), 8)
    with pytest.raises(InputError, match="segment_length=1"):
        nats_by_segment(make("full"), torch.ones(1, 8, dtype=torch.long), 1)


def test_checkpointing_in_training_refuses_a_memory_and_no_other_call():
    model = make("full").train()
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 64, (1, 8))
    with pytest.raises(ValueError, match="checkpointing in training takes no cache, got a SegmentMemory"):
        model(input_ids=ids, labels=ids, cache=SegmentMemory(model, 4), use_cache=True)
    model(input_ids=ids, labels=ids, use_cache=True).loss.backward()
    with torch.no_grad():
        model(input_ids=ids, cache=SegmentMemory(model, 4), use_cache=True)
    model.eval()(input_ids=ids, labels=ids, cache=SegmentMemory(model, 4), use_cache=True).loss.backward()

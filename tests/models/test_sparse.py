"""Sparse attention by blocks equals a reference that looks at each query alone."""

from itertools import pairwise

import pytest
import torch
from torch.func import functional_call, grad
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    StaticCache,
    masking_utils,
)

import hfllm
from hfllm.errors import InputError
from hfllm.generation.caches import SegmentMemory, SinkCache
from hfllm.models.family import attention_masks_hfllm
from hfllm.models.family.attention_masks_hfllm import sparse_attention_forward

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH, BLOCK, COUNT = 29, 4, 3
SIZES = {"sparse_block_size": BLOCK, "sparse_num_blocks": COUNT}


def reference(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """One query at a time: the keys that its row of a mask shows, in blocks of `BLOCK`, and the best of these."""
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    outputs = torch.zeros_like(query)
    for row in range(query.shape[0]):
        for place in range(length):
            if attention_mask is None:
                seen = torch.arange(past + place + 1)
            else:
                seen = attention_mask[row, 0, place].nonzero()[:, 0]
            blocks = seen.split(module.config.sparse_block_size)
            for head in range(query.shape[1] if len(seen) else 0):
                of_keys = head * key.shape[1] // query.shape[1]
                asked, keys, values = query[row, head, place], key[row, of_keys], value[row, of_keys]
                likeness = [(asked @ keys[block].mean(0)).item() for block in blocks[:-1]]
                best = sorted(range(len(likeness)), key=lambda index: -likeness[index])
                chosen = torch.cat(
                    [blocks[index] for index in best[: module.config.sparse_num_blocks - 1]] + [blocks[-1]]
                )
                weights = (keys[chosen] @ asked * scaling).softmax(0)
                outputs[row, head, place] = weights @ values[chosen]
    return outputs.transpose(1, 2).contiguous(), None


def whole_mask(**kwargs):
    return masking_utils.sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "one_by_one", reference)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "one_by_one", whole_mask)


@pytest.fixture
def ways(monkeypatch):
    """Call a function by the kernel of the CPU, and by the formulas that any device has."""

    def both(function):
        results = [function()]
        with monkeypatch.context() as patched:
            patched.setattr(attention_masks_hfllm, "needs_autograd", lambda: True)
            return [*results, function()]

    return both


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_pair(make_model):
    """Two models with the same weights: one of the reference, one of the implementation."""

    def make(family="ours", **sizes):
        models = []
        for implementation in ("one_by_one", "sparse"):
            if family == "ours":
                model = make_model(num_hidden_layers=1, **SIZES | sizes)
            else:
                torch.manual_seed(0)
                config = LlamaConfig(
                    vocab_size=300,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    initializer_range=0.1,
                    **SIZES | sizes,
                )
                model = LlamaForCausalLM(config).eval()
            model.set_attn_implementation(implementation)
            models.append(model)
        return models

    return make


def learned(model, ids, labels=None, **given):
    """The logits of a forward pass, and the gradients by the names of the weights."""
    model.zero_grad()
    output = model(ids, labels=ids if labels is None else labels, use_cache=False, **given)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.logits.detach(), grads


@pytest.mark.parametrize(
    ("family", "block", "count", "length"),
    [("ours", 4, 3, 29), ("ours", 7, 2, 28), ("ours", 3, 1, 10), ("llama", 2, 4, 20)],
)
def test_it_equals_the_reference_and_so_do_its_gradients(make_pair, ids, ways, family, block, count, length):
    expected, sparse = make_pair(family, sparse_block_size=block, sparse_num_blocks=count)
    ids = ids[: 1 if length % block == 0 else 2, :length]
    logits, grads = learned(expected, ids)
    for result in ways(lambda: learned(sparse, ids)):
        torch.testing.assert_close(result, (logits, grads), **CLOSE)
    # Full attention is another function.
    sparse.set_attn_implementation("sdpa")
    assert (sparse(ids).logits - logits).abs().max() > 1e-2


def test_left_padding_changes_nothing(make_pair, ids, ways):
    expected, sparse = make_pair()
    mask = torch.arange(LENGTH) >= torch.tensor([0, 6])[:, None]
    given = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    # Padding predicts the first token, which is no target therefore.
    given["labels"] = ids.where(mask.cumsum(1) > 1, -100)
    logits, grads = learned(expected, ids, **given)
    for result in ways(lambda: learned(sparse, ids, **given)):
        torch.testing.assert_close((result[0][mask], result[1]), (logits[mask], grads), **CLOSE)
        torch.testing.assert_close(result[0][1, 6:], sparse(ids[1:, 6:], use_cache=False).logits[0], **CLOSE)


@pytest.mark.parametrize("family", ["ours", "llama"])
def test_packed_rows_equal_separate_ones(make_pair, ids, family):
    _, sparse = make_pair(family, sparse_num_blocks=2)
    lengths = (15, 3, LENGTH - 18)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    separate = torch.cat([sparse(part, use_cache=False).logits for part in ids[:1].split(lengths, 1)], 1)
    # Stock models tell the documents of a row apart in the first form alone.
    for form in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones_like(ids[:1])}):
        if family == "ours" or form == {"use_cache": False}:
            logits = sparse(ids[:1], position_ids=positions, **form).logits
            torch.testing.assert_close(logits, separate, **CLOSE)


@pytest.mark.parametrize("pieces", [[20, 9], [13, 1, 15], [2, 25, 1, 1]])
@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_pieces_with_a_cache_equal_the_whole(make_pair, ids, pieces, padding, cache_class):
    _, sparse = make_pair()
    mask = (torch.arange(LENGTH) >= torch.tensor([0, padding])[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = sparse(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    more = {"max_cache_len": LENGTH + 5} if cache_class is StaticCache else {}
    cache, logits, end = cache_class(config=sparse.config, **more), [], 0
    for piece, places in zip(ids.split(pieces, 1), positions.split(pieces, 1), strict=True):
        end += piece.shape[1]
        given = {"attention_mask": mask[:, :end], "position_ids": places}
        logits.append(sparse(piece, cache=cache, use_cache=True, **given).logits)
    is_real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[is_real], whole[is_real], **CLOSE)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("cache", [lambda model: SinkCache(model, 15, 2), lambda model: SegmentMemory(model, 14)])
def test_blocks_are_counted_among_the_keys_that_a_cache_keeps(make_pair, ids, cache, padding):
    mask = (torch.arange(LENGTH) >= torch.tensor([0, padding])[:, None]).long()
    results, ends = [], [9, 10, 22, 23, LENGTH]
    for model in make_pair():
        kept, logits = cache(model), []
        for begin, end in pairwise([0, *ends]):
            given = {"attention_mask": mask[:, :end]} if padding else {}
            logits.append(model(ids[:, begin:end], cache=kept, use_cache=True, **given).logits)
        results.append(torch.cat(logits, 1)[mask.bool()])
    torch.testing.assert_close(*results, **CLOSE)


def test_generation_equals_that_of_the_reference(make_pair, ids):
    expected, sparse = make_pair()
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 6])[:, None]).long()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answers = expected.generate(ids, attention_mask=mask, **settings)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(sparse.generate(ids, attention_mask=mask, **settings, **more), answers), more


@pytest.mark.slow
def test_a_model_with_the_sizes_is_sparse_wherever_it_is_loaded(make_model, ids, tmp_path):
    model = make_model(**SIZES)
    assert model.config._attn_implementation == "sparse"
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    for more, equal in (
        ({}, True),
        ({"attn_implementation": "sparse"}, True),
        ({"attn_implementation": "sdpa"}, False),
    ):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **more).eval()
        assert torch.equal(loaded(ids).logits, expected) == equal, more
    with pytest.raises(InputError, match=r"no native class has sparse attention .*sparse_block_size=4, sparse_num_b"):
        hfllm.to_native(str(tmp_path / "model"), tmp_path / "native")
    hfllm.to_native(loaded, tmp_path / "native")
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = hfllm.with_vision(model, SiglipVisionConfig(**tower), image_token_id=3)
    assert text.model.language_model.config._attn_implementation == "sparse"
    torch.testing.assert_close(text.eval()(ids).logits, expected, **CLOSE)
    text.save_pretrained(tmp_path / "seeing")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "seeing").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)


def test_with_all_blocks_it_is_full_attention(make_pair, ids, ways):
    _, sparse = make_pair(sparse_num_blocks=8)
    full = sparse(ids).logits
    sparse.set_attn_implementation("sdpa")
    assert torch.equal(sparse(ids).logits, full)
    # And so is what it computes itself.
    query, key, value = torch.randn(3, 2, 4, 32, 8).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    keys, values = (states.unflatten(2, (-1, 4)) for states in (key, value))
    for begin in (0, 5):
        given = (query[:, :, begin * 4 :], keys, values, begin, None, 8, 8**-0.5)
        for output in ways(lambda given=given: attention_masks_hfllm.attend_by_block(*given)):
            torch.testing.assert_close(output.transpose(1, 2), expected[:, begin * 4 :], **CLOSE)
    places = torch.arange(32)[None]
    output = attention_masks_hfllm.attend_by_query(query, keys, values, places, None, 8, 8**-0.5)
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize(("scale", "dtype", "atol"), [(40.0, torch.float, 1e-4), (1.0, torch.bfloat16, 2e-2)])
def test_both_ways_agree_on_large_scores_and_in_low_precision(ways, scale, dtype, atol):
    query, key, value = torch.randn(3, 2, 2, 64, 8).unbind(0)
    keys, values = (states.unflatten(2, (-1, 8)).to(dtype) for states in (key, value))
    given = ((query * scale).to(dtype), keys, values, 0, None, 3, 1.0)
    outputs = ways(lambda: attention_masks_hfllm.attend_by_block(*given))
    assert outputs[0].dtype == dtype and outputs[0].isfinite().all()
    torch.testing.assert_close(*outputs, atol=atol, rtol=atol)


def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch):
    """The number of pairs that are scored, at one size and one number of blocks."""
    scored, plain = [], attention_masks_hfllm._attend_by_kernel

    def counted(query, key, *args):
        scored.append(query.shape[0] * query.shape[1] * key.shape[1])
        return plain(query, key, *args)

    monkeypatch.setattr(attention_masks_hfllm, "_attend_by_kernel", counted)
    pairs = []
    for length in (64, 128, 256):
        states = torch.randn(1, 1, length, 8)
        keys = states.unflatten(2, (-1, 8))
        attention_masks_hfllm.attend_by_block(states, keys, keys, 0, None, 3, 1.0)
        pairs.append(sum(scored))
        scored.clear()
    assert pairs[1] == 2 * pairs[0] and pairs[2] == 4 * pairs[0]


def test_layers_with_a_window_keep_it(make_model, ids):
    model = make_model(sliding_window=5, **SIZES)
    expected = model(ids).logits
    model.set_attn_implementation("sparse")
    assert torch.equal(model(ids).logits, expected)


def test_functional_gradients(make_pair, ids):
    _, sparse = make_pair()
    weights = {name: each.detach() for name, each in sparse.named_parameters()}

    def loss(weights):
        return functional_call(sparse, weights, (ids,), {"labels": ids, "use_cache": False}).loss

    torch.testing.assert_close(grad(loss)(weights), learned(sparse, ids)[1], **CLOSE)


def test_checkpointing_changes_nothing(make_pair, ids):
    model = make_pair()[1].train()
    expected = learned(model, ids)
    model.activation_checkpointing_enable()
    torch.testing.assert_close(learned(model, ids), expected)


@pytest.mark.slow
@pytest.mark.turn(2)
def test_one_graph_and_its_gradient(make_pair, ids):
    model = make_pair()[1]
    expected = learned(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(learned(compiled, ids)[0], expected[0], **CLOSE)
    mine = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(mine, expected[1], **CLOSE)
    positions = torch.arange(LENGTH)[None]
    with pytest.raises(Exception, match="compiles no packed rows"):
        compiled(ids, position_ids=positions, use_cache=False)


class TestRefusals:
    @pytest.mark.parametrize(
        "sizes",
        [
            {"sparse_block_size": 0},
            {"sparse_block_size": None},
            {"sparse_num_blocks": 0},
            {"sparse_num_blocks": 1.5},
            {"sparse_num_blocks": True},
        ],
        ids=str,
    )
    def test_sizes(self, make_model, sizes):
        (field, value), *_ = sizes.items()
        line = rf"^attn_implementation='sparse' needs {field} of at least 1 in the config, got {value}$"
        with pytest.raises(ValueError, match=line):
            make_model(**SIZES | sizes)
        with pytest.raises(ValueError, match="needs sparse_block_size"):
            make_model().set_attn_implementation("sparse")

    def test_what_it_cannot_compute(self, make_pair, ids):
        _, sparse = make_pair()
        states, module = torch.zeros(1, 1, LENGTH, 4), sparse.model.layers[0].self_attn
        for more, line in (
            ({"dropout": 0.1}, r"does not support dropout: set attention_dropout=0, not 0.1$"),
            ({"s_aux": torch.ones(1)}, r"does not support attention sinks \(s_aux\)"),
            ({"softcap": 30.0}, r"does not support a softcap \(softcap\)"),
        ):
            with pytest.raises(ValueError, match=rf"^attn_implementation='sparse' {line}"):
                sparse_attention_forward(module, states, states, states, None, **more)
        everything = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
        with pytest.raises(ValueError, match="takes no mask of four dimensions"):
            sparse(ids, attention_mask=everything)

    def test_masks_that_are_not_those_of_documents(self, make_pair):
        config, embeds = make_pair()[1].config, torch.zeros(2, LENGTH, 8)
        with pytest.raises(ValueError, match=r"cannot apply the mask function .*or_masks"):
            masking_utils.create_causal_mask(config, embeds, None, None, or_mask_function=lambda b, h, q, k: k < 3)
        with pytest.raises(ValueError, match=r"cannot apply the mask function TestRefusals$"):
            masking_utils.create_causal_mask(config, embeds, None, None, and_mask_function=lambda b, h, q, k: k >= 3)
        with pytest.raises(ValueError, match="needs a causal model"):
            masking_utils.create_bidirectional_mask(config, embeds, None)

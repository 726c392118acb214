"""Banded attention equals attention under a mask, in every form that a row of tokens takes."""

import pytest
import torch
from torch.func import functional_call, grad, vmap
from transformers import (
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    masking_utils,
)

import hfllm
from hfllm.models.family import attention_masks_hfllm
from hfllm.models.family.attention_masks_hfllm import banded_attention_forward, banded_mask, block_sizes

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LENGTH = 53


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 queries, so that short texts have many."""
    monkeypatch.setattr(attention_masks_hfllm, "SMALLEST_BLOCK", 4)


@pytest.fixture
def banded_calls(monkeypatch):
    """The masks that banded attention was called with in blocks."""
    masks, plain = [], attention_masks_hfllm.is_banded

    def seen(mask, key):
        masks.extend([mask] if plain(mask, key) else [])
        return plain(mask, key)

    monkeypatch.setattr(attention_masks_hfllm, "is_banded", seen)
    return masks


@pytest.fixture
def ids():
    return torch.randint(10, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_mistral():
    def make(implementation="sdpa", window=5):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=window,
            initializer_range=0.1,
        )
        return MistralForCausalLM._from_config(config, attn_implementation=implementation).eval()

    return make


@pytest.fixture(params=["ours", "mistral"])
def make_pair(request, make_model, make_mistral):
    """Two models with the same weights: one under a mask of the whole width, one banded."""

    def make(window=5):
        if request.param == "mistral":
            return make_mistral("sdpa", window), make_mistral("banded", window)
        pair = make_model(sliding_window=window), make_model(sliding_window=window)
        pair[0].set_attn_implementation("eager")
        pair[1].set_attn_implementation("banded")
        return pair

    return make


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9])
def test_it_equals_masked_attention_and_so_do_its_gradients(make_pair, ids, small_blocks, banded_calls, window):
    masked, banded = make_pair(window)
    expected, actual = (model(ids, labels=ids, use_cache=False) for model in (masked, banded))
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    for output in (expected, actual):
        output.loss.backward()
    torch.testing.assert_close(gradients(banded), gradients(masked), **CLOSE)
    assert len(banded_calls) == 2


def test_it_equals_masked_attention_at_its_own_size(make_pair, banded_calls):
    masked, banded = make_pair(100)
    ids = torch.randint(10, 300, (1, 430), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(banded(ids).logits, masked(ids).logits, **CLOSE)
    assert [tuple(mask.shape) for mask in banded_calls] == [(1, 7, 64, 192)] * 2


@pytest.mark.parametrize("window", [1, 5, 9])
def test_left_padding_changes_nothing(make_pair, ids, small_blocks, banded_calls, window):
    masked, banded = make_pair(window)
    mask = torch.arange(LENGTH) >= torch.tensor([0, 7, 30])[:, None]
    given = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    # Padding attends to nothing, and predicts the first token, which is no target therefore.
    labels = ids.where(mask.cumsum(1) > 1, -100)
    outputs = [model(ids, labels=labels, use_cache=False, **given) for model in (masked, banded)]
    torch.testing.assert_close(outputs[1].logits[mask], outputs[0].logits[mask], **CLOSE)
    alone = banded(ids[1:2, 7:], use_cache=False).logits[0]
    torch.testing.assert_close(outputs[1].logits[1, 7:], alone, **CLOSE)
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(gradients(banded), gradients(masked), **CLOSE)
    assert banded_calls


def test_packed_rows_equal_separate_ones(make_pair, ids, small_blocks, banded_calls):
    _, banded = make_pair()
    lengths = (20, 3, LENGTH - 23)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    separate = torch.cat([banded(part, use_cache=False).logits for part in ids[:1].split(lengths, 1)], 1)
    banded_calls.clear()
    # Stock models tell the documents of a row apart in this form alone.
    forms = [{"use_cache": False}]
    if isinstance(banded, hfllm.HfllmForCausalLM):
        forms += [{"use_cache": True}, {"attention_mask": torch.ones_like(ids[:1])}]
    for form in forms:
        logits = banded(ids[:1], position_ids=positions, **form).logits
        torch.testing.assert_close(logits, separate, **CLOSE)
    assert len(banded_calls) == 2 * len(forms)


@pytest.mark.parametrize("pieces", [[40, 13], [1, 2, 35, 1, 14], [1] * 8])
@pytest.mark.parametrize("kind", ["window", "all", "static"])
def test_pieces_with_a_cache_equal_the_whole(make_pair, ids, small_blocks, pieces, kind):
    _, banded = make_pair()
    length = sum(pieces)
    whole = banded(ids[:, :length], use_cache=False).logits
    caches = {
        "window": lambda: DynamicCache(config=banded.config),
        "all": DynamicCache,
        "static": lambda: StaticCache(config=banded.config, max_cache_len=LENGTH),
    }
    cache, logits = caches[kind](), []
    for piece in ids[:, :length].split(pieces, 1):
        logits.append(banded(piece, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)


@pytest.mark.slow
def test_generation_equals_that_of_masked_attention(make_pair, ids, small_blocks, banded_calls):
    masked, banded = make_pair()
    mask = (torch.arange(LENGTH) >= torch.tensor([0, 7, 30])[:, None]).long()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        expected, actual = (model.generate(ids, attention_mask=mask, **settings, **more) for model in (masked, banded))
        assert torch.equal(actual, expected), more
    assert banded_calls


def test_our_sdpa_is_banded_where_a_window_is_much_shorter_than_the_text(make_model, ids, small_blocks, banded_calls):
    model, banded = make_model(sliding_window=5), make_model(sliding_window=5)
    banded.set_attn_implementation("banded")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, banded(ids).logits)
    assert len(banded_calls) == 2 * 2


def test_a_window_as_long_as_the_text_gives_the_bits_of_sdpa(make_mistral, ids, small_blocks, banded_calls):
    for window, length in ((LENGTH, LENGTH), (60, LENGTH), (8, 20), (None, LENGTH)):
        sdpa, banded = make_mistral("sdpa", window), make_mistral("banded", window)
        assert torch.equal(sdpa(ids[:, :length]).logits, banded(ids[:, :length]).logits)
    assert not banded_calls


def test_the_cost_of_a_text_grows_with_its_length_alone(small_blocks):
    scores = [banded_mask(1, length, length, local_size=8).numel() for length in (64, 128, 256)]
    assert scores == [64 * 12, 128 * 12, 256 * 12]


def test_low_precision_is_as_near_as_that_of_sdpa(make_mistral, ids, small_blocks, banded_calls):
    exact = make_mistral()(ids).logits
    apart = [
        (make_mistral(implementation).bfloat16()(ids).logits - exact).abs().max()
        for implementation in ("sdpa", "banded")
    ]
    assert banded_calls and apart[1] < 2 * apart[0]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_drops_single_keys_and_scales_the_others(small_blocks, p):
    """With scores of 0 and values of 1, an output is the share of the keys that are left, over the share to leave."""
    window, (batch, length) = 3, (64, 40)
    zeros, ones = torch.zeros(batch, 1, length, 4), torch.ones(batch, 1, length, 4)
    function = masking_utils.sliding_window_causal_mask_function(window)
    mask = banded_mask(batch, length, length, mask_function=function, local_size=window)
    torch.manual_seed(0)
    output, _ = banded_attention_forward(torch.nn.Module(), zeros, zeros, ones, mask, dropout=p)
    visible = torch.arange(1, length + 1).clamp(max=window)
    left = output[:, :, 0, 0] * (1 - p) * visible
    torch.testing.assert_close(left, left.round())
    assert abs((left / visible).mean() - (1 - p)) < 0.02


@pytest.mark.parametrize("name", ["s_aux", "softcap", "position_bias"])
def test_what_it_cannot_compute_is_refused_by_name(name):
    states = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=rf"^attn_implementation='banded' does not support .*\({name}\): use 'eager'"):
        banded_attention_forward(torch.nn.Module(), states, states, states, None, **{name: torch.ones(1)})


def test_a_window_of_none_at_all_is_refused(make_mistral, ids):
    with pytest.raises(ValueError, match=r"^sliding_window and attention_chunk_size must be at least 1, got 0$"):
        make_mistral("banded", window=0)(ids)


def test_masks_that_reach_beyond_the_window_stay_whole(make_mistral, small_blocks):
    """Tokens of an image that see each other, and bidirectional windows."""
    config, embeds = make_mistral("banded").config, torch.zeros(2, LENGTH, 8)
    groups = torch.full((2, LENGTH), -1).index_fill(1, torch.arange(10, 30), 0)
    create = masking_utils.create_sliding_window_causal_mask
    whole = (2, 1, LENGTH, LENGTH)
    assert create(config, embeds, None, None, block_sequence_ids=groups).shape == whole
    assert create(config, embeds, None, None, or_mask_function=lambda b, h, q, k: k < 3).shape == whole
    assert masking_utils.create_bidirectional_sliding_window_mask(config, embeds, None).shape[-2:] == whole[-2:]
    # Functions that take away from the window do not matter.
    narrowed = create(config, embeds, None, None, and_mask_function=lambda b, h, q, k: k >= 3)
    assert narrowed.shape == (2, 14, 4, 8)
    sdpa = make_mistral().config
    dense = create(sdpa, embeds, None, None, and_mask_function=lambda b, h, q, k: k >= 3)
    assert narrowed.sum() - 3 * narrowed[:, -1, -1].sum() == dense.sum()  # the last query stands four times


def test_a_mask_of_four_dimensions_is_taken_as_it_is(make_pair, ids, small_blocks, banded_calls):
    masked, banded = make_pair()
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(3, 1, -1, -1)
    floats = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float).min)
    expected = masked(ids, attention_mask=floats).logits
    torch.testing.assert_close(banded(ids, attention_mask=mask).logits, expected, **CLOSE)
    assert not banded_calls


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_attention_equals_that_under_a_mask(ids, small_blocks, banded_calls, padded):
    config = Llama4TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=1,
        moe_layers=[],
        attention_chunk_size=7,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Llama4ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    mask = torch.arange(LENGTH) >= torch.tensor([0, 3, 8])[:, None] * padded
    given = {"attention_mask": mask.long()} if padded else {}
    expected = model(ids, use_cache=False, **given).logits
    model.set_attn_implementation("banded")
    torch.testing.assert_close(model(ids, use_cache=False, **given).logits[mask], expected[mask], **CLOSE)
    assert config.layer_types.count("chunked_attention") == len(banded_calls) == 3
    first = model(ids[:, :20], use_cache=True, **{name: each[:, :20] for name, each in given.items()})
    second = model(ids[:, 20:], cache=first.cache, use_cache=True, **given)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1)[mask], expected[mask], **CLOSE)


class TestOtherTools:
    @pytest.fixture
    def model(self, make_model, small_blocks):
        return make_model(sliding_window=5, num_hidden_layers=1)

    @pytest.fixture
    def loss_of(self, model, ids):
        def loss(weights, row):
            return functional_call(model, weights, (row[None],), {"labels": row[None], "use_cache": False}).loss

        return loss

    @pytest.mark.slow
    @pytest.mark.turn(2)
    def test_one_graph_and_its_gradient(self, model, ids, banded_calls):
        model(ids, labels=ids, use_cache=False).loss.backward()
        expected = {name: each.clone() for name, each in gradients(model).items()}
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.testing.assert_close(gradients(model), expected, **CLOSE)
        mask = (torch.arange(LENGTH) >= 4).long().expand(3, -1)
        logits = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits[:, 4:], plain[:, 4:], **CLOSE)

    def test_gradients_of_each_example(self, model, loss_of, ids, banded_calls):
        weights = {name: each.detach() for name, each in model.named_parameters()}
        each = vmap(grad(loss_of), in_dims=(None, 0), randomness="different")(weights, ids)
        model(ids, labels=ids, use_cache=False).loss.backward()
        mean = {name: value.mean(0) for name, value in each.items()}
        torch.testing.assert_close(mean, gradients(model), **CLOSE)
        assert banded_calls

    def test_checkpointing_and_adapters(self, model, ids, banded_calls):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).train()
        learned = []
        for _ in range(2):
            adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            learned.append(gradients(adapted))
            adapted.zero_grad()
            adapted.enable_input_require_grads()
            model.activation_checkpointing_enable()
        torch.testing.assert_close(*learned)
        assert len(learned[0]) == 2 * 2 and len(banded_calls) == 3


def test_the_sizes_of_blocks_cover_the_window():
    for window in (1, 2, 63, 64, 65, 128, 129, 255, 256, 257, 4096):
        block, reach = block_sizes(window)
        assert reach % block == 0 and window - 1 <= reach - block < window - 1 + block

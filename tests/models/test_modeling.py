"""The invariants of a decoder, for every axis of the family."""

import pytest
import torch
from families import BERT, FAMILIES
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.cache_utils import DynamicCache, StaticCache

import hfllm
from hfllm.generation.speculative.speculative import fast_generate
from hfllm.models.family import layers_hfllm, modeling_hfllm, real_tokens_hfllm
from hfllm.models.family.attention_hfllm import create_masks, packed_sequences


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def axes(request):
    return FAMILIES[request.param]


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_cache_equals_no_cache(make_model, axes, ids):
    model = make_model(**axes)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], cache=first.cache, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_static_cache_equals_dynamic(make_model, axes, ids):
    model = make_model(**axes)
    dynamic = model.generate(ids, max_new_tokens=8, do_sample=False)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(dynamic, static)
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(model(ids, cache=cache).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing(make_model, axes, ids):
    model = make_model(**axes)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids), 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_equals_its_row(make_model, axes, ids):
    model = make_model(**axes)
    torch.testing.assert_close(model(ids).logits[1:], model(ids[1:]).logits, atol=1e-5, rtol=1e-5)


def test_sdpa_equals_eager(make_model, axes, ids):
    model = make_model(**axes)
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    output = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, fused, atol=1e-5, rtol=1e-5)
    assert len(output.attentions) == 2 - model.config.layer_types.count("linear_attention")
    assert output.attentions[0].shape == (2, 4, 12, 12)
    assert len(output.hidden_states) == 3


def test_the_future_is_not_seen(make_model, axes, ids):
    model = make_model(**axes)
    changed = ids.clone()
    changed[:, 8:] = 5
    torch.testing.assert_close(model(ids).logits[:, :8], model(changed).logits[:, :8], atol=1e-6, rtol=1e-6)


def test_activation_checkpointing_changes_neither_loss_nor_gradient(make_model, axes, ids):
    def gradients(model):
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in model.parameters()]

    def counted(model, calls):
        next(model.model.layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
        return model

    once, twice = [], []
    checkpointed = counted(make_model(**axes), twice)
    checkpointed.activation_checkpointing_enable()
    torch.testing.assert_close(gradients(checkpointed), gradients(counted(make_model(**axes), once)))
    assert (len(once), len(twice)) == (1, 2)


@pytest.mark.parametrize("more", [{}, {"every_n_layers": 2}])
def test_reentrant_checkpointing_is_refused_where_it_loses_the_experts_balance(make_model, ids, more):
    model = make_model(**FAMILIES["mixtral"]).train()
    model.activation_checkpointing_enable({"use_reentrant": True}, **more)
    with pytest.raises(ValueError, match=r"reentrant .* use_reentrant=False .* router_aux_loss_coef=0"):
        model(ids, labels=ids)
    # Nothing is lost without that loss, or where nobody trains.
    with torch.no_grad():
        model(ids, labels=ids)
    model.config.router_aux_loss_coef = 0.0
    model(ids, labels=ids).loss.backward()
    reentrant = [parameter.grad.clone() for parameter in model.parameters()]
    plain = make_model(**FAMILIES["mixtral"], router_aux_loss_coef=0.0).train()
    plain(ids, labels=ids).loss.backward()
    torch.testing.assert_close(reentrant, [parameter.grad for parameter in plain.parameters()])


def test_frozen_routers_need_no_gradient_of_their_balance(make_model, ids):
    model = make_model(**FAMILIES["mixtral"]).train().requires_grad_(False)
    model.model.layers[-1].mlp.experts.down_proj.requires_grad_(True)
    model(ids, labels=ids).loss.backward()


def test_every_parameter_receives_a_gradient(make_model, axes, ids):
    model = make_model(**axes)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_loss_is_the_mean_or_the_sum_over_num_items(make_model, ids):
    model = make_model()
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    logits, targets = output.logits[:, :-1].reshape(-1, output.logits.shape[-1]), labels[:, 1:].reshape(-1)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    count = (targets != -100).sum()
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)


def test_logits_to_keep_and_inputs_embeds(make_model, axes, ids):
    model = make_model(**axes)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], atol=1e-5, rtol=1e-5)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


def test_save_and_load_are_equal_and_tied_weights_stay_tied(make_model, axes, ids, tmp_path):
    model = make_model(**axes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hfllm.HfllmForCausalLM
    for each in (model, loaded):
        # Products of few tokens are rounded by where in a file the weights begin.
        each.set_experts_implementation("batched_mm")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == bool(axes.get("tie_word_embeddings"))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.slow
def test_training_overfits_one_batch(make_model, axes, ids):
    model = make_model(**axes, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        if loss < 0.1:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_embeddings_resize(make_model, axes, ids):
    model = make_model(**axes)
    size = model.config.vocab_size
    before = model(ids).logits
    model.resize_token_embeddings(size + 7)
    after = model(ids).logits
    assert after.shape[-1] == size + 7 == model.config.vocab_size
    torch.testing.assert_close(after[..., :size], before)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == bool(axes.get("tie_word_embeddings"))


def test_the_score_is_read_at_the_last_token_that_is_not_padding(make_model, axes, ids):
    model = make_model(model_class=hfllm.HfllmForSequenceClassification, num_labels=1, **axes)
    alone = model(ids[:1, :7]).logits
    padded = ids[:1].clone()
    padded[:, 7:] = model.config.pad_token_id
    mask = (padded != model.config.pad_token_id).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)


def test_a_language_model_becomes_a_scorer_with_its_trunk(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(scorer) is hfllm.HfllmForSequenceClassification
    for name, value in model.model.state_dict().items():
        assert torch.equal(scorer.model.state_dict()[name], value)


def test_auto_classes_know_the_family(make_config):
    assert type(AutoConfig.for_model("hfllm")) is hfllm.HfllmConfig
    assert type(AutoModel.from_config(make_config())) is hfllm.HfllmModel


def test_packed_sequences_equal_separate_ones(make_model, axes, ids):
    model = make_model(**axes)
    separate = torch.cat((model(ids[:1, :7]).logits, model(ids[1:, :5]).logits), 1)
    packed = torch.cat((ids[:1, :7], ids[1:, :5]), 1)
    positions = torch.cat((torch.arange(7), torch.arange(5))).unsqueeze(0)
    everything = torch.ones_like(packed)
    # With a cache or a mask asked for as well: what makes stock models attend across the boundary.
    for more in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": everything}):
        logits = model(packed, position_ids=positions, **more).logits
        torch.testing.assert_close(logits, separate, atol=1e-5, rtol=1e-5)


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def packed(ids):
    """A row with two documents of 7 and 5 tokens, its positions, and the second document."""
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    return torch.cat((ids[:1, :7], ids[1:, :5]), 1), positions, ids[1:, :5]


LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
BY_TYPE = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": LONGROPE,
        "sliding_attention": {**LONGROPE, "original_max_position_embeddings": 20},
    },
}


@pytest.mark.parametrize(
    ("axes", "padding"),
    [
        ({"rope_parameters": LONGROPE}, (5, 3)),
        (BY_TYPE, (5, 0)),
        pytest.param(BY_TYPE, (0, 0), marks=pytest.mark.slow),
    ],
)
def test_longer_factors_are_those_of_the_whole_text(make_model, ids, axes, padding):
    """Where they change, keys in the cache have other factors: all tokens are read again, however they were given."""
    model, mask = make_model(**axes), torch.ones_like(ids)
    for row, length in enumerate(padding):
        mask[row, :length] = 0
    fixed = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **fixed)
    assert torch.equal(model.generate(ids, **fixed), expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **fixed), expected[:, 12:])
    assert torch.equal(model.generate(ids, cache_implementation="static", **fixed), expected)
    beams = {**fixed, "num_beams": 2}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    # A cache that holds a part of the text, read up to before and up to after the change.
    for length in (6, 11):
        cache, positions = DynamicCache(config=model.config), (mask.cumsum(1) - 1).clamp(min=0)
        model(ids[:, :length], attention_mask=mask[:, :length], position_ids=positions[:, :length], cache=cache)
        assert torch.equal(model.generate(ids, cache=cache, **fixed), expected)


def test_a_text_of_which_only_a_part_is_known_is_not_read_again(make_model, ids):
    model = make_model(rope_parameters=LONGROPE)
    long = torch.cat((ids, ids), dim=1)
    with pytest.raises(ValueError, match="rope_type='longrope' has other factors for 20 tokens than for those in the"):
        model.generate(long, prefill_chunk_size=5, max_new_tokens=2)
    whole, pieces = (model.generate(ids[:1], prefill_chunk_size=size, max_new_tokens=9) for size in (None, 5))
    assert torch.equal(whole, pieces)


@pytest.mark.slow
def test_generation_continues_the_last_of_packed_sequences(make_model, axes, packed):
    model, (row, positions, last) = make_model(initializer_range=0.3, **axes), packed
    expected = model.generate(last, **GREEDY)[:, 5:]
    assert not torch.equal(model.generate(row, **GREEDY)[:, 12:], expected)
    for more in ({}, {"attention_mask": torch.ones_like(row)}, {"use_cache": False}):
        assert torch.equal(model.generate(row, position_ids=positions, **GREEDY, **more)[:, 12:], expected)


@pytest.mark.parametrize(
    "more",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 5},
        {"custom_generate": fast_generate},
    ],
    ids=lambda more: next(iter(more)),
)
def test_so_does_every_kind_of_generation(make_model, packed, more):
    model, (row, positions, last) = make_model(initializer_range=0.3), packed
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": more.get("num_beams", 1)}
    expected = model.generate(last, **settings)[:, 5:]
    assert torch.equal(model.generate(row, position_ids=positions, **settings | more)[:, 12:], expected)


@pytest.mark.parametrize("filler", [0, 1])
@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_on_the_left_is_no_packing(make_model, packed, ids, filler, has_mask):
    """Positions restart where padding ends. A packed row may be padded, and lie beside one that is not packed."""
    model, (row, positions, last) = make_model(initializer_range=0.3), packed
    padding = torch.zeros(1, 4, dtype=torch.long)
    rows = [
        torch.cat((padding, row), 1),
        torch.cat((padding.repeat(1, 2), padding[:, :3], last), 1),
        ids[:1].repeat(1, 2)[:, :16],
    ]
    masks = [(torch.arange(16) >= start).long()[None] for start in (4, 11, 0)]
    places = [torch.cat((padding + filler, positions), 1), (masks[1].cumsum(1) - 1).masked_fill(masks[1] == 0, filler)]
    given = {"input_ids": torch.cat(rows), "position_ids": torch.cat((*places, torch.arange(16)[None]))}
    if has_mask:
        given["attention_mask"] = torch.cat(masks)
    answers = model.generate(**given, **GREEDY)[:, 16:]
    alone = model.generate(last, **GREEDY)[:, 5:]
    assert torch.equal(answers, torch.cat((alone, alone, model.generate(rows[2], **GREEDY)[:, 16:])))


# With the positions of new tokens alone, nothing tells that a cache of all 7 holds another sequence.
@pytest.mark.parametrize(("cached", "has_all"), [(4, True), (4, False), (7, True)])
def test_generation_after_cached_sequences_continues_the_last(make_model, packed, cached, has_all):
    model, (row, positions, last) = make_model(initializer_range=0.3), packed
    cache = model(row[:, :cached], use_cache=True).cache
    places = positions if has_all else positions[:, cached:]
    answers = model.generate(row, position_ids=places, cache=cache, **GREEDY)[:, 12:]
    assert torch.equal(answers, model.generate(last, **GREEDY)[:, 5:])


def native_of(model, folder):
    return AutoModelForCausalLM.from_pretrained(hfllm.to_native(model, folder)).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_positions_that_jump_forward_are_one_sequence(make_model, ids, tmp_path, family):
    """As in training on skipped positions (PoSE). A stock model splits rows there unless it has a mask or a cache."""
    model = make_model(**FAMILIES[family])
    positions = torch.cat((torch.arange(5), torch.arange(40, 47)))[None].expand(2, -1)
    everything = torch.ones_like(ids)
    expected = native_of(model, tmp_path / "native")(ids, attention_mask=everything, position_ids=positions).logits
    for more in ({"attention_mask": everything}, {"use_cache": False}, {"use_cache": True}):
        logits = model(ids, position_ids=positions, **more).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_packed_sequences_may_jump_and_start_anywhere(make_model, axes, ids):
    model = make_model(**axes)
    first, second = torch.tensor([3, 4, 9, 10, 30, 31, 32]), torch.tensor([0, 1, 20, 21, 22])
    separate = [model(ids[:1, :7], position_ids=first[None]), model(ids[1:, :5], position_ids=second[None])]
    packed, positions = torch.cat((ids[:1, :7], ids[1:, :5]), 1), torch.cat((first, second))[None]
    for mask in (None, torch.ones_like(packed)):
        logits = model(packed, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits, torch.cat([each.logits for each in separate], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("positions", "mask", "expected"),
    [
        ([0, 1, 2, 3], None, None),
        ([5, 6, 90, 91], None, None),
        ([0, 1, 1, 2], None, None),
        ([0, 1, 0, 1], None, [0, 0, 1, 1]),
        ([4, 5, 3, 4], None, [0, 0, 1, 1]),
        ([0, 0, 1, 0], None, [0, 1, 1, 2]),
        ([1, 1, 0, 1], [0, 0, 1, 1], None),  # padding on the left
        ([0, 1, 1, 1], [1, 1, 0, 0], None),
        ([0, 1, 9, 0, 1], [1, 1, 0, 1, 1], [0, 0, 0, 1, 1]),  # padding between two sequences
        ([0, 1, 9, 2, 3], [1, 1, 0, 1, 1], None),
    ],
)
def test_only_restarts_are_boundaries(positions, mask, expected):
    mask = None if mask is None else torch.tensor([mask])
    found = packed_sequences(torch.tensor([positions]), mask)
    assert (None if found is None else found[0].tolist()) == expected


def test_flash_kernels_get_restarts_alone(make_model, ids, monkeypatch):
    """They split a row at every jump of the positions that they are given."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    given = []

    def kernel(*args, position_ids=None, **kwargs):
        given.append(None if position_ids is None else position_ids[0].tolist())
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "a_flash_kernel", kernel)
    model = make_model(num_hidden_layers=1)
    model.config._attn_implementation_internal = "a_flash_kernel"
    for positions in ([0, 1, 2, 7, 8], [4, 5, 0, 1, 2]):
        model(ids[:1, :5], position_ids=torch.tensor([positions]), use_cache=False)
    assert given == [None, [0, 1, 0, 1, 2]]


def test_packed_rows_with_padding_equal_separate_ones(make_model, ids):
    model = make_model()
    packed = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[:1, :7], ids[1:, :5]), 1)
    mask = (torch.arange(15) >= 3).long().unsqueeze(0)
    positions = torch.cat((torch.zeros(3, dtype=torch.long), torch.arange(7), torch.arange(5))).unsqueeze(0)
    logits = model(packed, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 3:10], model(ids[:1, :7]).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 10:], model(ids[1:, :5]).logits, atol=1e-5, rtol=1e-5)


def test_no_mask_equals_a_mask_of_ones(make_model, axes, ids):
    model = make_model(**axes)
    masked = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(masked, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing(make_model, axes, ids):
    model = make_model(**axes)
    padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), 1)
    mask = (torch.arange(17) < 12).long().expand(2, -1)
    logits = model(padded, attention_mask=mask).logits[:, :12]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def no_gap(monkeypatch):
    """Attend to rows of other lengths apart, however short they are."""
    monkeypatch.setattr(real_tokens_hfllm, "LEAST_GAP", 1)


def padded_batch(ids, side):
    """Rows of 5 and 12 tokens."""
    is_real = torch.arange(12) < torch.tensor([[5], [12]])
    mask = (is_real if side == "right" else is_real.flip(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}


def gradients_of(model, batch):
    """The logits of real tokens, or of rows, and the gradients of the weights."""
    model.zero_grad()
    hint = {"is_read": batch["attention_mask"] > 0} if isinstance(model, hfllm.HfllmForCausalLM) else {}
    logits = model.train()(**batch, **hint).logits
    logits = logits[batch["attention_mask"] > 0] if logits.dim() == 3 else logits
    logits.backward(torch.linspace(-1, 1, logits.numel()).view(logits.shape))
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", [hfllm.HfllmForCausalLM, hfllm.HfllmForSequenceClassification])
@pytest.mark.usefixtures("no_gap")
def test_padding_that_is_not_computed_changes_no_gradient(make_model, axes, ids, side, head, monkeypatch):
    model, batch = make_model(model_class=head, num_labels=1, **axes), padded_batch(ids, side)
    fast = gradients_of(model, batch)
    monkeypatch.setattr(hfllm.HfllmModel, "computes_by_token", False)
    # Sums in another order: AVX2's are 2e-5 apart.
    torch.testing.assert_close(fast, gradients_of(model, batch), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left", "alike"])
def test_products_in_half_precision_have_few_numbers_of_rows(make_model, monkeypatch, side):
    """The hint leaves out padding; a few tokens of it are computed still, as many as a kernel lacks."""
    model, generator, seen = make_model(max_position_embeddings=64), torch.Generator().manual_seed(0), set()
    lengths = torch.randint(10, 20, (24, 1), generator=generator)
    lengths[3], linear = 0, torch.nn.functional.linear
    mask = torch.arange(30) >= 30 - lengths
    # As prompts padded on the left, with answers padded on the right.
    mask = (mask if side == "left" else mask.flip(1)) & (torch.arange(30) < 28)
    is_read = mask & (torch.rand(mask.shape, generator=generator) < 0.4)
    ids = torch.randint(3, 30, mask.shape, generator=generator) * mask
    if side == "alike":
        # Pairs of rows begin by the same eight tokens.
        ids[1::2, :8] = ids[::2, :8] * mask[1::2, :8]

    def product(states, *args):
        seen.add(states[..., 0].numel())
        return linear(states, *args)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            trunk = model.train().model(ids, attention_mask=mask.long(), is_read=is_read, use_cache=False)
        states = trunk.last_hidden_state[is_read].float()
        states.backward(torch.linspace(-1, 1, states.numel()).view_as(states))
        return states.detach(), [each.grad.clone() for each in model.model.parameters() if each.grad is not None]

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    rounded = gradients()
    assert {count % 64 for count in seen} == {0} and len(seen) == 2
    seen.clear()
    monkeypatch.setattr(layers_hfllm, "ROWS", 1)
    torch.testing.assert_close(rounded, gradients(), atol=0.02, rtol=0.02)
    assert {int(mask.sum()), int(is_read.sum())} == seen or (side == "alike" and max(seen) < mask.sum() - 70)


@pytest.mark.usefixtures("no_gap")
def test_rows_of_like_length_attend_at_once(make_model, monkeypatch):
    lengths, seen = torch.tensor([[3], [0], [12], [10], [4], [11]]), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        seen.append((len(query), query.shape[2]))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    mask = (torch.arange(12) < lengths).long()
    make_model(num_hidden_layers=1).train()(mask, attention_mask=mask, is_read=mask > 0, use_cache=False)
    assert seen == [(3, 12), (2, 4), (1, 1)]


def test_padding_is_not_computed_unless_someone_looks(make_model, ids, monkeypatch):
    model, batch, seen, looks = make_model(), padded_batch(ids, "right"), [], []
    forward = layers_hfllm.HfllmMLP.forward

    def count(self, states):
        seen.append(states.shape[:2].numel())
        return forward(self, states)

    monkeypatch.setattr(layers_hfllm.HfllmMLP, "forward", count)
    # Without a hint all states are the caller's.
    model.train()(**batch)
    read = {"is_read": batch["attention_mask"] > 0}
    model(**batch, **read)
    model.model.training = False
    model(**batch, **read)
    model.model.training = True
    # The states that are read: of one token per row.
    model.model(**batch, is_read=torch.arange(12) == torch.tensor([[4], [11]]))
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: looks.append(out.shape))
    model(**batch, **read)
    handle.remove()
    states = model(**batch, **read, output_hidden_states=True).hidden_states
    assert seen == [24, 24, 17, 17, 24, 24, 17, 2, 24, 24, 24, 24]
    assert looks == [(2, 12, 32)] and states[1].shape == (2, 12, 32)


@pytest.mark.parametrize("in_padding", [False, True])
def test_a_loss_reads_the_states_of_its_targets_also_in_padding(make_model, ids, monkeypatch, in_padding):
    """Whoever forgets to ignore padding gets the loss of before, and of a chunked loss as of a whole one."""
    model, batch = make_model().train(), padded_batch(ids, "right")
    labels = ids if in_padding else ids.masked_fill(batch["attention_mask"] == 0, -100)
    losses = [model(**batch, labels=labels, loss_chunk_size=size).loss for size in (4, 0)]
    monkeypatch.setattr(hfllm.HfllmModel, "computes_by_token", False)
    losses.append(model(**batch, labels=labels, loss_chunk_size=4).loss)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_packed_rows_that_flash_attention_would_mix_are_refused(make_model, ids):
    model = make_model().model
    model.config._attn_implementation_internal = "flash_attention_2"
    positions = torch.cat((torch.arange(7), torch.arange(5))).unsqueeze(0)
    packed, embeds = packed_sequences(positions, None), model.embed_tokens(ids)
    masks = create_masks(model.config, embeds[:1], None, None, packed)
    assert masks == {"full_attention": None}  # the kernel splits one row by itself
    with pytest.raises(ValueError, match="one row without padding"):
        create_masks(model.config, embeds, None, None, packed.expand(2, -1))
    with pytest.raises(ValueError, match="one row without padding"):
        create_masks(model.config, embeds[:1], torch.tensor([[0] * 3 + [1] * 9]), None, packed)


def test_a_window_ends(make_model, ids):
    model = make_model(sliding_window=3, num_hidden_layers=1)
    changed = ids.clone()
    changed[:, 0] = 5
    before, after = model(ids).logits, model(changed).logits
    assert not torch.allclose(before[:, 2], after[:, 2])
    torch.testing.assert_close(before[:, 3:], after[:, 3:], atol=1e-6, rtol=1e-6)


def test_sliding_cache_equals_no_cache_far_beyond_the_window(make_model, ids):
    model = make_model(sliding_window=4)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with_cache = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), with_cache)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), with_cache)


def test_adapters_with_dropout_get_the_gradient_of_their_own_mask(make_model, ids, monkeypatch):
    from peft import LoraConfig, get_peft_model

    def gradients():
        adapter = LoraConfig(target_modules=["down_proj"], lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(make_model(), adapter).train()
        model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    saving = gradients()
    monkeypatch.setattr(layers_hfllm, "saves_memory", lambda: False)
    torch.testing.assert_close(saving, gradients())


@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_norm_has_first_and_second_derivatives(unit_offset):
    states = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layers_hfllm._RMSNorm.apply, (states, weight, 1e-5, unit_offset))
    assert torch.autograd.gradgradcheck(layers_hfllm._RMSNorm.apply, (states, weight, 1e-5, unit_offset))


def test_parallel_plans_name_what_is_there(make_config, axes):
    import re

    config = make_config(**axes)
    names = [name for name, _ in hfllm.HfllmModel(config).named_modules()]
    names += [name for name, _ in hfllm.HfllmModel(config).named_parameters()]
    for rule in {**config.base_model_tp_plan, **(config.base_model_ep_plan or {})}:
        assert any(re.fullmatch(rule.replace(".", r"\.").replace("*", r"\d+"), name) for name in names), rule
    assert (config.base_model_pp_plan is None) == (config.position_embedding_type == "learned")


def test_bf16_is_close_to_fp32(make_model, axes, ids):
    model = make_model(**axes)
    exact = model(ids).logits
    rounded = model.to(torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


# Each part of a layer in one of them.
@pytest.mark.slow
@pytest.mark.turn(2)
@pytest.mark.parametrize("name", ["gpt1", "neox", "gemma", "cohere", "qwen3", "mixtral-parallel-window"])
def test_compiled_equals_eager(make_model, name, ids):
    model = make_model(num_hidden_layers=1, **FAMILIES[name])
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    # A static graph: the experts' sizes depend on the tokens only in the eager form.
    model.set_experts_implementation("batched_mm")
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_meta_model_has_the_parameters_that_the_config_counts(make_config, axes):
    config = make_config(**axes)
    with torch.device("meta"):
        model = hfllm.HfllmForCausalLM(config)
    assert model.num_parameters() == config.num_parameters()


def test_initial_scale_of_the_residual_projections(make_config):
    def scales(rule):
        model = hfllm.HfllmModel(make_config(residual_init=rule, hidden_size=256, num_hidden_layers=3))
        return [
            [layer.self_attn.o_proj.weight.std().item(), layer.mlp.down_proj.weight.std().item()]
            for layer in model.layers
        ]

    plain = torch.full((3, 2), 0.1)
    torch.testing.assert_close(torch.tensor(scales("plain")), plain, rtol=0.03, atol=0)
    torch.testing.assert_close(torch.tensor(scales("gpt2")), plain / 6**0.5, rtol=0.03, atol=0)
    by_depth = plain / torch.tensor([[2.0], [4.0], [6.0]]) ** 0.5
    torch.testing.assert_close(torch.tensor(scales("depth")), by_depth, rtol=0.03, atol=0)


class TestBidirectional:
    def test_every_token_sees_the_last(self, make_model, ids):
        model = make_model(model_class=hfllm.HfllmForMaskedLM, **BERT)
        changed = ids.clone()
        changed[:, -1] = 5
        assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0], atol=1e-4)

    def test_padding_and_packing_change_nothing(self, make_model, ids):
        model = make_model(model_class=hfllm.HfllmForMaskedLM, **BERT)
        alone = model(ids).logits
        padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), 1)
        mask = (torch.arange(17) < 12).long().expand(2, -1)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :12], alone, atol=1e-5, rtol=1e-5)
        packed = ids.reshape(1, -1)
        positions = torch.arange(12).repeat(2).unsqueeze(0)
        logits = model(packed, position_ids=positions).logits.reshape(alone.shape)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_masked_tokens_are_learned(self, make_model, ids):
        model = make_model(model_class=hfllm.HfllmForMaskedLM, **BERT).train()
        hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        inputs, labels = ids.masked_fill(hidden, 4), ids.masked_fill(~hidden, -100)
        output = model(inputs, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[hidden], ids[hidden])
        torch.testing.assert_close(output.loss, expected)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
        assert loss < 0.1

    def test_the_head_decides_the_direction(self, make_config):
        with pytest.raises(ValueError, match="is_causal=True"):
            hfllm.HfllmForCausalLM(make_config(**BERT))
        with pytest.raises(ValueError, match="is_causal=False"):
            hfllm.HfllmForMaskedLM(make_config())


def test_token_classification_takes_a_step(make_model, axes, ids):
    model = make_model(model_class=hfllm.HfllmForTokenClassification, num_labels=3, **axes)
    output = model(ids, labels=ids % 3)
    assert output.logits.shape == (2, 12, 3)
    expected = torch.nn.functional.cross_entropy(output.logits.reshape(-1, 3), (ids % 3).reshape(-1))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class TestLearnedPositionsEnd:
    GREEDY = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}

    @pytest.fixture
    def model(self, make_model):
        return make_model(position_embedding_type="learned", max_position_embeddings=24)

    def test_in_a_call(self, model, ids):
        longer = ids.repeat(1, 3)
        for more in ({}, {"use_cache": False}, {"position_ids": torch.arange(36)[None]}):
            with pytest.raises(ValueError, match=r"position 35 .* 0 to 23 \(max_position_embeddings=24\)"):
                model(longer, **more)
        with pytest.raises(ValueError, match="position -1 "):
            model(ids, position_ids=torch.arange(12)[None] - 1)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"num_beams": 3},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "num_beams": 3},
            {"prompt_lookup_num_tokens": 3},
        ],
        ids=str,
    )
    def test_in_generation(self, model, ids, settings):
        with pytest.raises(ValueError, match=r"0 to 23 \(max_position_embeddings=24\)"):
            model.generate(ids[:1], **self.GREEDY, **settings)

    def test_with_a_draft(self, model, ids, make_model):
        draft = make_model(seed=1, num_hidden_layers=1)
        with pytest.raises(ValueError, match=r"0 to 23 \(max_position_embeddings=24\)"):
            model.generate(ids[:1], assistant_model=draft, **self.GREEDY)

    def test_padding_takes_no_positions(self, model, ids):
        padded = torch.cat((torch.zeros(2, 8, dtype=torch.long), ids), 1)
        mask = (torch.arange(20) >= 8).long().expand(2, -1)
        settings = {**self.GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
        answers = model.generate(padded, attention_mask=mask, **settings)
        assert torch.equal(answers[:, 20:], model.generate(ids, **settings)[:, 12:])

    def test_positions_are_not_looked_at_before_the_table_could_end(self, model, ids, monkeypatch):
        looked = []
        monkeypatch.setattr(modeling_hfllm, "check_positions", lambda *_: looked.append(1))
        model.generate(ids, **{**self.GREEDY, "max_new_tokens": 12, "min_new_tokens": 12})
        assert not looked


def test_trainer_finds_one_column_of_labels():
    from transformers.utils import find_labels

    assert find_labels(hfllm.HfllmForCausalLM) == ["labels"]

"""Every mix of layers gives one result, in whatever form its tokens come."""

from itertools import pairwise

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache, StaticCache, Trainer, TrainerCallback, TrainingArguments

from hfllm.models.family import attention_masks_hfllm

LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
CHUNKED = "chunked_attention"
BY_TYPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
}
OLMO = {"norm_placement": "output", "qk_norm": True, "qk_norm_scope": "all_heads"}
SPARSE = {"sparse_block_size": 4, "sparse_num_blocks": 3}
# `layer_types` in short, the window, and the other axes of each mix.
MIXES = {
    "full": ("ff", None, {}),
    "window": ("ss", 5, {}),
    "window-of-one": ("sf", 1, {}),
    "lllf": ("lllf", None, OLMO),
    "sssf": ("sssf", 6, {}),
    "slf-some-without-positions": ("slf", 5, {"no_rope_layers": [1, 1, 0]}),
    "slf-nowhere-positions": ("slf", 5, {"position_embedding_type": "none"}),
    "slf-learned-positions": ("slf", 5, {"position_embedding_type": "learned"}),
    "slf-rope-by-type": ("slf", 5, {"rope_parameters": BY_TYPE}),
    "sf-gemma": ("sf", 5, {**FAMILIES["gemma3"], "rope_parameters": BY_TYPE}),
    "slf-experts": ("slf", 5, {"num_local_experts": 4, "intermediate_size": 48}),
    "sparse": ("ff", None, SPARSE),
    "chunks": ("cc", 5, {}),
    "chunks-of-one": ("cf", 1, {}),
    "clf-some-without-positions": ("clf", 6, {"no_rope_layers": [1, 1, 0]}),
    "cf-sparse": ("cf", 5, SPARSE),
    "slf-sparse": ("slf", 5, {**SPARSE, "no_rope_layers": [1, 1, 0]}),
}
NAMES = {"l": LINEAR, "c": CHUNKED, "s": SLIDING, "f": FULL}
LENGTH = 75
CUTS = {"pieces": [0, 1, 8, 43, 44, LENGTH], "tokens": [*range(9), *range(62, LENGTH + 1)]}
# What takes longer is asked of these.
FEWER = pytest.mark.parametrize(
    "mix",
    ["window-of-one", "lllf", "sssf", "slf-rope-by-type", "slf-sparse", "clf-some-without-positions"],
    indirect=True,
)


# Alike to others in all but one thing.
RARE = {"slf-nowhere-positions", "slf-learned-positions", "chunks-of-one", "cf-sparse", "slf-some-without-positions"}


@pytest.fixture(params=[pytest.param(each, marks=[pytest.mark.slow] if each in RARE else []) for each in MIXES])
def mix(request, make_model, monkeypatch):
    """A model, with blocks of 4 queries, so that short texts are in banded form; and how exact it is."""
    monkeypatch.setattr(attention_masks_hfllm, "SMALLEST_BLOCK", 4)
    kinds, window, axes = MIXES[request.param]
    names = {"num_hidden_layers": len(kinds), "layer_types": [NAMES[kind] for kind in kinds]}
    field = "attention_chunk_size" if "c" in kinds else "sliding_window"
    model = make_model(**{**axes, **names, field: window})
    if "sparse" in request.param:
        model.set_attn_implementation("sparse")
    atol = 5e-5 if "l" in kinds else 1e-5
    return model, {"atol": atol, "rtol": 0}


@pytest.fixture
def ids():
    return torch.randint(10, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def padded(ids, *lengths):
    """Rows with their last tokens alone, behind padding, and what `generate` would say of them."""
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def total_loss(logits, ids):
    """Of each token after the first of its row, so that the losses of parts can be added."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_pieces_with_a_cache_equal_the_whole(mix, ids, cuts, cache_class):
    model, close = mix
    more = {"max_cache_len": LENGTH + 3} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **more)
    with torch.no_grad():
        parts = [model(ids[:, begin:end], cache=cache, use_cache=True).logits for begin, end in pairwise(CUTS[cuts])]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, **close)


@pytest.mark.slow
def test_padding_changes_nothing(mix, ids):
    model, close = mix
    given = padded(ids, LENGTH, 41)
    logits = model(ids, use_cache=False, **given).logits
    alone = [model(ids[:1], use_cache=False).logits, model(ids[1:, -41:], use_cache=False).logits]
    torch.testing.assert_close(logits[:1], alone[0], **close)
    torch.testing.assert_close(logits[1:, -41:], alone[1], **close)
    loss = total_loss(logits[:1], ids[:1]) + total_loss(logits[1:, -41:], ids[1:, -41:])
    expected = gradients(model, total_loss(alone[0], ids[:1]) + total_loss(alone[1], ids[1:, -41:]))
    compare(gradients(model, loss), expected, close)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = []
        # Also token by token, before the first token that is none of padding and behind it.
        for begin, end in pairwise([0, 1, 2, 32, 33, 34, 35, 60, LENGTH]):
            more = {
                "attention_mask": given["attention_mask"][:, :end],
                "position_ids": given["position_ids"][:, begin:end],
            }
            parts.append(model(ids[:, begin:end], cache=cache, use_cache=True, **more).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[1, -41:], logits[1, -41:], **close)


def compare(got, expected, close):
    """Gradients are compared at their own scale, that of the largest one of a tensor."""
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        scale = max(1, grad.abs().max())
        torch.testing.assert_close(got[name] / scale, grad / scale, **close, msg=lambda text, name=name: name + text)


def test_packed_rows_equal_separate_ones(mix, ids):
    model, close = mix
    row, lengths = ids[:1], (38, 2, LENGTH - 40)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = [model(part, use_cache=False).logits for part in row.split(lengths, 1)]
    expected = gradients(model, sum(map(total_loss, alone, row.split(lengths, 1))))
    begins = {"cu_seq_lens_q": torch.tensor([0, 38, 40, LENGTH], dtype=torch.int32)}
    for more in ({}, {"attention_mask": torch.ones_like(row)}, {**begins, "position_ids": None}):
        logits = model(row, use_cache=False, **{"position_ids": positions, **more}).logits
        torch.testing.assert_close(logits, torch.cat(alone, 1), **close)
        parts = logits.split(lengths, 1)
        compare(gradients(model, sum(map(total_loss, parts, row.split(lengths, 1)))), expected, close)


def test_checkpointing_changes_no_gradient(mix, ids):
    model = mix[0].train()
    expected = gradients(model, model(ids, labels=ids, use_cache=False).loss)
    model.activation_checkpointing_enable()
    compare(gradients(model, model(ids, labels=ids, use_cache=False).loss), expected, {"atol": 1e-6, "rtol": 0})


@pytest.mark.slow
@FEWER
def test_generation_in_every_way(mix, ids):
    model, _ = mix
    given = {"attention_mask": padded(ids, LENGTH, 41)["attention_mask"], "pad_token_id": 0}
    given |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **given)
    for way in ({}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 20}):
        assert torch.equal(model.generate(ids, **given, **way), expected), way
    several = {"num_beams": 3, "num_return_sequences": 2}
    beams = model.generate(ids, **given, **several)
    assert beams.shape == (4, LENGTH + 6)
    assert torch.equal(beams, model.generate(ids, **given, **several, use_cache=False))


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.slow
def test_a_run_that_is_cut_off_resumes_to_the_same_bits(make_model, ids, tmp_path):
    def train(folder, callbacks=(), **more):
        model = make_model(layer_types=[LINEAR, SLIDING, FULL], num_hidden_layers=3, sliding_window=5)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "report_to": "none"}
        arguments = TrainingArguments(folder, per_device_train_batch_size=1, disable_tqdm=True, **settings)
        rows = [{"input_ids": row, "labels": row} for row in ids.repeat(3, 1)]
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train(**more)
        return model.state_dict()

    whole, cut = train(tmp_path / "whole"), train(tmp_path / "begun", callbacks=[Stop()])
    resumed = train(tmp_path / "begun", resume_from_checkpoint=True)
    assert not torch.equal(cut["lm_head.weight"], whole["lm_head.weight"])
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.slow
@pytest.mark.turn(2)
@pytest.mark.parametrize("mix", ["sssf", "slf-rope-by-type", "clf-some-without-positions"], indirect=True)
def test_compiled_equals_plain(mix, ids):
    model, close = mix
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, labels=ids, use_cache=False)
    grads = gradients(model, expected.loss)
    output = compiled(ids, labels=ids, use_cache=False)
    torch.testing.assert_close(output.logits, expected.logits, **close)
    compare(gradients(model, output.loss), grads, close)
    cache, parts = StaticCache(model.config, max_cache_len=LENGTH + 3), []
    with torch.no_grad():
        for begin, end in pairwise([0, 60, 61, 62]):
            positions = torch.arange(begin, end)[None]
            parts.append(compiled(ids[:, begin:end], position_ids=positions, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected.logits[:, :62], **close)

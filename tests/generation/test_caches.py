"""Caches hold what the formula says, say the same, and are refused where they cannot be had."""

import pytest
import torch

from hfllm.errors import InputError
from hfllm.generation.caches import KINDS, bytes_per_token, cache_bytes, make_cache, measure_caches
from hfllm.scaling.shapes import Shape


@pytest.fixture
def batch(prompts):
    ids, mask = prompts(3, length=8)
    return {"input_ids": ids, "attention_mask": mask}


def by_kind(rows):
    return {row["cache"]: row for row in rows}


def test_memory_is_what_the_formula_says(make_target, batch):
    model = make_target(num_key_value_heads=2).float()
    rows = by_kind(measure_caches(model, batch, max_new_tokens=9, rounds=1))
    assert set(rows) == set(KINDS)
    # 2 tensors, 4 layers, 2 heads of 8 numbers of 4 bytes.
    expected = 2 * 4 * 2 * 8 * 4
    assert bytes_per_token(model.config, torch.float32) == expected
    assert rows["dynamic"]["bytes_per_token"] == rows["dynamic"]["predicted_bytes_per_token"] == expected
    # The static cache has a place for the last token too, which is never read.
    assert rows["static"]["bytes_per_token"] == pytest.approx(expected * 17 / 16)
    # One byte a number, and the scales.
    assert expected / 4 <= rows["fp8"]["bytes_per_token"] < expected / 3
    assert rows["static"]["same_tokens"] == rows["dynamic"]["same_tokens"] == 1
    assert rows["dynamic"]["tokens_per_second"] > 0
    assert "has no sliding_window" in rows["sliding"]["note"]
    assert "on the CPU already" in rows["offloaded"]["note"]


@pytest.mark.parametrize("axes", [{}, {"num_key_value_heads": 1}, {"head_dim": 16}, {"num_hidden_layers": 2}])
def test_the_planner_says_the_same(axes, make_target):
    config = make_target(**axes).config
    shape = Shape.from_config(config.to_dict())
    assert shape.kv_bytes_per_token(bytes_per_value=2) == bytes_per_token(config, torch.bfloat16)


@pytest.mark.slow
def test_a_sliding_cache_stops_growing(make_target, batch):
    model = make_target(sliding_window=5).float()
    rows = by_kind(measure_caches(model, batch, max_new_tokens=20, kinds=["sliding"], rounds=1))
    assert rows["sliding"]["same_tokens"] == 1
    cache = make_cache(model, "sliding", 40)
    model.generate(**batch, cache=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    states = cache.layers[0].keys
    assert states.shape[-2] == 4
    rows = by_kind(measure_caches(model, batch, max_new_tokens=2, rounds=1))
    assert "quantizes no layer with a sliding_window" in rows["fp8"]["note"]
    assert cache_bytes(cache) >= 4 * bytes_per_token(model.config, torch.float32) * 3


def test_what_cannot_be_had_is_refused(make_target, monkeypatch):
    from hfllm.generation import caches

    with pytest.raises(InputError, match="cache 'round' is not one of dynamic, static"):
        make_cache(make_target(), "round", 8)
    monkeypatch.setattr(caches, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(InputError, match="pip install optimum-quanto, or use 'fp8'"):
        make_cache(make_target(), "int4", 8)

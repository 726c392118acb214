"""What is measured: agreement that can fail, costs that add up, rows that are consistent."""

import pytest
import torch

from hfllm.generation.speculative import acceptance, measure
from hfllm.generation.speculative.acceptance import speedup
from hfllm.generation.speculative.drafts import EarlyExitDraft, ModelDraft
from hfllm.generation.speculative.measure import (
    Costs,
    best_num_draft_tokens,
    identical_share,
    interleaved,
    measure_costs,
    speculative,
    speed_by_num_draft_tokens,
)

OPTIONS = {"max_new_tokens": 12, "eos_token_id": 3, "pad_token_id": 0}


@pytest.fixture
def batches(prompts):
    return [dict(zip(("input_ids", "attention_mask"), prompts(3, seed=seed), strict=True)) for seed in range(2)]


@pytest.mark.slow
def test_agreement_is_complete_and_notices_a_wrong_rule(make_target, blurred, batches, monkeypatch):
    target = make_target()
    draft = ModelDraft(blurred(target))
    assert identical_share(target, draft, batches, num_draft_tokens=3, **OPTIONS) == 1
    rule = acceptance.leading
    monkeypatch.setattr(acceptance, "leading", lambda passes, counts: rule(torch.ones_like(passes), counts))
    assert identical_share(target, draft, batches, num_draft_tokens=3, **OPTIONS) < 1


def test_costs_are_ratios_to_one_run_of_the_target(make_target, batches, monkeypatch):
    counted = {}

    def interleaved(runs, rounds, clock):
        for name, run in runs.items():
            run()
            counted[name] = counted.get(name, 0) + 1
        return {"one": [2.0, 9.0, 1.0], "several": [3.0] * rounds, "draft": [4.0] * rounds}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    costs = measure_costs(make_target(), EarlyExitDraft(2), batches[0], num_draft_tokens=4, rounds=3)
    assert counted == {"one": 1, "several": 1, "draft": 1}
    # Four drafted tokens take 4 where the target takes 2 for one, and a run over five takes half as long again.
    assert costs == Costs(target_seconds=2.0, draft=0.5, verification=0.125)
    assert costs.per_draft == 0.625


@pytest.mark.slow
def test_rows_hold_the_formula_and_the_statistics(make_target, blurred, batches):
    target, costs = make_target(), Costs(0.01, 0.2, 0.05)
    draft = ModelDraft(blurred(target))
    seconds, rows = speed_by_num_draft_tokens(target, draft, batches, {"2": 2, "4": 4}, costs, rounds=1, **OPTIONS)
    assert seconds > 0
    for row, steps in zip(rows, (2, 4), strict=True):
        seen = speculative(target, draft, batches, do_sample=False, num_draft_tokens=steps, **OPTIONS)[1]
        assert row["acceptance_rate"] == seen.acceptance_rate == seen.accepted / seen.tested
        assert row["tokens_per_target_call"] == seen.tokens / seen.target_calls
        assert 0 < row["drafted"] <= steps
        assert row["predicted"] == speedup(row["acceptance_rate"], row["drafted"], 0.2)
        assert row["predicted_with_verification"] < row["predicted"]


def test_the_best_draft_length_counts_verification():
    costs = Costs(0.01, 0.3, 0.3)
    assert best_num_draft_tokens(0.5, costs) == 0
    assert best_num_draft_tokens(0.9, costs) > 0


def test_runs_take_turns():
    order, ticks = [], iter(range(100))
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(runs, rounds=2, clock=lambda: next(ticks))
    assert "".join(order) == "abc" + "cba" + "abc"
    assert seconds == {name: [1, 1] for name in "abc"}

"""benchmarks/canaries.py: one organisation's canaries show in what all trained, and in nothing else."""

import sys
from pathlib import Path

import pytest
import torch

from hfllm.federation.privacy import measure_leak


@pytest.fixture
def canaries(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "canaries", raising=False)
    import canaries

    yield canaries
    sys.modules.pop("canaries", None)


def test_texts_and_their_losses(canaries):
    rows = canaries.encode(["the code is ab", "the code is cd"])
    assert rows.shape == (2, canaries.LENGTH) and rows[0, :14].tolist() == [ord(c) - 32 for c in "the code is ab"]

    def model(input_ids, use_cache):
        # Sure of a space, so that only the characters that are counted cost 10 each.
        logits = torch.zeros(*input_ids.shape, 96)
        logits[..., 0] = 10.0
        return type("Output", (), {"logits": logits})

    each = canaries.losses(model, rows, len(canaries.PREFIX))
    assert each.tolist() == pytest.approx([20.0, 20.0], abs=0.02)


@pytest.mark.slow
@pytest.mark.turn(6)
def test_canaries_show_without_noise_and_drown_in_it(canaries):
    setting = canaries.Setting(11)
    arms = [canaries.Arm("open", noise_multiplier=None), canaries.Arm("noisy", noise_multiplier=1.0)]
    before, open_, noisy = (setting.measured(each) for each in (setting.before, *map(setting.federate, arms)))
    aurocs = [measure_leak(inside, outside).auroc for inside, outside, _ in (before, open_, noisy)]
    assert aurocs[0].low < 0.5 < aurocs[0].high and aurocs[1].low > 0.6 and aurocs[2].low < 0.5 < aurocs[2].high
    # What was learned is worth something, and what the noise left is not.
    assert open_[2] < before[2] < noisy[2]

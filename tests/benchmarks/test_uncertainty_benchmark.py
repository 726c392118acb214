"""benchmarks/uncertainty.py runs on small models, also where they know nothing."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import uncertainty

    yield uncertainty
    monkeypatch.delitem(sys.modules, "uncertainty")


@pytest.mark.slow
def test_it_measures_models_before_and_after(benchmark, make_model, tokenizer, tmp_path, capsys):
    import hfllm

    head = hfllm.HfllmForSequenceClassification
    for name, model in (
        (".", make_model()),
        ("sft", make_model(seed=1)),
        ("reward", make_model(seed=2, model_class=head, num_labels=1)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sizes = ["--num_eval_prompts", "120", "--num_samples", "2", "--max_new_tokens", "3"]
    benchmark.main(["--rlhf", str(tmp_path), "--output_dir", str(tmp_path / "out"), *sizes])
    found = json.loads((tmp_path / "out" / "uncertainty.json").read_text())
    assert found["sft"]["wrong"] == found["ppo"]["wrong"] == 1.0
    # All answers are wrong, so that next to none may be given.
    for side in ("sft", "ppo"):
        assert found[side]["sequence_probability control_risk 0.05 risk"] <= 0.05
        assert found[side]["first_supported_right"] == 0.0
    assert (tmp_path / "out" / "ppo.png").stat().st_size > 1000
    assert "| semantic_entropy " in capsys.readouterr().out

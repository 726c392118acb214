"""Two processes with half of every projection each compute what one computes with the whole."""

from pathlib import Path

import pytest
from families import FAMILIES

SCRIPT = Path(__file__).parent / "tensor_parallel_run.py"


@pytest.mark.slow
def test_half_of_each_projection_on_each_process(processes, make_model, tmp_path):
    names = ("llama", "gpt2", "palm", "qwen3", "mixtral", "glm4-moe")
    for name in names:
        # One key-value head for each process, but PaLM, which has a single one, splits its MLP alone.
        make_model(**{"num_key_value_heads": 2, **FAMILIES[name]}).save_pretrained(tmp_path / name)
    printed = processes.torchrun(SCRIPT, *(tmp_path / name for name in names))
    lines = [line.split() for line in printed.splitlines() if line.startswith("RESULT")]
    assert len(lines) == len(names)
    for name, (_, share, difference) in zip(names, lines, strict=True):
        assert float(share) == (1.0 if name == "palm" else 0.5), name
        assert float(difference) < 1e-5, name

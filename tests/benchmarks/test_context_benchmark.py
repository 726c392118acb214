"""benchmarks/context.py: what it compares has the same weights, and its kinds are what they are called."""

import sys
from pathlib import Path

import pytest
import torch

from hfllm.models import banded_hfllm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def context(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "context", raising=False)
    import context

    yield context
    monkeypatch.delitem(sys.modules, "context")


def test_the_kinds(context, monkeypatch):
    monkeypatch.setattr(banded_hfllm, "SMALLEST_BLOCK", 4)
    ids = torch.arange(128)[None]
    logits, masks = {}, []
    plain = banded_hfllm.is_banded
    monkeypatch.setattr(banded_hfllm, "is_banded", lambda mask, key: (masks.append(plain(mask, key)), masks[-1])[1])
    for kind in context.KINDS:
        masks.clear()
        logits[kind] = context.build(kind, 128, window=8, hidden=32, layers=1)(ids, use_cache=False).logits
        assert any(masks) == (kind == "banded")
    torch.testing.assert_close(logits["banded"], logits["masked"], atol=1e-5, rtol=1e-5)
    for kind in ("masked", "sparse"):
        assert (logits[kind] - logits["full"]).abs().max() > 1e-4
    # The first block has nothing to leave out.
    torch.testing.assert_close(logits["sparse"][:, :16], logits["full"][:, :16], atol=1e-5, rtol=1e-5)


def test_the_table(context, monkeypatch, tmp_path):
    flags = [
        "--lengths",
        "32",
        "64",
        "--longest_masked",
        "32",
        "--window",
        "8",
        "--layers",
        "1",
        "--hidden_size",
        "32",
    ]
    output = tmp_path / "results.md"
    monkeypatch.setattr(
        sys, "argv", ["context.py", *flags, "--rounds", "1", "--new_tokens", "2", "--output", str(output)]
    )
    context.main()
    rows = [line.strip("| ").split(" | ") for line in output.read_text().splitlines()[4:]]
    assert [row[:2] for row in rows[:4]] == [["32", kind] for kind in context.KINDS]
    assert [row[1] for row in rows[4:]] == ["full", "banded", "sparse"]
    # Keys and values of one layer and 32 numbers: 32 tokens, or those of the window before the next one.
    assert [float(row[7]) for row in rows[:2]] == [
        pytest.approx(tokens * 2 * 32 * 4 / 1e6, abs=5e-3) for tokens in (32, 7)
    ]
    assert [row[3] for row in rows if row[1] == "full"] == ["1.00", "1.00"] and rows[4][4] == "-"

"""benchmarks/context.py: what it compares has the same weights, and its kinds are what they are called."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hfllm.models.family import attention_masks_hfllm

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def context(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "context", raising=False)
    import context

    yield context
    monkeypatch.delitem(sys.modules, "context")
    # What the benchmark registers is listed in messages that other tests read.
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("masked", None)


@pytest.mark.slow
def test_the_kinds(context, monkeypatch):
    monkeypatch.setattr(attention_masks_hfllm, "SMALLEST_BLOCK", 4)
    ids = torch.arange(128)[None]
    logits, masks = {}, []
    plain = attention_masks_hfllm.is_banded
    monkeypatch.setattr(
        attention_masks_hfllm, "is_banded", lambda mask, key: (masks.append(plain(mask, key)), masks[-1])[1]
    )
    for kind in context.KINDS:
        masks.clear()
        logits[kind] = context.build(kind, 128, window=8, hidden=32)(ids, use_cache=False).logits
        assert any(masks) == (kind in ("banded", "sssf"))
    for one, other in (("banded", "masked"), ("native", "lllf")):
        torch.testing.assert_close(logits[one], logits[other], atol=1e-5, rtol=1e-5)
    for kind in ("masked", "sparse", "sssf", "lllf"):
        assert (logits[kind] - logits["full"]).abs().max() > 1e-4
    # The first block has nothing to leave out.
    torch.testing.assert_close(logits["sparse"][:, :16], logits["full"][:, :16], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_tables(context, monkeypatch, tmp_path):
    flags = "--lengths 32 64 --longest_masked 32 --window 8 --hidden_size 32 --rounds 1 --long_rounds 1 --new_tokens 2"
    output = tmp_path / "results.md"
    flags = [*flags.split(), "--kinds", "full", "masked", "banded", "sparse", "lllf", "--memory_length", "128"]
    monkeypatch.setattr(sys, "argv", ["context.py", *flags, "--output", str(output)])
    context.main()
    rows = [line.strip("| ").split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] in ("32", "64", "full", "linear", "linear, native")]
    models, rules, memory = rows[:9], rows[9:13], rows[13:]
    assert [row[1] for row in models] == [
        "full",
        "masked",
        "banded",
        "sparse",
        "lllf",
        "full",
        "banded",
        "sparse",
        "lllf",
    ]
    # Keys and values of four layers and 32 numbers: of 34 tokens, or those of the window before the next one.
    for row, tokens in ((models[0], 34), (models[1], 7)):
        assert float(row[8]) == pytest.approx(4 * tokens * 2 * 32 * 4 / 1e6, abs=6e-3)
    assert [row[3] for row in models if row[1] == "full"] == ["1.00", "1.00"] and models[6][4] == models[4][5] == "-"
    assert [row[:2] for row in rules[::2]] == [[length, "4 of 24 and 48"] for length in ("32", "64")]
    assert [row[0] for row in memory] == ["full", "linear", "linear, native"] and memory[0][2] == "1.00"
    assert float(memory[1][1]) < float(memory[2][1])

"""benchmarks/context_quality.py and context_texts.py: what is asked has one answer, and every table has its arms."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

from hfllm.models.extension import ROPE_TYPES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    loaded = []

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)


def test_each_question_is_answered_by_one_pair_of_its_text(module):
    quality = module("context_quality")
    ids, values = quality.rows(64, 20, torch.Generator().manual_seed(0))
    assert ids.shape == (20, 64) and ids.max() < quality.VOCABULARY
    asked = quality.PAIRS + 1
    for row, answers in zip(ids.tolist(), values.tolist(), strict=True):
        held = dict(divmod(token - quality.HELD, quality.NUM_VALUES) for token in row if token >= quality.HELD)
        assert len(held) == asked and 0 in held
        assert all(token >= quality.FILLER for token in row[:-asked])
        assert [held[token - quality.KEYS] for token in row[-asked:]] == answers


@pytest.mark.slow
def test_every_mix_learns_and_has_a_row(module, monkeypatch):
    quality = module("context_quality")
    monkeypatch.setattr(quality, "STAGES", (quality.Stage(48, 192, 0.5), quality.Stage(256, 256, 0.5)))
    found = {}
    for name, mix in quality.MIXES.items():
        model, steps = quality.fit(mix, 1, 0.1)
        assert steps > 0 and (model.config._attn_implementation == "sparse") == (name == "sparse")
        found[name] = {1: (steps, *quality.right(model, 64, 8, 1))}
    lines = quality.table(found, 0.1)
    assert [line.split("|")[1].strip() for line in lines[4:]] == list(quality.MIXES)
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:])


@pytest.mark.slow
@pytest.mark.parametrize(("what", "rows"), [("extension", 13), ("streams", 3), ("memory", 4)])
def test_every_table_has_its_arms(module, tmp_path, monkeypatch, what, rows):
    texts = module("context_texts")
    monkeypatch.setattr(texts, "ORIGINAL", 32)
    (tmp_path / "book.txt").write_text("The fox lives in the forest and eats fish. " * 2000)
    args = argparse.Namespace(base_seconds=0.2, seconds=0.1, rows=2, seed=0, extensions=ROPE_TYPES)
    lines = getattr(texts, what)(args, *texts.texts_of(tmp_path / "book.txt"))
    assert len(lines) == 4 + rows and all(line.count("|") == lines[2].count("|") for line in lines[2:])

"""recipes/tokenizer.py: a tokenizer on its own, what its size buys, and pretraining with it."""

import json
import random

import pytest
import tokenizer as recipe
from transformers import AutoTokenizer

from hfllm.data.sources import PYDOC, iterate_source
from hfllm.data.tokenizer import train_tokenizer, truncated_tokenizer
from hfllm.errors import InputError
from hfllm.stages.pretrain import tokenizer as tokenizer_stage


@pytest.fixture
def corpus(tmp_path, world):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in world.documents(400, seed=3)))
    return file


def run(*flags):
    return recipe.main(*recipe.parse([str(flag) for flag in flags]))


def test_it_trains_measures_and_saves(corpus, tmp_path, capsys):
    flags = ["--dataset_name", corpus, "--vocab_size", 700, "--objective", "masked", "--output_dir", tmp_path / "out"]
    metrics = run(*flags)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(saved) == metrics["vocab_size"] <= 700 and saved.mask_token == "<|mask|>"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Held-out text by size" in report and (tmp_path / "out" / "compression.png").is_file()
    assert not (tmp_path / "out" / "prepared").exists()
    capsys.readouterr()
    assert run(*flags) == metrics and "already done" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a finished run with vocab_size=700"):
        run(*flags, "--vocab_size", 600)


def test_the_weights_of_a_mixture_decide_what_it_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_stage, "MOST_TOKENIZER_TEXTS", 200)
    words = {"a": "owl river house", "b": "zygote quixotic jazz"}
    for name, text in words.items():
        rng, file = random.Random(name), tmp_path / f"{name}.jsonl"
        rows = (" ".join(rng.choices(text.split(), k=20)) + f" {rng.random()}" for _ in range(300))
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    known = {}
    for weights in ("1 1", "100 1"):
        entries = [f"{tmp_path / name}.jsonl:{weight}" for name, weight in zip("ab", weights.split(), strict=True)]
        run("--dataset_mixture", *entries, "--vocab_size", 300, "--output_dir", tmp_path / weights)
        known[weights] = AutoTokenizer.from_pretrained(tmp_path / weights).get_vocab().keys()
    assert known["1 1"] != known["100 1"]
    with pytest.raises(InputError, match="--dataset_name cannot be used here"):
        run("--dataset_mixture", *entries, "--dataset_name", "pydoc", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="--max_samples cannot be used here"):
        run("--max_samples", 10, "--output_dir", tmp_path / "out")


def test_larger_sizes_make_fewer_tokens(corpus, tmp_path):
    texts = [row["text"] for _, row in iterate_source(str(corpus))]
    rows = tokenizer_stage.compression_by_size(train_tokenizer(texts, 1400), texts)
    assert [row["vocab_size"] for row in rows] == sorted(row["vocab_size"] for row in rows) and len(rows) > 1
    assert rows[0]["bytes_per_token"] < rows[-1]["bytes_per_token"]
    tokens = sum(len(ids) for ids in train_tokenizer(texts, 1400)(texts, add_special_tokens=False)["input_ids"])
    assert rows[-1]["bytes_per_token"] == sum(len(text.encode()) for text in texts) / tokens


def test_a_truncated_tokenizer_is_the_one_trained_smaller(corpus):
    texts = [row["text"] for _, row in iterate_source(str(corpus))]
    large, small = train_tokenizer(texts, 500), train_tokenizer(texts, 400)
    cut = truncated_tokenizer(large, 400)
    assert cut.get_vocab() == small.get_vocab() and len(large) == 500
    assert cut(texts, add_special_tokens=False)["input_ids"] == small(texts, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_without_room_for_the_bytes_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="vocab_size=100 is too small"):
        run("--dataset_name", corpus, "--vocab_size", 100, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_the_documentation_of_this_python_is_a_dataset():
    row = next(row for name, row in iterate_source(PYDOC) if name == "argparse")
    assert "option" in row["text"]

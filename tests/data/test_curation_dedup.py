"""Duplicates: the signature estimates similarity, every group keeps exactly its first, across tasks too."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from hfllm.data.curation.duplicates import DuplicateSignature, minhash_config
from hfllm.data.curation.options import CurationOptions
from hfllm.data.curation.pipeline import SHARDS, curation_stages, read_statistics, run_stages
from hfllm.data.sources import load_source


def sentence(rng, words=60):
    return " ".join(f"word{rng.randrange(3000)}" for _ in range(words))


def changed(text, rng, share):
    words = text.split()
    for index in rng.sample(range(len(words)), round(share * len(words))):
        words[index] = f"new{rng.randrange(3000)}"
    return " ".join(words)


def shingles(text, n=5):
    words = text.split()
    return {tuple(words[index : index + n]) for index in range(len(words) - n + 1)}


def test_equal_hashes_estimate_the_jaccard_similarity(tmp_path):
    options = CurationOptions(minhash_buckets=100, minhash_hashes=4)
    step, rng, errors = DuplicateSignature(str(tmp_path), minhash_config(options)), random.Random(0), []
    for share in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        one = sentence(rng, 400)
        other = changed(one, rng, share)
        first, second = (np.array(step.get_signature(step.get_shingles(text))[:-1]) for text in (one, other))
        assert first.shape == (100, 4)
        jaccard = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
        errors.append((first == second).mean() - jaccard)
    # The standard deviation of an estimate from 400 hashes is at most 0.025.
    assert max(map(abs, errors)) < 0.08
    assert errors[0] == 0


def test_the_last_band_is_the_text_and_nothing_else(tmp_path):
    step = DuplicateSignature(str(tmp_path), minhash_config(CurationOptions()))

    def exact(text):
        return step.get_signature(step.get_shingles(text))[-1]

    assert exact("One two, three.") == exact("one TWO three")
    assert exact("one two three") != exact("three two one")
    assert len(step.get_shingles("...")) == 0  # no words, no signature


def curate(folder, files, filters=("exact_duplicates", "near_duplicates"), **options):
    """Kept texts in order, and drops by step."""
    (folder / "in").mkdir(parents=True)
    for name, texts in files.items():
        (folder / "in" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = CurationOptions(dataset_name=str(folder / "in"), filters=list(filters), **options)
    stages = curation_stages(options, folder / "work")
    run_stages(stages, folder / "work", 1, lambda line: None)
    drops = {
        step: int(totals["dropped"])
        for step, _, totals in read_statistics(stages, folder / "work")
        if "dropped" in totals
    }
    return [row["text"] for row in load_source(str(folder / "work" / SHARDS)).rows], drops


@pytest.mark.slow
def test_each_group_keeps_its_first(tmp_path):
    rng = random.Random(1)
    originals = [sentence(rng) for _ in range(20)]
    short = ["hello there", "ok"]
    near = [changed(text, rng, 0.02) for text in originals]
    different = [changed(text, rng, 0.5) for text in originals]
    texts = originals + short + originals[:7] + short + near + different + near[:3]
    kept, drops = curate(tmp_path / "one", {"a": texts})
    assert kept == originals + short + different
    assert drops == {"exact_duplicates": 7 + 2 + 3, "near_duplicates": 20}
    # The same over two files in two tasks: the copies are in the other one.
    files = {"a": originals + short, "b": texts[len(originals) + len(short) :]}
    two, drops_of_two = curate(tmp_path / "two", files, tasks=2)
    assert (two, drops_of_two) == (kept, drops)


def test_one_kind_alone(tmp_path):
    rng = random.Random(2)
    text = sentence(rng)
    near, other = changed(text, rng, 0.02), sentence(rng)
    texts = [text, near, text.upper(), other]
    assert curate(tmp_path / "exact", {"a": texts}, ["exact_duplicates"])[0] == [text, near, other]
    kept, drops = curate(tmp_path / "near", {"a": texts}, ["near_duplicates"])
    assert (kept, drops) == ([text, other], {"near_duplicates": 2})

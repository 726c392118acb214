"""Mixtures of datasets: what flags ask for, and texts in an order in which any first part is the mixture."""

import json
import random

import pytest
from datasets import Dataset

from hfllm.data.loading import TextArguments, by_weight, load_sources, mixture_of
from hfllm.data.packing import Prepared
from hfllm.errors import InputError


def loaded(arguments, seed, prepared):
    return load_sources(arguments.text_sources, arguments.mixture_weights, seed, prepared)


def texts(seed, count):
    rng = random.Random(seed)
    # Half of the sources have letters of two bytes.
    return [f"{seed} {number} " + "eé"[seed % 2] * rng.randint(1, 300) for number in range(count)]


def written(path, rows):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def test_names_and_weights_are_read_from_the_flag():
    def read(*entries):
        return mixture_of("alone", list(entries))

    assert read() == [("alone", None)]
    assert mixture_of("alone", None) == [("alone", None)]
    assert read("me/one:0.75", "world:2", "C:/texts:1e-3") == [("me/one", 0.75), ("world", 2.0), ("C:/texts", 0.001)]
    for entry in ("one", "one:", ":1", "one:nan", "one:-1", "one:0", "one:1:x", ""):
        with pytest.raises(
            InputError, match=f"^--dataset_mixture '{entry}': expected NAME:WEIGHT with a weight above 0"
        ):
            read("other:1", entry)
    with pytest.raises(InputError, match="--dataset_mixture one:1 other:1 one:2: a dataset comes twice"):
        read("one:1", "other:1", "one:2")


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 0.5), (0.01, 0.02, 0.005)])
def test_the_bytes_of_any_first_part_are_the_mixture(weights):
    sources = [Dataset.from_dict({"text": texts(seed, 80)}) for seed in range(3)]
    order = by_weight(sources, weights)
    assert sorted(order) == list(range(240))
    # Each source in its own order.
    assert sorted(order, key=lambda place: place // 80) == list(range(240))
    sizes = [len(text.encode()) for source in sources for text in source["text"]]
    taken, left = [0, 0, 0], [80, 80, 80]
    for place in order:
        taken[place // 80] += sizes[place]
        left[place // 80] -= 1
        if not all(left):
            break
        # For its weight none is further than another would be with one text more.
        progress = [count / weight for count, weight in zip(taken, weights, strict=True)]
        assert max(progress) <= min(each + max(sizes) / weight for each, weight in zip(progress, weights, strict=True))
    assert sum(taken) > 20 * max(sizes)


def test_a_source_that_is_used_up_leaves_the_rest_to_the_others():
    sources = [Dataset.from_dict({"text": ["a" * 10] * count}) for count in (2, 6)]
    assert by_weight(sources, [1, 1]) == [0, 2, 1, 3, 4, 5, 6, 7]


def test_a_single_dataset_is_all_there_is(tmp_path):
    name = written(tmp_path / "one.jsonl", texts(1, 60))
    sources, together, held_out = loaded(TextArguments(name), 0, Prepared(tmp_path / "it", {}))
    assert list(sources) == [name] and list(sources[name]["text"]) == list(together)
    assert len(held_out) == 3 and sorted([*together, *held_out]) == sorted(texts(1, 60))


def test_a_mixture_holds_out_of_each_dataset_what_none_trains_on(tmp_path):
    # Ten texts are in both, in other places: the same seed holds out the same places of each.
    files = {
        written(tmp_path / "one.jsonl", texts(1, 100)): texts(1, 100),
        written(tmp_path / "two.jsonl", texts(2, 90) + texts(1, 10)): texts(2, 90) + texts(1, 10),
    }
    for seed in range(5):
        arguments = TextArguments(dataset_mixture=[f"{name}:1" for name in files])
        sources, together, held_out = loaded(arguments, seed, Prepared(tmp_path / "it", {"seed": seed}))
        trained = set().union(*(source["text"] for source in sources.values()))
        assert set(together) == trained and not trained & set(held_out)
        missing = {name: set(rows) - set(sources[name]["text"]) for name, rows in files.items()}
        assert all(len(rows) == 5 for rows in missing.values())
        assert set(held_out) == set().union(*missing.values()) - trained


def test_a_mixture_of_the_same_texts_has_nothing_to_hold_out(tmp_path):
    one = written(tmp_path / "one.jsonl", texts(1, 21))
    two = written(tmp_path / "two.jsonl", texts(1, 21)[1:] + texts(1, 21)[:1])
    arguments = TextArguments(dataset_mixture=[f"{one}:1", f"{two}:1"])
    with pytest.raises(InputError, match="every held-out text of the mixture is a training text of another"):
        loaded(arguments, 0, Prepared(tmp_path / "it", {}))

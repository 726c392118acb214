"""Figures of labels, against hand-made cases and independent implementations."""

import numpy
import pytest

from hfllm.data.labelled import SPANS, TEXT, WORDS
from hfllm.evaluation.classification import (
    LogisticRegression,
    bag_of_words,
    bootstrap_error,
    entities,
    label_metrics,
    majority,
    most_frequent,
    span_metrics,
    tag_metrics,
)
from hfllm.generation.spans import exact_and_f1, normalized


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O O", set()),
        ("B-x I-x O", {(0, 1, "x")}),
        ("B-x B-x", {(0, 0, "x"), (1, 1, "x")}),
        ("I-x I-x", {(0, 1, "x")}),
        ("B-x I-y I-y", {(0, 0, "x"), (1, 2, "y")}),
        ("B-x I-x I-x B-y O I-y", {(0, 2, "x"), (3, 3, "y"), (5, 5, "y")}),
        ("S-x B-y E-y I-y", {(0, 0, "x"), (1, 2, "y"), (3, 3, "y")}),
        ("U-x B-x L-x", {(0, 0, "x"), (1, 2, "x")}),
        ("noun noun verb O", {(0, 1, "noun"), (2, 2, "verb")}),
        ("O B-new-york", {(1, 1, "new-york")}),
    ],
)
def test_entities_of_tags(tags, found):
    assert entities(tags.split()) == found


def test_entities_count_whole_or_not_at_all():
    """Of three gold entities one is found, one has a wrong end and one a wrong type; one is made up."""
    gold = [["B-x", "I-x", "O"], ["B-y", "O", "B-x"]]
    said = [["B-x", "O", "B-z"], ["B-y", "O", "B-y"]]
    found = tag_metrics(said, gold)
    # 1 right, 4 said, 3 in gold.
    assert found["entity_f1"] == pytest.approx(2 / 7)
    assert found["accuracy"] == pytest.approx(3 / 6)


def test_labels_by_hand():
    found = label_metrics(["a", "a", "b", "c"], ["a", "b", "b", "b"])
    assert found["accuracy"] == 0.5 and found["accuracy_n"] == 4
    # a: 2*1/(2+1); b: 2*1/(1+3); c: never right.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


@pytest.mark.slow
def test_macro_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = numpy.random.default_rng(0)
    gold, said = (rng.integers(0, 4, 200).astype(str).tolist() for _ in range(2))
    ours = label_metrics(said, gold)
    assert ours["macro_f1"] == pytest.approx(metrics.f1_score(gold, said, average="macro"))
    assert ours["accuracy"] == pytest.approx(metrics.accuracy_score(gold, said))


def test_the_error_is_that_of_a_share():
    right = (numpy.arange(400) % 4 == 0).astype(float)[:, None]
    error = bootstrap_error(right, lambda sums: sums[..., 0] / 400, count=4000)
    assert error == pytest.approx((0.25 * 0.75 / 400) ** 0.5, rel=0.06)
    assert bootstrap_error(right[:1], lambda sums: sums[..., 0]) is None
    assert bootstrap_error(numpy.full((9, 2), 0.1), lambda sums: sums[..., 0] / sums[..., 1] * 0.7) == 0


@pytest.mark.parametrize(
    ("said", "golds", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("a b", ["b", "c"], 1, 1),
        ("c", ["b", "c"], 1, 1),
        ("red hat", ["the red box", "blue"], 0, 0.5),
        ("x x y", ["x y y"], 0, 2 / 3),
        ("", [], 1, 1),
        ("red", [], 0, 0),
        ("", ["red"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_answers_are_scored_as_squad_does(said, golds, exact, f1):
    assert exact_and_f1(said, golds) == (exact, pytest.approx(f1))


def test_articles_and_marks_do_not_count():
    assert normalized("An  apple, a day -- the 'doctor'") == ["apple", "day", "doctor"]
    assert span_metrics([(1, 1), (0, 0.5)])["f1"] == 0.75


def test_the_regression_is_scikit_learns():
    linear, text = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.feature_extraction.text")
    rng = numpy.random.default_rng(1)
    rows = [[f"w{n}" for n in rng.integers(0, 30, 8)] for _ in range(120)]
    labels = ["yes" if "w1" in row or "w2" in row else "maybe" if "w3" in row else "no" for row in rows]
    ours = LogisticRegression().fit(rows, labels)
    counts = text.CountVectorizer(analyzer=lambda row: row)
    theirs = linear.LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(counts.fit_transform(rows), labels)
    expected = theirs.predict_log_proba(counts.transform(rows))
    assert ours.labels == list(theirs.classes_)
    assert numpy.abs(ours.log_probabilities(rows).numpy() - expected).max() < 2e-3


def test_controls_learn_from_the_rows():
    texts = [{"text": f"{word} {n}", "text_pair": None, "label": word} for n in range(9) for word in ("spam", "ham")]
    assert bag_of_words(TEXT, texts, texts) == [row["label"] for row in texts]
    assert majority(TEXT, texts[:3], texts[:2]) == ["spam", "spam"]
    tagged = [{"words": ["the", name, "eats"], "tags": ["O", "B-animal", "O"]} for name in ("fox", "owl", "bear") * 3]
    new = [{"words": ["the", "gnerf", "eats"], "tags": ["O", "B-animal", "O"]}]
    # Of a new word its neighbors tell the one control what it is, and the other knows nothing.
    assert bag_of_words(WORDS, tagged, new) == [["O", "B-animal", "O"]]
    assert majority(WORDS, tagged, new) == [["O", "O", "O"]]
    assert most_frequent("bbaa") == "a"


def test_the_control_of_spans_finds_what_is_marked():
    rows = [
        {
            "context": f"the {name} is {value} .",
            "question": f"what is the {name} ?",
            "texts": [value],
            "starts": [8 + len(name)],
        }
        for name in ("fox", "owl", "hen")
        for value in ("red", "blue")
    ]
    assert [row["context"][row["starts"][0] :][: len(row["texts"][0])] for row in rows] == [
        r["texts"][0] for r in rows
    ]
    assert bag_of_words(SPANS, rows, rows) == [row["texts"][0] for row in rows]
    assert majority(SPANS, rows, rows[:1]) == ["blue"]

"""Rows with labels and their tokens: every answer and every word is where the labels say."""

import numpy
import pytest

from hfllm.data.labelled import (
    SPANS,
    TASKS,
    TEXT,
    WORDS,
    encode_spans,
    encode_texts,
    encode_words,
    labels_of,
    reader_of,
)
from hfllm.data.packing import IGNORE
from hfllm.data.world.passages import held_out_names
from hfllm.data.world.tasks import labelled_rows
from hfllm.generation.spans import best_spans


def rows_of(world, task, count=80):
    return labelled_rows(world, task, count, 40, 0)


@pytest.mark.parametrize("task", TASKS)
def test_the_worlds_rows(world, task):
    train, held_out = rows_of(world, task)
    assert len(train) == 80 and len(held_out) == 40
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert (train, held_out) == rows_of(world, task)


def test_held_out_animals_are_in_no_training_row(world):
    train, held_out = rows_of(world, WORDS, 400)
    names = {word for row in held_out for word, tag in zip(row["words"], row["tags"], strict=True) if "animal" in tag}
    assert names <= set(held_out_names()) and not names & {word for row in train for word in row["words"]}


def test_answers_are_at_their_places(world):
    for row in [row for rows in rows_of(world, SPANS, 300) for row in rows]:
        for text, start in zip(row["texts"], row["starts"], strict=True):
            assert row["context"][start : start + len(text)] == text


def test_a_text_ends_with_the_end_token(world, tokenizer):
    train, _ = rows_of(world, TEXT)
    labels = labels_of(TEXT, train)
    encoded, cut = encode_texts(train, tokenizer, 12, labels)
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id and len(row["input_ids"]) <= 12 for row in encoded)
    assert cut and [labels[row["labels"]] for row in encoded] == [row["label"] for row in train]


@pytest.mark.parametrize("label_token", ["first", "last"])
def test_a_word_has_its_tag_on_one_token(world, tokenizer, label_token):
    train, _ = rows_of(world, WORDS)
    labels = labels_of(WORDS, train)
    encoded, places = encode_words(train, tokenizer, 200, labels, label_token)
    many = 0
    for row, tokens, place in zip(train, encoded, places, strict=True):
        assert [labels[tokens["labels"][where]] for where in place] == row["tags"]
        assert sum(label != IGNORE for label in tokens["labels"]) == len(row["words"])
        for number, (word, where) in enumerate(zip(row["words"], place, strict=True)):
            # What stands between this token and the next word's is the rest of the word, or its beginning.
            if label_token == "first":
                end = place[number + 1] if number + 1 < len(place) else len(tokens["input_ids"]) - 1
                part = slice(where, end)
            else:
                part = slice(place[number - 1] + 1 if number else where, where + 1)
            assert number == 0 or tokenizer.decode(tokens["input_ids"][part]).strip() == word
            many += part.stop - part.start > 1
    assert many


def test_words_that_do_not_fit_have_no_place(tokenizer):
    row = {"words": ["fox"] * 30, "tags": ["O"] * 30}
    (tokens,), (place,) = encode_words([row], tokenizer, 10, ["O"])
    assert len(tokens["input_ids"]) == 10 and place[-1] == -1 and 0 < max(place) < 9


@pytest.mark.parametrize("max_length", [48, 256])
def test_windows_hold_all_of_a_context_and_the_gold_answer(world, tokenizer, max_length):
    rows, _ = rows_of(world, SPANS)
    encoded, windows = encode_spans(rows, tokenizer, max_length, 16)
    assert (len(windows) > len(rows)) == (max_length == 48)
    starts, ends, seen = [], [], [set() for _ in rows]
    for tokens, window in zip(encoded, windows, strict=True):
        assert len(tokens["input_ids"]) == len(window.offsets) <= max_length
        seen[window.row] |= {place for offset in window.offsets if offset for place in range(*offset)}
        # Scores of a model that knows: its labels, and nothing for what is no answer.
        for side, scores in ((0, starts), (1, ends)):
            scores.append(
                numpy.eye(len(window.offsets))[tokens["labels"][side]]
                * (9 if window.offsets[tokens["labels"][side]] else 1)
            )
    for row, places in zip(rows, seen, strict=True):
        assert all(character.isspace() or place in places for place, character in enumerate(row["context"]))
    said = best_spans(rows, windows, starts, ends)
    assert said == [(row["texts"] or [""])[0] for row in rows]


def test_spans_are_not_longer_than_asked(tokenizer):
    rows = [{"context": "a b c d e f g", "question": "q", "texts": [], "starts": []}]
    encoded, windows = encode_spans(rows, tokenizer, 64, 8)
    size = len(encoded[0]["input_ids"])
    inside = [place for place, offset in enumerate(windows[0].offsets) if offset]
    start, end = numpy.zeros(size), numpy.zeros(size)
    start[inside[0]], end[inside[-1]], end[inside[1]] = 5, 5, 1
    assert best_spans(rows, windows, [start], [end], 30) == ["a b c d e f g"]
    assert best_spans(rows, windows, [start], [end], 2) == [rows[0]["context"][: windows[0].offsets[inside[1]][1]]]
    start[-1] = end[-1] = 6
    assert best_spans(rows, windows, [start], [end]) == [""]


def test_squads_forms_are_read(tmp_path):
    read = reader_of(SPANS)
    row = {"context": "a red fox", "question": " What? "}
    forms = (
        {"text": ["red"], "answer_start": [2]},
        [{"text": "red", "answer_start": 2}],
        '{"text": ["red"], "answer_start": [2]}',
    )
    for answers in forms:
        found = read("here", {**row, "answers": answers})
        assert (found["texts"], found["starts"], found["question"]) == (["red"], [2], "What?")
    assert read("here", {**row, "answers": {"text": [], "answer_start": []}})["texts"] == []


def test_labels_written_as_numbers_get_names():
    read = reader_of(TEXT, ["ham", "spam"])
    assert [read("here", {"text": "t", "label": label})["label"] for label in (1, "0", "spam")] == [
        "spam",
        "ham",
        "spam",
    ]
    assert reader_of(WORDS)("here", {"words": '["a", "b c"]', "tags": "O B-x"})["words"] == ["a", "b c"]

"""Rows are drawn from their numbers alone, captions and questions of different pictures; so are pairs of digits."""

import numpy
import pytest

from hfllm.data.world.pictures import (
    ASK_COLORS,
    ASK_SHAPES,
    CAPTIONS,
    COLORS,
    NUMERALS,
    PLACES,
    SHAPES,
    SIDES,
    TRAINED_DIGITS,
    WORD,
    WORDS,
    DrawnWorld,
    Style,
    TwoDigits,
)
from hfllm.data.world.wordings import WORDINGS


def test_a_row_is_a_function_of_its_number():
    rows = DrawnWorld(1, 20, num_questions=3)
    again = [DrawnWorld(1, 20, num_questions=3)[number] for number in reversed(range(20))][::-1]
    assert [row.turns for row in rows] == [row.turns for row in again]
    assert all(one.picture.tobytes() == other.picture.tobytes() for one, other in zip(rows, again, strict=True))
    assert len(list(rows)) == len(rows) == 20 and len(rows[0].turns) == 3
    others = {row.picture.tobytes() for row in DrawnWorld(1, 20, CAPTIONS)}
    assert not others & {row.picture.tobytes() for row in rows}
    with pytest.raises(IndexError):
        rows[20]


def test_captions_say_colors_and_shapes_apart():
    for row in DrawnWorld(0, 50, CAPTIONS, style=Style(share_crowded=0)):
        said = {question: dict(part.split(": ") for part in answer.split(", ")) for question, answer in row.turns}
        assert said.keys() == {ASK_COLORS, ASK_SHAPES}
        assert set(said[ASK_COLORS].values()) <= {*COLORS, WORD}
        assert set(said[ASK_SHAPES].values()) <= {*SHAPES, *WORDS}
        assert (
            list(said[ASK_COLORS]) == list(said[ASK_SHAPES]) == [each for each in PLACES if each in said[ASK_COLORS]]
        )
    both = DrawnWorld(0, 4, num_questions=3, caption_every=2)
    for number, (row, bare) in enumerate(zip(both, DrawnWorld(0, 4, num_questions=3), strict=True)):
        has_captions = number % 2 == 0
        assert [ask for ask, _ in row.turns[:-3]] == [ASK_COLORS, ASK_SHAPES] * has_captions
        assert row.turns[-3:] == bare.turns and row.picture.tobytes() == bare.picture.tobytes()
        assert row.gold == bare.gold
    crowded = DrawnWorld(0, 20, numbers=(3,), families=("count",))
    assert {answer for row in crowded for _, answer in row.turns} == {"three"}
    counted = DrawnWorld(0, 4, num_questions=3, families=("count",))
    assert {ask for row in counted for ask, _ in row.turns} <= set(WORDINGS["count"].trained)
    firsts = {row.turns[0][0] for row in DrawnWorld(0, 4, CAPTIONS)}
    assert firsts == {ASK_COLORS, ASK_SHAPES}


def test_messages_are_the_turns_in_order():
    row = DrawnWorld(0, 1, num_questions=2)[0]
    messages = row.messages()
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[:1] == row.prompt() and messages[0]["content"][0] == {"type": "image"}
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    assert texts == [text for turn in row.turns for text in turn]


@pytest.mark.slow
def test_two_digits_are_two_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    known = {image.tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    train, held_out = TwoDigits(0, 200, num_questions=2), TwoDigits(0, 200, is_held_out=True)
    parts = []
    for rows in (train, held_out):
        seen = set()
        for row in rows:
            # Back to what scikit-learn has: every second line, from 0 to 16.
            gray = numpy.asarray(row.picture)[::2, :, 0] / 255 * 16
            halves = dict(zip(SIDES, (gray[:, :8].round(), gray[:, 8:].round()), strict=True))
            for question, answer in row.turns:
                side = question.strip("?").split()[-1]
                half, said = halves[side], answer.removeprefix(f"{side}: ")
                assert str(known[half.tobytes()]) == said and said in NUMERALS
                seen.add(half.tobytes())
        parts.append(seen)
    copies = len(known) < len(digits.images)
    assert len(parts[0]) > 100 and (copies or not parts[0] & parts[1])
    assert len(train.places) == TRAINED_DIGITS and not set(train.places) & set(held_out.places)

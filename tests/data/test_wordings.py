"""Wordings of questions: each is read for what it means, and training has none of the held-out ones."""

from collections import Counter, defaultdict

import pytest

from hfllm.data.world.pictures import ABSENT, COLORS, REWORDED, SHAPES, STYLES, answer_about, draw_example
from hfllm.data.world.wordings import WORDINGS, meaning_of, usual_wording
from hfllm.stages.vision.build import caption_rows, prompt_rows, question_rows, style_parts

NAMES = {"color": ["square"], "shape": ["red"], "count": [], "place": ["red square"], "relation": ["bar", "post"]}
KINDS = [(kind, wording) for kind, each in WORDINGS.items() for wording in (*each.trained, *each.held_out)]


@pytest.mark.parametrize(("kind", "wording"), KINDS)
def test_every_wording_is_read_for_what_it_means(kind, wording):
    names = tuple(NAMES.get(kind, []))
    assert meaning_of(wording.format(*names)) == (kind, names)
    usual = WORDINGS[kind].trained[0].format(*names)
    assert usual_wording(wording.format(*names)) == usual == usual_wording(usual)


def test_wordings_are_different_and_several_of_each_kind():
    texts = [wording for _, wording in KINDS]
    assert len(set(texts)) == len(texts)
    assert all(len(each.trained) >= 4 and len(each.held_out) >= 2 for each in WORDINGS.values())
    assert meaning_of("What does it say?") is None and usual_wording("What does it say?") == "What does it say?"


def pattern(text):
    """Return a question with its names left out."""
    return " ".join("X" if word.strip("?.,") in (*COLORS, *SHAPES) else word.strip("?.,") for word in text.split())


def test_training_has_no_held_out_wording_and_all_trained_ones():
    held_out = {pattern(text.format(*["bar"] * 2)) for each in WORDINGS.values() for text in each.held_out}
    trained = {pattern(text.format(*["bar"] * 2)) for each in WORDINGS.values() for text in each.trained}
    rows = [*question_rows("pictures", 7, 2000, 7), *caption_rows("pictures", 7, 200)]
    asked = Counter(pattern(text) for row in rows for text, _ in row.turns)
    prompts = prompt_rows("pictures", 300, 7)
    asked.update(pattern(row["prompt"][0]["content"][1]["text"]) for row in prompts)
    # Names of color and shape together leave two marks.
    one = {text.replace("X X", "X") for text in asked}
    assert not held_out & one and trained <= one


def test_held_out_wordings_have_no_word_that_training_has_not():
    """What is held out is how they are put together: words that were never read have no meaning."""

    def words(texts):
        return {word.strip("?.,").lower() for text in texts for word in text.format("X", "X").split()}

    trained = words(text for each in WORDINGS.values() for text in each.trained)
    assert words(text for each in WORDINGS.values() for text in each.held_out) <= trained


def test_answers_do_not_depend_on_the_wording():
    families = defaultdict(set)
    for number in range(300):
        example = draw_example(0, number, num_questions=3, style=STYLES[REWORDED])
        for question in example.questions:
            kind, _ = meaning_of(question.text)
            assert question.family in (kind, ABSENT)
            assert answer_about(example.scene, question.text) == question.answer
            families[kind].add(pattern(question.text).replace("X X", "X"))
    for kind, wordings in WORDINGS.items():
        assert families[kind] == {pattern(text.format("bar", "bar")) for text in wordings.held_out}
    (asked,) = (style_parts("pictures", 200)[name] for name in (REWORDED,))
    assert {pattern(each.question).replace("X X", "X") for each in asked} <= set().union(*families.values())

"""Passages in prompts, and citations in answers."""

import pytest

from hfllm.data.passages import citations_of, with_passages, without_citations


def test_passages_stand_before_the_question_a_line_each():
    shown = with_passages("What colour is the fox?", ["The fox\nis red. It eats figs!", "The owl is blue"])
    assert shown == "The fox is red [1]. It eats figs [1]!\nThe owl is blue [2]\nWhat colour is the fox?"
    assert with_passages("What colour is the fox?", []) == "What colour is the fox?"


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        (
            "Dr. Fox met J. R. Owl. They ate with Mrs. Dalloway.",
            "Dr. Fox met J. R. Owl [1]. They ate with Mrs. Dalloway [1].",
        ),
        ("So... what?! Yes (it was.) Why", "So... what [1]?! Yes (it was [1].) Why [1]"),
        ("He said “stop.” It has 3.5 cm, e.g. here.", "He said “stop [1].” It has 3.5 cm, e.g. here [1]."),
        ('He met me. In 42. At "it". Yahoo! is (so).', 'He met me [1]. In 42 [1]. At "it" [1]. Yahoo! is (so) [1].'),
        ("彼は行った。水！！「行く。」", "彼は行った [1]。水 [1]！！「行く [1]。」"),
        # A number that a passage itself has cites nothing.
        ("It is so [2]. It is red.[3] Why?", "It is so [ 2] [1]. It is red.[ 3] Why [1]?"),
        ("f(x).y = x[1].split()", "f(x).y = x[ 1].split() [1]"),
        ("...", "... [1]"),
        ("", " [1]"),
    ],
)
def test_sentences_of_passages_end_with_their_number(text, marked):
    assert with_passages("Q", [text]) == f"{marked}\nQ"
    assert citations_of(marked) == [1] and without_citations(marked) == text.replace("[", "[ ").strip()
    assert with_passages("Q", ["", text]) == f" [1]\n{marked.replace('[1]', '[2]')}\nQ"


def test_citations_are_read_once_each_and_taken_out():
    answer = "It is red [2], not blue. [1] [2]"
    assert citations_of(answer) == [2, 1]
    assert without_citations(answer) == "It is red, not blue."
    assert citations_of("It is red.") == []

"""Passages in prompts, and citations in answers."""

from hfllm.data.passages import citations_of, with_passages, without_citations


def test_passages_stand_before_the_question_a_line_each():
    shown = with_passages("What colour is the fox?", ["The fox\nis red.", "The owl is blue."])
    assert shown == "[1] The fox is red.\n[2] The owl is blue.\nWhat colour is the fox?"
    assert with_passages("What colour is the fox?", []) == "What colour is the fox?"


def test_citations_are_read_once_each_and_taken_out():
    answer = "It is red [2], not blue. [1] [2]"
    assert citations_of(answer) == [2, 1]
    assert without_citations(answer) == "It is red, not blue."
    assert citations_of("It is red.") == []

"""Claims against passages: what is supported, what is revised, and what is not said."""

import math

import pytest

from hfllm.data.thoughts import admits_unknown
from hfllm.errors import InputError
from hfllm.grounding.verification import (
    Claim,
    Revision,
    claims_of,
    contains,
    has_words,
    revise_or_abstain,
    supported,
    verify,
)

PASSAGES = ["The zorb is blue and it lives in the mill.", "The vex is green.", "The vex eats 1,000 figs. It sleeps."]


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("The zorb is blue. [1] It sleeps! [2] [3]", ["The zorb is blue.", "It sleeps!"]),
        ("The zorb is blue [1]. It sleeps", ["The zorb is blue.", "It sleeps"]),
        ('It is "blue." So it is 3.5 m long.', ['It is "blue."', "So it is 3.5 m long."]),
        ("1. The zorb is blue.\n2) It sleeps\n- It eats figs\n", ["The zorb is blue.", "It sleeps", "It eats figs"]),
        ("它是红色的。它睡觉\uff01好", ["它是红色的。", "它睡觉\uff01", "好"]),
        ("42", ["42"]),
        ("  ...\n[1]", []),
        ("", []),
    ],
)
def test_claims_are_sentences(answer, claims):
    assert claims_of(answer) == claims


@pytest.mark.parametrize(
    ("claim", "contained", "share"),
    [
        ("the zorb is BLUE!", 1, 1),
        ("The zorb is green.", 0, 2 / 3),
        ("zorb is blu", 0, 2 / 3),
        ("zorb lives", 0, 1),
        ("blue zorb", 0, 1),
        ("?", 0, 0),
    ],
)
def test_checks_by_words(claim, contained, share):
    assert contains([claim], PASSAGES[:1]) == [contained]
    assert has_words([claim], PASSAGES[:1]) == [pytest.approx(share)]


def test_each_claim_has_its_own_passage():
    (claims,) = verify(["The vex is green. The zorb is blue. It is big."], [PASSAGES], contains)
    assert claims == [Claim("The vex is green.", 1, 1), Claim("The zorb is blue.", 1, 0), Claim("It is big.", 0, None)]
    assert supported("The vex is green. The zorb is blue.", PASSAGES, contains)
    assert not supported("The vex is green. It is big.", PASSAGES, contains)
    assert not supported("The vex eats 1000 figs.", PASSAGES, contains)


@pytest.mark.parametrize("answer", ["", "...", "I do not know.", "I don't know."])
def test_what_claims_nothing_is_not_supported(answer):
    assert not supported(answer, PASSAGES, contains)
    assert not supported("The vex is green.", [], contains)


def test_who_does_not_know():
    assert admits_unknown("Sorry, I don’t know.") and admits_unknown("I have never heard of a zorb.")
    assert not admits_unknown("The zorb cannot know.") and not admits_unknown("We know.")
    (claims,) = verify(["I do not know. The vex is red."], [PASSAGES], contains)
    assert [claim.text for claim in claims] == ["The vex is red."]


def test_all_pairs_go_to_the_check_at_once():
    calls = []

    def check(claims, passages):
        calls.append(list(zip(claims, passages, strict=True)))
        return (0.4 + 0.1 * (passage == "b") for passage in passages)

    found = verify(["One. Two.", "Three.", ""], [["a", "b"], ["b"], ["a"]], check)
    assert calls == [[("One.", "a"), ("One.", "b"), ("Two.", "a"), ("Two.", "b"), ("Three.", "b")]]
    assert [[claim.passage for claim in claims] for claims in found] == [[1, 1], [0], []]
    assert verify(["One."], [["b"]], check, threshold=0.6)[0] == [Claim("One.", 0.5, None)]
    assert verify(["One, two"], [["b"]], check, lambda answer: answer.split(", "))[0][1].text == "two"
    assert verify([], [], check) == []


def test_unsupported_claims_are_dropped_or_nothing_is_said():
    answers = [
        "The zorb is blue.",
        "The zorb is blue. It is big. The vex is green. [2]",
        "The vex is red.",
        "I have never heard of a vex.",
        "",
    ]
    found = revise_or_abstain(["?"] * 5, answers, [PASSAGES] * 5, contains)
    assert found == [
        Revision("The zorb is blue.", "kept"),
        Revision("The zorb is blue. The vex is green.", "revised", ("It is big.",)),
        Revision("I do not know.", "abstained", ("The vex is red.",)),
        Revision("I have never heard of a vex.", "abstained"),
        Revision("I do not know.", "abstained"),
    ]


def test_a_revision_is_checked_too():
    asked = []

    def revise(question, answer, unsupported, passages):
        asked.append((question, answer, unsupported))
        return "The vex is green." if question == "Vex?" else "The zorb is red."

    answers = ["The vex is red.", "The zorb is red.", "The vex is green.", ""]
    found = revise_or_abstain(["Vex?", "Zorb?", "Vex?", "Vex?"], answers, [PASSAGES] * 4, contains, revise)
    assert [(each.answer, each.action) for each in found] == [
        ("The vex is green.", "revised"),
        ("I do not know.", "abstained"),
        ("The vex is green.", "kept"),
        ("I do not know.", "abstained"),
    ]
    assert asked == [("Vex?", answers[0], ("The vex is red.",)), ("Zorb?", answers[1], ("The zorb is red.",))]
    assert found[0].unsupported == ("The vex is red.",)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: verify(["One."], [], contains), "1 answers and 0 lists of passages"),
        (lambda: verify(["One."], ["text"], contains), "passages of answer 1 must be a list of texts, got 'text'"),
        (lambda: verify(["One."], [[1]], contains), "passages of answer 1 must be a list of texts"),
        (lambda: verify(["One."], [["a"]], lambda c, p: []), "0 scores for 1 pairs"),
        (lambda: verify(["One."], [["a"]], lambda c, p: [math.nan]), "returned nan for the claim 'One.'"),
        (lambda: verify(["One."], [["a"]], lambda c, p: [1.5]), "returned 1.5 for the claim 'One.'"),
        (lambda: verify(["One."], [["a"]], contains, threshold=0), "threshold must be above 0"),
        (lambda: revise_or_abstain([], ["One."], [["a"]], contains), "0 questions and 1 answers"),
    ],
)
def test_bad_input_is_one_line(call, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)


def test_answers_and_checks_that_are_none_are_named():
    for answers, passages, check, message in (
        ([None], [["a"]], contains, "answer 1 must be a text, got None"),
        (["It is."], [None], contains, "the passages of answer 1 must be a list of texts, got 'None'"),
        (["It is."], [["a"]], lambda *_: None, "the check returned None; expected a number for each pair"),
        (["It is."], [["a"]], lambda *_: ["x"], r"the check returned \['x'\]; expected a number"),
    ):
        with pytest.raises(InputError, match=message):
            verify(answers, passages, check)

"""Thoughts and answers are told apart, and equal answers are equal."""

import pytest

from hfllm.data.thoughts import answer_of, final_answer, plain_answer, split_thoughts, thoughts_of


@pytest.mark.parametrize(
    ("text", "thoughts", "said"),
    [
        ("Six.", None, "Six."),
        ("<think>2+4</think>Six.", "2+4", "Six."),
        ("<think>\n2+4\n</think>\n\nSix.", "2+4", "Six."),
        ("Well. <think>2+4</think> Six.", "2+4", "Well.  Six."),
        ("<think>a</think>b<think>c</think>d", "a\nc", "bd"),
        ("<think>2+4 is", "2+4 is", ""),
        # The prompt has opened it.
        ("2+4</think>Six.", "2+4", "Six."),
        ("<think></think>Six.", "", "Six."),
        ("", None, ""),
    ],
)
def test_thoughts_are_told_from_the_rest(text, thoughts, said):
    assert split_thoughts(text) == (thoughts, said)
    assert thoughts_of(text) == (thoughts or "") and answer_of(text) == said.strip()
    message = [{"role": "assistant", "content": text}]
    assert thoughts_of(message) == (thoughts or "") and answer_of(message) == said.strip()


def test_a_thought_that_the_prompt_has_opened_may_never_end():
    assert split_thoughts("2+4 is", is_open=True) == ("2+4 is", "")


def test_the_answer_of_a_conversation_is_its_last_turn():
    episode = [
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [{}]},
        {"role": "tool", "content": "#### 9"},
        {"role": "assistant", "content": "Six.", "reasoning_content": "so"},
    ]
    assert answer_of(episode) == "Six." and thoughts_of(episode) == "ask\nso"
    assert answer_of([]) == "" and answer_of(episode[1:2]) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48/2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 5\nNo, wait.\n#### 1,234 \nDone in 3 steps.", "1,234"),
        (r"So \boxed{7} of 9.", "7"),
        ("It is 6, or $12.50.", "$12.50"),
        ("From -3 to -4", "-4"),
        ("The owl.\nA fox!\n", "A fox!"),
        ("####", ""),
        ("#### 42 dollars", "42"),
        ("#### **$42** a day", "$42"),
        ("#### 2 to 3", "2 to 3"),
        ("#### Apollo 11", "Apollo 11"),
        (r"\boxed{\frac{1}{2}} of 3", "1/2"),
        (r"\boxed{2} or \boxed{1\tfrac34}", "1 3/4"),
        (r"\boxed{\frac{x+1}{2}}", r"\frac{x+1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{7} or \boxed{8", "7"),
        (r"\boxed{1{,}000\text{ cm}}", "1,000"),
        (r"He has 3: \boxed{\text{blue}}", "blue"),
        ("Half, or 1/2.", "1/2"),
        ("In 2-3 days", "3"),
        ("It is \u22125.", "-5"),
        ("about 1e-05", "1e-05"),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_solution(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("72", "72.00"), ("$1,234", "1234"), ("-0.50", "-.5"), ("007", "7."), ("+3", "3"), ("-0", "0")),
        *(("1/2", "0.5"), ("2/6", "1/3"), ("1 1/2", "1.50"), ("-3/4", "-.75"), ("6 / 3", "2"), ("1e-05", "0.00001")),
        *((r"\$18", "18"), (r"\frac{3}{4}", ".75"), ("\u22125", "-5"), (r"(3, \pi)", r"(3,\pi)")),
        *(("50%", "50"), (" A  Fox.", "a fox"), ("", " "), (f"{10**40}", f"{10**40}.0")),
    ],
)
def test_equal_answers_are_equal(one, other):
    assert plain_answer(one) == plain_answer(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("5", ".5"), ("3", "-3"), (f"{10**40}", f"{10**40 + 1}"), ("1e999999999", "1"), ("2 3", "2.3")),
        *(("1/2", "3/2"), ("1 1/2", "11/2"), ("1/0", "0"), (f"{10**50}/3", "3")),
        (r"\frac{x+1}{2}", r"x+\frac{1}{2}"),
    ],
)
def test_different_answers_are_not(one, other):
    assert plain_answer(one) != plain_answer(other)

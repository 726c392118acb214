"""Rows of multiple-choice files: the choice is the one that the author meant, or the row is refused."""

import csv
import json
import random

import pytest

from hfllm.errors import InputError
from hfllm.evaluation.suites.few_shot import FewShot, question_of, questions_of

FLAG = "--few_shot_files"


def table(path, rows, header=None):
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([*([header] if header else []), *rows])
    return str(path)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(path):
    return [item.body for item in FewShot([path]).items()]


def refusal(*rows):
    with pytest.raises(InputError) as error:
        questions_of([(f"f.jsonl, line {number}", row) for number, row in enumerate(rows, 1)])
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- files as they are published ----


def test_mmlu_with_a_header_and_without_as_lists_and_as_printed_arrays(tmp_path):
    rows = [
        ["Which is prime, says the book?", "4", "9", "7", "8", "C"],
        ["What is 2 + 2?", "3", "2", "1", "4", "D"],
        ["Which letter, in words\nof two lines?", "B", "A", "D", "C", "B"],
        ["What is 1 + 1?", "2", "5", "6", "7", "A"],
    ]
    headed = asked(table(tmp_path / "headed.csv", rows, ["question", "A", "B", "C", "D", "answer"]))
    headless = asked(table(tmp_path / "headless.csv", rows))
    assert [each.answer for each in headed[:2]] == ["7", "4"] and len(headed) == len(headless) == 4
    # Row 3 means A by the letter: the others have no other way.
    assert headed == headless and headed[2].answer == "A"
    hub = [
        {"question": row[0], "subject": "sums", "choices": row[1:5], "answer": "ABCD".index(row[5])} for row in rows
    ]
    assert asked(lines(tmp_path / "hub.jsonl", *hub)) == headed
    # As pandas writes what it has read from the Hub.
    printed = [[row["question"], "sums", str(row["choices"]).replace(",", ""), row["answer"]] for row in hub]
    assert asked(table(tmp_path / "hub.csv", printed, ["question", "subject", "choices", "answer"])) == headed
    listed = [[row["question"], json.dumps(row["choices"]), row["answer"]] for row in hub]
    assert asked(table(tmp_path / "list.csv", listed[:2], ["question", "choices", "answer_index"])) == headed[:2]


def test_rows_with_fewer_choices_and_headers_that_lose_a_column(tmp_path):
    rows = [["Which?", "yes", "no", "", "", "B"], ["Which?", "a", "b", "c", "d", "D"]]
    found = asked(table(tmp_path / "fewer.csv", rows, ["Question", "A", "B", "C", "D", "Answer"]))
    assert [each.choices for each in found] == [("yes", "no"), ("a", "b", "c", "d")] and found[0].answer == "no"
    gap = table(tmp_path / "gap.csv", [["Which?", "", "b", "c", "B"]], ["question", "A", "B", "C", "answer"])
    with pytest.raises(
        InputError, match=r"gap.csv, row 1: choices are \[None, 'b', 'c'\]; expected two or more texts"
    ):
        asked(gap)
    twice = table(tmp_path / "twice.csv", [["Which?", "a", "b", "B"]], ["question", "A", "A", "answer"])
    with pytest.raises(InputError, match=r"twice.csv, line 1: the column 'A' occurs twice"):
        asked(twice)
    header = ["question", "A", "B", "answer", "", ""]
    spreadsheet = table(tmp_path / "ends.csv", [["Which?", "a", "b", "B", "", ""]], header)
    assert [each.answer for each in asked(spreadsheet)] == ["b"]
    # Without a header, equal cells lose nothing.
    same = table(tmp_path / "same.csv", [["1 + 1?", "A", "2", "A", "4", "B"], ["2 + 2?", "1", "2", "3", "4", "D"]])
    assert [each.answer for each in asked(same)] == ["2", "4"]
    short = table(tmp_path / "short.csv", [["Which?", "1", "2", "A"], ["Which?", "1", "2", "C"]])
    with pytest.raises(InputError, match=r"short.csv, row 2: the file has no header, .*a letter up to B"):
        asked(short)


def test_gpqa_is_shuffled_the_same_in_every_order_of_rows(tmp_path):
    header = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    rows = [[str(n), f"Which, {n}?", f"right {n}", "wrong a", "wrong b", "wrong c"] for n in range(40)]
    found = asked(table(tmp_path / "gpqa.csv", rows, header))
    assert all(each.answer == f"right {n}" and len(each.choices) == 4 for n, each in enumerate(found))
    places = [each.choices.index(each.answer) for each in found]
    assert {places.count(place) > 3 for place in range(4)} == {True}
    assert asked(table(tmp_path / "back.csv", rows[::-1], header))[::-1] == found
    sciq = {"question": "Which?", "correct_answer": "x", "distractor1": "y", "distractor2": "z", "support": "..."}
    assert question_of("f", sciq).answer == "x" and set(question_of("f", sciq).choices) == {"x", "y", "z"}


ENDINGS = ["runs off.", "sits down.", "flies.", "sings [sings] a song."]
KNOWN = {
    "hellaswag": (
        {
            **{"ctx_a": "A man is [header] here.", "ctx_b": "he", "ctx": "A man is here. he", "endings": ENDINGS},
            **{"label": "3", "activity_label": "Singing", "split": "val", "source_id": "a~1"},
        },
        ("Singing: A man is here. He", "sings a song."),
    ),
    "hellaswag, short": ({"ctx": "A man", "endings": ENDINGS, "label": 0}, ("A man", "runs off.")),
    "piqa": ({"goal": "Sit", "sol1": "stand", "sol2": "use a chair", "label": 1}, ("Sit", "use a chair")),
    "winogrande": (
        {"sentence": "_ is tall.", "option1": "Mia", "option2": "Tom", "answer": "2"},
        ("_ is tall.", "Tom"),
    ),
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True}, ("It is.\nis it", "yes")),
    "boolq, labels": ({"question": "is it", "passage": "It is.", "label": 0}, ("It is.\nis it", "no")),
    "boolq, words": ({"question": "is it", "passage": "It is.", "answer": "Yes"}, ("It is.\nis it", "yes")),
    "copa": (
        {"premise": "The sun rose.", "choice1": "A", "choice2": "Night ended.", "question": "effect", "label": 1},
        ("The sun rose.\nWhat happened as a result?", "Night ended."),
    ),
    "copa, cause": (
        {"premise": "It fell.", "choice1": "I hit it.", "choice2": "It broke.", "question": "cause", "label": "0"},
        ("It fell.\nWhat was the cause of this?", "I hit it."),
    ),
    "socialiqa": (
        {
            **{"context": "Tom gave Mia a book.", "question": "Why?", "label": "3"},
            **{"answerA": "to sell", "answerB": "to ask", "answerC": "to be kind"},
        },
        ("Tom gave Mia a book.\nWhy?", "to be kind"),
    ),
    "race": (
        {"article": "A fox ran. ", "question": "Who ran?", "options": ["dog", "fox", "cat", "ape"], "answer": "B"},
        ("A fox ran.\nWho ran?", "fox"),
    ),
    "truthfulqa": (
        {"question": "Why?", "mc1_targets": {"choices": ["so", "or so", "not so"], "labels": [1, 0, 0]}},
        ("Why?", "so"),
    ),
    "arc": (
        {"question": "Why?", "choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answerKey": "1"},
        ("Why?", "2"),
    ),
    "arc, first release": (
        {
            "question": {"stem": "Why?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
            "answerKey": "B",
        },
        ("Why?", "y"),
    ),
    "medqa": (
        {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
        ("Why?", "y"),
    ),
    "mmlu-pro": (
        {"question": "Why?", "options": ["A", "C", "B"], "answer": "C", "answer_index": 2},
        ("Why?", "B"),
    ),
    "aqua": ({"question": "Why?", "options": ["A)21", "B)22"], "correct": "B"}, ("Why?", "B)22")),
    "medmcqa": (
        {"question": "Why?", "opa": "x", "opb": "y", "opc": "z", "opd": "w", "cop": 0, "subject_name": "a"},
        ("Why?", "x"),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_well_known_columns(name):
    row, (question, answer) = KNOWN[name]
    found = question_of("f, row 1", row)
    assert (found.question, found.answer) == (question, answer) and answer in found.choices
    assert found.is_continued == name.startswith("hellaswag")


def test_endings_continue_their_context(make_model, tokenizer, tmp_path):
    from hfllm.evaluation.suites.base import Subject
    from hfllm.evaluation.suites.few_shot import asked_as, shared_of

    rows = [{"ctx": f"A fox {n}", "endings": ENDINGS, "label": n % 4} for n in range(3)]
    (item,) = FewShot([lines(tmp_path / "h.jsonl", *rows)], num_shots=2).items()
    subject = Subject("small", make_model(), tokenizer)
    assert shared_of(subject, item.body) == "A fox 0 runs off.\n\nA fox 1 sits down.\n\n"
    assert asked_as(subject, item.body) == "A fox 0 runs off.\n\nA fox 1 sits down.\n\nA fox 2"


# ---- answers that could mean two choices ----


DIGITS = {"question": "How many?", "choices": ["3", "2", "1", "0"], "answer": "2"}


def test_an_index_that_is_the_text_of_another_choice_is_refused_with_its_readings():
    said = refusal(DIGITS)
    assert said.startswith(
        "f.jsonl, line 1: the answer '2' could mean as a text and counted from 1 '2', counted from 0 "
    )
    assert "'1': say which by a column answer_index (counted from 0) or answer_text, or by choices as" in said
    # Said as the line says.
    bare = {name: DIGITS[name] for name in ("question", "choices")}
    assert question_of("f", {**bare, "answer_index": 2}).answer == "1"
    assert question_of("f", {**bare, "answer_text": "2"}).answer == "2"
    labeled = {"question": "How many?", "choices": {"text": ["3", "2"], "label": ["2", "3"]}, "answerKey": "2"}
    assert question_of("f", labeled).answer == "3"
    assert "as a text and counted from 1 '2', as a label '3'" in refusal(
        {**labeled, "answer": labeled.pop("answerKey")}
    )


def test_an_index_from_0_or_from_1_is_refused_unless_another_row_says_which():
    def row(answer):
        return {"question": "Which?", "choices": ["red", "blue", "green"], "answer": answer}

    assert "counted from 0 'blue', counted from 1 'red'" in refusal(row(1), row(2))
    from_0, from_1 = questions_of([("a", row(1)), ("b", row(0))]), questions_of([("a", row("1")), ("b", row("3"))])
    assert (from_0[0].answer, from_1[0].answer) == ("blue", "red")
    # Both in one file: neither way reads all, and the row that only one way reads is no help to the other.
    assert refusal(row(1), row(0), row(3)).startswith("f.jsonl, line 1: the answer 1 could mean")
    assert "is none of the choices" in refusal(row(4))


def test_a_row_is_explained_by_the_others_of_its_file():
    text = {"question": "How many?", "choices": ["12", "15"], "answer": "15"}
    assert [each.answer for each in questions_of([("a", text), ("b", DIGITS)])] == ["15", "2"]
    # With a subject, which MMLU has too, and whose answers are numbers from 0.
    mmlu = {**DIGITS, "subject": "sums"}
    four = {**mmlu, "choices": ["a", "b", "c", "d"]}
    for row in (mmlu, {**mmlu, "answer": 2}):
        assert "could mean as a text and counted from 1 '2', counted from 0 '1'" in refusal(row)
        assert questions_of([("a", {**four, "answer": 0}), ("b", row)])[1].answer == "1"
    assert question_of("f", {**mmlu, "choices": ["5", "6", "7", "8"], "answer": "7"}).answer == "7"
    assert question_of("f", {**four, "answer": 2}).answer == "c"
    assert "counted from 0 'c', counted from 1 'b'" in refusal(four)
    from_1 = questions_of([("a", {**four, "answer": 2}), ("b", {**four, "answer": 4})])
    assert [each.answer for each in from_1] == ["b", "d"]
    assert "could mean" in refusal(*({**four, "answer": number} for number in (0, 2, 4)))
    letter = {"question": "Which?", "choices": ["B", "A"], "answer": "A"}
    assert "as a text 'A', as a letter 'B'" in refusal(letter)
    by_letter = questions_of([("a", letter), ("b", {**letter, "choices": ["x", "y"]})])
    assert by_letter[0].answer == "B"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Q?", "choices": "red or blue", "answer": "red"}, "choices are 'red or blue'; expected a list"),
        ({"question": "Q?", "choices": ["red"], "answer": "red"}, "expected two or more texts, none of them empty"),
        ({"question": "Q?", "choices": ["red", None], "answer": "red"}, "expected two or more texts, none of them"),
        ({"question": "Q?", "choices": ["red", "blue"], "answer": "grey"}, "'grey' is none of the choices"),
        ({"question": "Q?", "choices": ["red", "blue"], "answer": ["red"]}, "expected a text, a number, or true"),
        ({"question": "Q?", "choices": ["red", "blue"], "answer": True}, "True is none of the choices"),
        ({"question": "Q?", "choices": ["red", "blue"], "answer": ""}, "no column of answer, answerkey"),
        ({"question": "Q?", "choices": ["a", "b"], "answer_index": 1, "answer": "a"}, "leave one of them out"),
        ({"question": "Q?", "choices": ["a", "b"], "answer_index": 2}, "2, counted from 0, is none of the choices"),
        (
            {"question": "Q?", "first": "red", "second": "blue", "answer": "B"},
            "the columns first, second are not read",
        ),
        ({"question": "Q?", "answer": {"value": "red"}}, "expected a text, a number"),
        ({"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "one for each"),
        ({"ctx": "A fox", "endings": ENDINGS, "label": ""}, "no label, which says the right choice"),
        ({"ctx": "A fox", "endings": ENDINGS, "label": 4}, "4, counted from 0, is none of the choices"),
        ({"question": "Q?", "mc1_targets": {"a": 1, "b": 1}}, "expected 1 for one choice and 0 for the others"),
    ],
)
def test_what_is_no_question_is_refused(row, said):
    assert said in refusal(row) and refusal(row).startswith("f.jsonl, line 1: ")


def test_passages_stand_before_written_questions_too():
    row = {"Context": "Mia is 7.", "question": "How old?", "answer": "7"}
    found = question_of("f", row)
    assert (found.question, found.choices) == ("Mia is 7.\nHow old?", ())
    assert question_of("f", {**row, "Context": ["Mia is 7.", "Tom is 8."]}).question.startswith(
        "Mia is 7.\nTom is 8.\n"
    )
    # A prompt that was made of it has it once.
    made = {"context": "Mia is 7.", "prompt": "Text: Mia is 7. How old?", "answer": "7"}
    assert question_of("f", made).question == made["prompt"]
    sciq = {"context": "Ice melts.", "question": "Into?", "correct_answer": "water", "distractor1": "sand"}
    assert question_of("f", sciq).question == "Ice melts.\nInto?"
    assert "context is {'title': 'Mia'}; expected a text" in refusal({**row, "Context": {"title": "Mia"}})


def test_written_answers_are_not_touched():
    assert question_of("f", {"question": "Who?", "answer": "B", "id": "7"}).choices == ()
    assert question_of("f", {"question": "How many?", "answer": 0}).answer == "0"
    assert question_of("f", {"question": "Who?", "first": "x", "second": "y", "answer_text": "B"}).answer == "B"


# ---- whatever an author writes ----

WORDS = {
    "digits": [str(number) for number in range(6)],
    "letters": list("ABCDE"),
    "numbers": ["1.0", "2", "02", "3.5", "1/2", "0"],
    "words": ["red", "Blue", "a fox", "none of these", "Red!"],
}


def written(rng, way, labels, choices, right):
    """An answer as an author of this way writes it, with numbers as JSON has them, or as texts."""
    said = {
        "text": choices[right],
        "letter": "ABCDEF"[right] if rng.random() < 0.8 else f"({'ABCDEF'[right]})",
        "from 0": right,
        "from 1": right + 1,
        "label": labels[right] if labels else "",
    }[way]
    return str(said) if rng.random() < 0.5 else said


@pytest.mark.slow
def test_the_author_is_understood_or_refused():
    """Random files whose rows are answered in one way: no choice other than the author's is ever right."""
    rng, understood, refused = random.Random(0), dict.fromkeys(("text", "letter", "from 0", "from 1", "label"), 0), 0
    for _ in range(1000):
        way, column = rng.choice(list(understood)), rng.choice(["answer", "label", "gold", "target"])
        kinds = rng.sample(list(WORDS), rng.choice([1, 1, 2]))
        rows, meant, has_subject = [], [], rng.random() < 0.3
        for number in range(rng.choice([1, 1, 2, 5, 12])):
            words = WORDS[rng.choice(kinds)]
            choices = rng.sample(words, 4 if has_subject else rng.randint(2, len(words) - 1))
            count, right = len(choices), rng.randrange(len(choices))
            # MMLU's columns with numbers count from 0, unless a row says that they do not.
            right = count - 1 if has_subject and way == "from 1" and not number else right
            labels = None
            if way == "label" or rng.random() < 0.2:
                labels = rng.choice([list("ABCDEF"), list("123456"), list("012345"), list("FEDCBA")])[:count]
            listed = {"text": choices, "label": labels} if labels else choices
            rows.append({"question": f"Which, {number}?", "choices": listed})
            rows[-1] |= {"subject": "sums"} if has_subject else {}
            rows[-1][column] = written(rng, way, labels, choices, right)
            meant.append(choices[right])
        try:
            found = questions_of([(f"f, row {number}", row) for number, row in enumerate(rows, 1)])
        except InputError as error:
            assert "could mean" in str(error), (way, rows)
            refused += 1
            continue
        assert [each.answer for each in found] == meant, (way, rows)
        understood[way] += 1
    assert min(understood.values()) > 50 and 75 < refused < 600

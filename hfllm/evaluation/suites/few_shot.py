"""Multiple choice and exact match from local files, with worked examples from the same file or without.

Rows are recognized by their columns: a question with choices and the right one (ARC, MMLU, GPQA, HellaSwag and their
like), or a question and the answer to be written.

    acc        the right choice is the likeliest
    acc_norm   the same, each log-likelihood divided by the choice's characters (lm-eval's `acc_norm`)
    exact_match   the written answer is the right one, apart from case, punctuation, number formats, and the text
                  before its number
"""

import ast
import csv
import json
import math
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, ClassVar

from hfllm.data.thoughts import FRACTION, NUMBER, PLAIN_NUMBER, final_answer, plain_answer
from hfllm.errors import InputError, refuse_if
from hfllm.evaluation.suites.base import (
    TOO_LONG,
    Item,
    Prompt,
    Record,
    Rows,
    Subject,
    Suite,
    chosen,
    rows_of,
    turns_of,
)
from hfllm.generation.scoring import Likelihood

# ---- rows of questions ----
#
# An answer is written as the text of a choice, as its label (`B`), or as its index, from 0 or from 1, and often it
# could be read in more than one of these ways. All rows of a file are assumed to use one way: a way unable to read one
# of its rows is excluded for the others. Where the remaining ways do not mean the same choice, the row is refused,
# never guessed.
#
# Columns of well-known files say the way by themselves: see `docs/guides/evaluation.md`.

QUESTION = ("question", "prompt", "instruction", "input", "question_stem")
CHOICES = ("choices", "options")
# The subject of a question, standing before it.
PASSAGES = ("passage", "context", "article", "premise")
ANSWER = (
    *("answer", "answerkey", "gold", "label", "target"),
    *("answer_key", "answer_idx", "correct_answer", "correct_option", "correct", "cop"),
)
# Columns whose names state how an answer is meant.
INDEX_COLUMN, TEXT_COLUMN = "answer_index", "answer_text"
# Ways to read an answer, in the words of an error.
TEXT, LABEL, LETTER, FROM_0, FROM_1 = "as a text", "as a label", "as a letter", "counted from 0", "counted from 1"
LETTERS = "ABCDEFGHIJ"
SAY_SO = (
    f"say which by a column {INDEX_COLUMN} (counted from 0) or {TEXT_COLUMN}, or by choices as "
    '{"text": [...], "label": [...]} with answerKey'
)
# Choices in columns of their own: A, B, ..., option1, option2, ..., opa, opb, ...
OPTION = re.compile(r"(option_?|choice_?|answer_?|opt_?|ending_?)([a-j]|\d)|((?:op)?)([a-j])")
# How numpy prints an array of texts.
PRINTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ARRAY = re.compile(rf"\[\s*(?:{PRINTED})(?:\s+(?:{PRINTED}))+\s*\]")
WRONG = re.compile(r"(?:incorrect_answer_?|distractor_?)\d+")
# Columns of MMLU on the Hub.
MMLU = {"question", "subject", "choices", "answer"}
# Columns about a row, without a choice.
ABOUT = {"id", "subject", "category", "topic", "source", "split", "type", "task", "level", "difficulty", "explanation"}
# Choices inside a question's text, and the text before and after.
INSIDE = re.compile(r"\s*\bAnswer ?(\d+):\s*")
LEAD, TAIL = re.compile(r"^Please choose the correct answer to the question:\s*"), re.compile(r"\n+Answer format:.*$")
# COPA's questions, by the word in its rows.
CAUSE_OR_EFFECT = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
NO_OR_YES = ("no", "false"), ("yes", "true")
FINAL = re.compile(r"####\s*(.+)")


@dataclass(frozen=True)
class Question:
    """A question to choose or write the answer of.

    Args:
        question: its text.
        choices: to choose from; empty where the answer is written.
        answer: the right choice or text.
        shots: worked examples before it, question and answer each.
        is_continued: whether the choices continue the text, as HellaSwag's endings do, and do not answer it.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    shots: tuple[tuple[str, str], ...] = ()
    is_continued: bool = False


@dataclass(frozen=True)
class QuestionRow:
    """A row as it is written, before its answer is matched to a choice.

    Args:
        origin: its position, such as `FILE, row 3`.
        question: its text.
        choices: their texts; empty where the answer is written.
        labels: the choices' labels, if the row names them.
        answer: as the row has it.
        ways: the possible readings of the answer, all by default.
        also: another answer of the row, in agreement with this one.
        is_continued: see `Question`.
        is_hub_mmlu: whether it has the columns of the Hub's MMLU, with counting from 0.
    """

    origin: str
    question: str
    choices: tuple[str, ...]
    answer: object
    labels: tuple[str, ...] | None = None
    ways: tuple[str, ...] = (TEXT, LABEL, LETTER, FROM_0, FROM_1)
    also: object = None
    is_continued: bool = False
    is_hub_mmlu: bool = False

    @cached_property
    def meanings(self) -> dict[str, int]:
        """Return the index of the choice meant by the answer, for every way of reading with a choice."""
        result = _meanings(self.answer, self.choices, self.labels)
        return {way: result[way] for way in self.ways if way in result}


def read_questions(path: str, flag: str) -> list[Question]:
    """Return the questions of a local file.

    Raises:
        InputError: when it cannot be read, or naming an invalid row, or a row with an answer of two possible meanings.
    """
    return questions_of(_without_header(path) or rows_of(path, (), flag))


def questions_of(rows: Rows) -> list[Question]:
    """Return the questions of the rows of one file.

    Args:
        rows: with their positions.
    """
    read = [_read(origin, row) for origin, row in rows]
    # Ways able to read all rows without a fixed way in their columns.
    open_rows = [each.meanings.keys() for each in read if each.choices and len(each.ways) > 1]
    shared = set.intersection(*map(set, open_rows)) if open_rows else set()
    return [_question(each, shared) for each in read]


def question_of(origin: str, row: Mapping[str, Any]) -> Question:
    """Return the question of a single row, without other rows to explain it; see `questions_of`."""
    return questions_of([(origin, dict(row))])[0]


def _question(read: QuestionRow, shared: set[str]) -> Question:
    """Return a question with the choice meant by its answer."""
    if not read.choices:
        return Question(read.question, (), _final(str(read.answer)))
    texts, meanings = read.choices, read.meanings
    if not meanings:
        how = f", {read.ways[0]}," if len(read.ways) == 1 else ""
        named = f" with the labels {', '.join(read.labels)}" if read.labels else ""
        choices = f"{list(texts)!r:.120}{named:.60}"
        raise InputError(f"{read.origin}: the answer {read.answer!r:.40}{how} is none of the choices {choices}")
    if len(read.ways) > 1 and shared:
        meanings = {way: index for way, index in meanings.items() if way in shared}
        # Its columns determine the first index only if nothing in the file shows labels or counting from 1.
        if read.is_hub_mmlu and meanings.keys() == {FROM_0, FROM_1}:
            meanings = {FROM_0: meanings[FROM_0]}
    by_text: dict[str, list[str]] = {}
    for way, index in meanings.items():
        by_text.setdefault(texts[index], []).append(way)
    if len(by_text) > 1:
        readings = ", ".join(f"{' and '.join(ways)} {text!r:.40}" for text, ways in by_text.items())
        raise InputError(f"{read.origin}: the answer {read.answer!r:.40} could mean {readings}: {SAY_SO}")
    (right,) = by_text
    if read.also is not None:
        others = {texts[index] for index in _meanings(read.also, texts, read.labels).values()}
        if others and right not in others:
            raise InputError(
                f"{read.origin}: the answer {read.answer!r:.40}, {read.ways[0]}, is {right!r:.40}, and the other one "
                f"is {read.also!r:.40}: leave one of them out"
            )
    return Question(read.question, texts, right, is_continued=read.is_continued)


# ---- what an answer means ----


def _meanings(answer: object, texts: Sequence[str], labels: Sequence[str] | None) -> dict[str, int]:
    """Return the index of the choice meant by an answer, by way."""
    text = str(answer).strip()
    result = {TEXT: _index_of(text, texts, plain_answer), LABEL: _index_of(text, labels or (), str.casefold)}
    if letter := re.fullmatch(r"\(?([A-Ja-j])[).:]?", text):
        result[LETTER] = LETTERS.index(letter[1].upper())
    if (number := _whole(answer)) is not None:
        result |= {FROM_0: number, FROM_1: number - 1}
    return {way: index for way, index in result.items() if index is not None and 0 <= index < len(texts)}


def _index_of(answer: str, names: Sequence[str], plain: Any) -> int | None:
    """Return the index of an answer among names: of the same one, or else the only one with the same plain form."""
    if answer in names:
        return list(names).index(answer)
    # Plain forms take time, and a much longer text has another one: marks around an answer are short.
    plain_form, most = plain(answer), 24 + 2 * len(answer)
    alike = [index for index, name in enumerate(names) if len(name) <= most and plain(name) == plain_form]
    return alike[0] if len(alike) == 1 else None


def _whole(answer: object) -> int | None:
    """Return a whole number, also one stored in a table as a float or a text."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, float):
        return int(answer) if answer.is_integer() else None
    text = str(answer).strip()
    return int(text.removesuffix(".0")) if re.fullmatch(r"\d{1,4}(\.0)?", text) else None


def _final(answer: str) -> str:
    result = FINAL.findall(answer)
    return (result[-1] if result else answer).strip()


# ---- what a row has ----


def _read(origin: str, raw: Mapping[str, Any]) -> QuestionRow:
    """Return a row by its columns."""
    # A name as it is written here comes before a name equal only in small letters.
    names = sorted(raw, key=lambda name: _plain_name(name) == name)
    row = {_plain_name(name): raw[name] for name in names if not _is_missing(raw[name])}
    passages = [_passage(origin, name, row[name]) for name in PASSAGES if name in row]
    of_files = (_right_and_wrong, _endings, _goal, _blank, _cause_or_effect, _yes_or_no, _scored)
    candidates = (of_file(origin, row) for of_file in of_files)
    read = next((each for each in candidates if each is not None), None) or _by_columns(origin, row, raw)
    # A prompt may have been made of it.
    new = [each for each in passages if each not in read.question]
    return replace(read, question="\n".join([*new, read.question])) if new else read


def _by_columns(origin: str, row: Mapping[str, Any], raw: Mapping[str, Any]) -> QuestionRow:
    """Return a row by the names of its columns; `raw` has them as they are written."""
    question, choices, labels = _question_text(row), None, None
    if isinstance(nested := row.get("question"), Mapping):
        question, row = nested.get("stem"), {**row, "choices": nested.get("choices")}
    if (listed := next((row[name] for name in CHOICES if name in row), None)) is not None:
        choices, labels = _listed(origin, listed)
    elif question is not None:
        choices, labels = _in_columns(row, map(_plain_name, raw))
    if choices is None and question is not None and len(INSIDE.findall(question)) > 1:
        first, *rest = INSIDE.split(LEAD.sub("", TAIL.sub("", question)))
        question, choices, labels = first, rest[1::2], [f"answer{number}" for number in rest[::2]]
    column = next((name for name in (INDEX_COLUMN, TEXT_COLUMN, *ANSWER) if name in row), None)
    if not isinstance(question, str) or column is None:
        missing = ANSWER[:5] if isinstance(question, str) else QUESTION
        raise InputError(
            f"{origin}: no column of {', '.join(missing)}; found {', '.join(map(repr, list(raw)[:12]))}; expected a "
            "question, its answer, and for multiple choice its choices"
        )
    if not isinstance(row[column], (str, int, float)):
        raise InputError(f"{origin}: {column} is {row[column]!r:.80}; expected a text, a number, or true or false")
    if choices is None:
        _refuse_letter(origin, row, column)
        return QuestionRow(origin, question.strip(), (), row[column])
    return _chosen_by(origin, row, column, question.strip(), _checked(origin, choices, labels), labels)


def _chosen_by(
    origin: str,
    row: Mapping[str, Any],
    column: str,
    question: str,
    choices: tuple[str, ...],
    labels: Sequence[str] | None,
) -> QuestionRow:
    """Return a row with choices; some columns say by their names how the answer is meant."""
    ways: tuple[str, ...] = QuestionRow.ways
    if column == INDEX_COLUMN:
        ways = (FROM_0,)
    elif column == TEXT_COLUMN:
        ways = (TEXT,)
    elif column == "answerkey" and labels is not None:
        ways = (LABEL,)
    also = None
    if column in (INDEX_COLUMN, TEXT_COLUMN):
        also = next((row[name] for name in ANSWER if name in row), None)
    return QuestionRow(
        origin,
        question,
        choices,
        row[column],
        tuple(labels) if labels is not None else None,
        ways,
        also,
        # The Hub has numbers; a text may be a choice's.
        is_hub_mmlu=row.keys() >= MMLU and column == "answer" and len(choices) == 4 and isinstance(row[column], int),
    )


def _passage(origin: str, name: str, value: object) -> str:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in texts):
        raise InputError(f"{origin}: {name} is {value!r:.80}; expected a text, which stands before the question")
    return "\n".join(each.strip() for each in texts)


def _question_text(row: Mapping[str, Any]) -> str | None:
    texts = [row[name].strip() for name in QUESTION if isinstance(row.get(name), str)]
    # An instruction may have an input.
    has_input = {"instruction", "input"} <= row.keys() and len(texts) > 1
    return "\n".join(texts[-2:]) if has_input else next(iter(texts), None)


def _listed(origin: str, listed: object) -> tuple[list[Any], list[str] | None]:
    """Return the texts and labels of a column of choices."""
    if isinstance(listed, str):
        listed = _parsed(listed)
    if isinstance(listed, Mapping):
        texts, labels = listed.get("text"), listed.get("label")
        if isinstance(texts, Sequence) and not isinstance(texts, str) and isinstance(labels, Sequence):
            return list(texts), [str(each).strip() for each in labels]
        if not {"text", "label"} & listed.keys():
            choices = {name: text for name, text in listed.items() if text is not None}
            return list(choices.values()), [str(name).strip() for name in choices]
    elif isinstance(listed, Sequence) and listed and all(isinstance(each, Mapping) for each in listed):
        if all({"text", "label"} <= each.keys() for each in listed):
            return [each["text"] for each in listed], [str(each["label"]).strip() for each in listed]
    elif isinstance(listed, Sequence) and not isinstance(listed, str):
        return list(listed), None
    raise InputError(
        f"{origin}: choices are {listed!r:.80}; expected a list of texts, in a csv file as JSON, a mapping of labels "
        'to texts, or {"text": [...], "label": [...]}'
    )


def _parsed(text: str) -> object:
    """Return the list or mapping of a table's cell, as JSON or as Python or numpy prints it; else the text."""
    if ARRAY.fullmatch(text.strip()):
        return [ast.literal_eval(each) for each in re.findall(PRINTED, text)]
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        # Texts without a comma between them would be one text to Python.
        is_joined = read is ast.literal_eval and re.search(r"""(['"])\s*(['"])""", text)
        return text if is_joined or not isinstance(value, (list, dict)) else value
    return text


def _in_columns(row: Mapping[str, Any], names: Iterable[str]) -> tuple[list[Any] | None, list[str] | None]:
    """Return the texts and labels of choices with a column each; `None` twice where there are none.

    Args:
        row: without empty values; empty choices at the end, as in rows with fewer of them, are left out.
        names: of all columns.
    """
    endings: dict[str, dict[str, str]] = {}
    for name in names:
        if result := OPTION.fullmatch(name):
            endings.setdefault(result[1] or result[3] or "", {})[result[2] or result[4]] = name
    for named in endings.values():
        for marks in (LETTERS.lower(), "0123456789", "123456789"):
            labels = list(takewhile(named.__contains__, marks))
            if len(labels) > 1:
                values = [row.get(named[label]) for label in labels]
                while values and values[-1] is None:
                    values.pop()
                return values, [label.upper() for label in labels[: len(values)]]
    return None, None


def _checked(origin: str, choices: Sequence[Any], labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return choices as texts."""
    given = list(choices)
    texts = [str(each).strip() if isinstance(each, (str, int, float)) else "" for each in given]
    if len(texts) < 2 or not all(texts):
        raise InputError(f"{origin}: choices are {given!r:.120}; expected two or more texts, none of them empty")
    if labels is not None and (len(labels) != len(texts) or len(set(labels)) < len(labels)):
        raise InputError(f"{origin}: {len(texts)} choices have the labels {list(labels)!r:.80}; expected one for each")
    return tuple(texts)


def _refuse_letter(origin: str, row: Mapping[str, Any], column: str) -> None:
    """Refuse the letter of a choice as a written answer, where unread columns may be the choices."""
    others = [
        name
        for name, value in row.items()
        if isinstance(value, str) and name not in {*QUESTION, *PASSAGES, *ANSWER, *ABOUT, INDEX_COLUMN, TEXT_COLUMN}
    ]
    if column != TEXT_COLUMN and re.fullmatch("[A-J]", str(row[column]).strip()) and len(others) > 1:
        raise InputError(
            f"{origin}: the answer {row[column]!r} looks like the letter of a choice, and the columns "
            f"{', '.join(others[:6])} are not read: name choices A, B, ..., or a written answer {TEXT_COLUMN}"
        )


# ---- rows of well-known files ----


def _right_and_wrong(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return GPQA's row (Correct Answer, Incorrect Answer 1, ...), or SciQ's, with choices in an order of its own."""
    wrong = [row[name] for name in row if WRONG.fullmatch(name)]
    if "question" not in row or "correct_answer" not in row or not wrong:
        return None
    return _shuffled(origin, str(row["question"]), row["correct_answer"], wrong)


def _scored(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return TruthfulQA's mc1: choices with a label of 1 for the right one, and 0 for others."""
    targets = row.get("mc1_targets")
    if "question" not in row or not isinstance(targets, Mapping):
        return None
    pairs = list(targets.items())
    if {"choices", "labels"} <= targets.keys():
        sides = targets["choices"], targets["labels"]
        are_lists = all(isinstance(each, list) for each in sides) and len(sides[0]) == len(sides[1])
        pairs = list(zip(*sides, strict=True)) if are_lists else []
    right, wrong = ([text for text, score in pairs if score == each] for each in (1, 0))
    if len(right) != 1 or len(right) + len(wrong) != len(pairs):
        raise InputError(f"{origin}: mc1_targets is {targets!r:.120}; expected 1 for one choice and 0 for the others")
    return _shuffled(origin, str(row["question"]), right[0], wrong)


def _shuffled(origin: str, question: str, right: object, wrong: Iterable[object]) -> QuestionRow:
    """Return a row whose right choice is known by its column, and would always be the first."""
    choices = list(_checked(origin, [right, *wrong]))
    answer = choices[0]
    # By the row's own words: the same in every run and whichever rows are asked.
    random.Random(f"choices of {question}").shuffle(choices)
    return QuestionRow(origin, question.strip(), tuple(choices), answer, ways=(TEXT,))


def _endings(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return HellaSwag's row: a context, endings, and the index of the right one, from 0."""
    if "endings" not in row or not {"ctx", "ctx_a"} & row.keys():
        return None
    _need(origin, row, "label")
    text = str(row.get("ctx", ""))
    if "ctx_a" in row:
        more = str(row.get("ctx_b", ""))
        text = f"{row['ctx_a']} {more[:1].upper()}{more[1:]}"
    about = f"{row['activity_label']}: " if "activity_label" in row else ""
    choices, _ = _listed(origin, row["endings"])
    texts = _checked(origin, [_without_marks(str(each)) for each in choices])
    return QuestionRow(origin, _without_marks(about + text), texts, row["label"], ways=(FROM_0,), is_continued=True)


def _without_marks(text: str) -> str:
    """Return a text without WikiHow's marks, as lm-evaluation-harness asks HellaSwag."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def _goal(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return PIQA's row: a goal, two solutions, and the index of the right one, from 0."""
    if not {"goal", "sol1", "sol2"} <= row.keys():
        return None
    _need(origin, row, "label")
    return QuestionRow(
        origin, str(row["goal"]).strip(), _checked(origin, [row["sol1"], row["sol2"]]), row["label"], ways=(FROM_0,)
    )


def _blank(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return WinoGrande's row: a sentence with a blank, two options, and the number of the right one."""
    if not {"sentence", "option1", "option2"} <= row.keys():
        return None
    _need(origin, row, "answer")
    choices = _checked(origin, [row["option1"], row["option2"]])
    return QuestionRow(origin, str(row["sentence"]).strip(), choices, row["answer"], ("1", "2"), ways=(LABEL,))


def _cause_or_effect(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return COPA's row: a premise, two choices, whether cause or effect is asked, and the right one, from 0."""
    question = CAUSE_OR_EFFECT.get(str(row.get("question", "")).strip().casefold())
    if question is None or not {"premise", "choice1", "choice2"} <= row.keys():
        return None
    _need(origin, row, "label")
    return QuestionRow(
        origin, question, _checked(origin, [row["choice1"], row["choice2"]]), row["label"], ways=(FROM_0,)
    )


def _yes_or_no(origin: str, row: Mapping[str, Any]) -> QuestionRow | None:
    """Return BoolQ's row: a passage, a question, and whether its answer is yes; a label may also be 1 or 0."""
    has_choices = {*CHOICES} & row.keys() or _in_columns(row, row)[0]
    column = "answer" if "answer" in row else "label"
    answer = str(row.get(column, "")).strip().casefold()
    is_yes = next((index for index, words in enumerate(NO_OR_YES) if answer in words), None)
    if is_yes is None and column == "label" and answer in ("0", "1"):
        is_yes = int(answer)
    if not {"question", "passage"} <= row.keys() or has_choices or is_yes is None:
        return None
    return QuestionRow(origin, str(row["question"]).strip(), ("no", "yes"), NO_OR_YES[is_yes][0], ways=(TEXT,))


def _need(origin: str, row: Mapping[str, Any], column: str) -> None:
    if column not in row:
        raise InputError(f"{origin}: no {column}, which says the right choice; a test set without answers has none")


# ---- headers ----


def _without_header(path: str) -> Rows:
    """Return rows of MMLU's own files, without a header, with the usual names of their columns; of others nothing."""
    if not path.endswith((".csv", ".tsv")) or not Path(path).is_file():
        return []
    with open(path, encoding="utf-8-sig", newline="", errors="replace") as stream:
        reader = csv.reader(stream, delimiter="\t" if path.endswith(".tsv") else ",")
        first = next(reader, [])
        names = [_plain_name(name) for name in first]
        num_choices = len(first) - 2
        letters = LETTERS[:num_choices]
        is_row = len(letters) > 1 and first[-1].strip() in [*letters] and not {*QUESTION, *ANSWER} & {*names}
        if not is_row:
            return []
        result = [(number, each) for number, each in zip(count(1), [first, *reader], strict=False) if each]
    header = ["question", *letters, "answerKey"]
    for number, each in result:
        if len(each) != len(header) or each[-1].strip() not in letters:
            raise InputError(
                f"{path}, row {number}: the file has no header, as MMLU's; expected a question, {num_choices} choices "
                f"and a letter up to {letters[-1]}, got {each!r:.120}"
            )
    return [(f"{path}, row {number}", dict(zip(header, each, strict=True))) for number, each in result]


def _plain_name(name: object) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


# ---- the suite ----

FLAG = "--few_shot_files"
# The parts of an answer: numbers, words, and signs; only mathematical signs count.
PART = re.compile(rf"(?P<number>{NUMBER.pattern})|(?P<word>[^\W\d_]+|\w)|(?P<sign>[^\w\s])")
OPERATORS = frozenset("-*/^")


def iter_scored(
    suite: Suite, subject: Subject, items: Sequence[Item[Question]]
) -> Iterator[tuple[Item[Question], list[Likelihood] | None]]:
    """Yield items with how likely their choices are; `None` for one too long for the context.

    Args:
        suite: theirs.
        subject: the model.
        items: questions with the same worked examples, read only once.
    """
    result = subject.iter_choices(
        [asked_as(subject, item.body) for item in items],
        [[subject.space + each for each in item.body.choices] for item in items],
        shared=shared_of(subject, items[0].body) if items else "",
        names=[suite.name_of(item) for item in items],
    )
    yield from zip(items, result, strict=True)


class FewShot(Suite[Question]):
    """Questions of local files, a group each.

    Args:
        paths: the files.
        num_items: questions per file, from the first after the worked examples; all by default.
        num_shots: number of first rows per file used as worked examples, and not asked.
        max_new_tokens: longest written answer.
    """

    name: ClassVar[str] = "few_shot"
    better: ClassVar[Mapping[str, int]] = dict.fromkeys(("acc", "acc_norm", "exact_match"), 1)
    primary: ClassVar[Sequence[str]] = ("acc", "exact_match")

    def __init__(
        self, paths: Sequence[str], num_items: int | None = None, num_shots: int = 0, max_new_tokens: int = 64
    ):
        self.paths, self.num_items, self.num_shots = list(paths), num_items, num_shots
        self.max_new_tokens = max_new_tokens

    def items(self) -> list[Item[Question]]:
        return [item for path in self.paths for item in self._of_file(path)]

    def _of_file(self, path: str) -> list[Item[Question]]:
        questions = read_questions(path, FLAG)
        rows, shots = len(questions), self.num_shots
        refuse_if(rows <= shots, f"--num_shots {shots}: {path} has {rows} rows, expected more, to ask some")
        shots = tuple((each.question, each.answer) for each in questions[: self.num_shots])
        group = Path(path).name.split(".")[0]
        selected = questions[self.num_shots :][: self.num_items]
        return [
            Item(f"{group}-{number}", group, replace(each, shots=shots))
            for number, each in enumerate(selected, self.num_shots + 1)
        ]

    def judge(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        for shots in dict.fromkeys(item.body.shots for item in items):
            of_shots = [item for item in items if item.body.shots == shots]
            yield from self._choose(subject, [item for item in of_shots if item.body.choices])
            yield from self._write(subject, [item for item in of_shots if not item.body.choices])

    def _choose(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        if not items:
            return
        for item, scored in iter_scored(self, subject, items):
            if scored is None:
                yield self.record(subject, item, asked=item.body.question, skipped=TOO_LONG)
                continue
            logprobs = [each.logprob for each in scored]
            choices, right = item.body.choices, item.body.choices.index(item.body.answer)
            plain = chosen(logprobs)
            by_length = [number / len(each) for number, each in zip(logprobs, choices, strict=True)]
            scores = {"acc": float(plain == right), "acc_norm": float(chosen(by_length) == right)}
            yield self.record(subject, item, scores, item.body.question, choices[plain])

    def _write(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        answers = subject.iter_answers([asked_as(subject, item.body) for item in items], self.max_new_tokens)
        for item, answer in zip(items, answers, strict=True):
            if answer is None:
                yield self.record(subject, item, asked=item.body.question, skipped=TOO_LONG)
                continue
            if not subject.uses_chat_template:
                answer = answer.split("\nQuestion:")[0].strip()
            scores = {"exact_match": float(same_answer(answer, item.body.answer))}
            yield self.record(subject, item, scores, item.body.question, answer)


def same_answer(answer: str, right: str) -> bool:
    """Return whether a written answer is the right one, as a whole or by its last number or letter in brackets.

    Numbers are equal as they are to the reward `exact_match`: `1,007` is `1007` and `1/2` is `0.5`, but `5` is not
    `-5`. Of words, case and punctuation do not count.
    """
    answer, right = _with_plain_signs(answer), _with_plain_signs(right)
    if _is_number(right):
        return plain_answer(final_answer(answer)) == plain_answer(right)
    if _plain(answer) == _plain(right):
        return True
    if re.fullmatch(r"\([A-Z]\)", right):
        return re.findall(r"\([A-Z]\)", answer)[-1:] == [right]
    # An answer of a word or two given in a sentence.
    return _plain(answer.strip().split("\n")[0]) == _plain(right)


def _is_number(text: str) -> bool:
    """Return whether a text is one number, a fraction, or a number of a currency or percent."""
    if re.search(r"\d,?\s+\d", text) and not NUMBER.fullmatch(text.strip()):
        return False
    plain = plain_answer(text)
    return bool(PLAIN_NUMBER.fullmatch(plain) or FRACTION.fullmatch(plain))


def _with_plain_signs(text: str) -> str:
    """Return a text with the usual minus, and a space after commas other than thousands separators."""
    return re.sub(r"(?<=\d),(?!\d{3}(?!\d))", ", ", text.replace("\u2212", "-"))


def _plain(text: str) -> list[str]:
    """Return the relevant parts of an answer: words in small letters, numbers in one form, and signs of mathematics.

    An operator counts between or before numbers and single letters; `well-known` and `**bold**` have none.
    """
    parts = list(PART.finditer(text.lower()))
    tokens = []
    for index, part in enumerate(parts):
        before, after = parts[index - 1 : index] if index else [], parts[index + 1 : index + 2]
        if part["number"]:
            tokens.append(plain_answer(part[0]))
        elif part["word"] or unicodedata.category(part[0]) == "Sm":
            tokens.append(part[0])
        elif part[0] in OPERATORS and after and _is_operand(after[0]):
            is_unary = part[0] == "-" and part.end() == after[0].start() and (not before or before[0]["sign"])
            if is_unary or (before and (_is_operand(before[0]) or before[0][0] == ")")):
                tokens.append(part[0])
    return tokens


def _is_operand(part: re.Match) -> bool:
    return bool(part["number"] or (part["word"] and len(part[0]) == 1) or part[0] == "(")


def asked_as(subject: Subject, body: Question) -> Prompt:
    """Return a question after its worked examples, as the subject reads it."""
    if subject.uses_chat_template:
        return [*turns_of(body.shots), {"role": "user", "content": body.question}]
    question = body.question if body.is_continued else f"Question: {body.question}\nAnswer:"
    return f"{shared_of(subject, body)}{question}"


def shared_of(subject: Subject, body: Question) -> Prompt:
    """Return the worked examples before a question."""
    if subject.uses_chat_template:
        return turns_of(body.shots)
    pattern = "{} {}\n\n" if body.is_continued else "Question: {}\nAnswer: {}\n\n"
    return "".join(pattern.format(*shot) for shot in body.shots)

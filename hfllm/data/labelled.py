"""Rows with labels: of whole texts, of words, and of spans of a text that answer questions.

Every reader maps one row of a dataset, and refuses one that it cannot read, naming its origin and its columns:

    text-classification    text, label; also text_pair
    token-classification   words, tags: lists, or text with spaces between them
    question-answering     context, question, answers (SQuAD: text and answer_start, a list of each); none: no answer

All rows get `prompt`, by which a held-out part is split off: rows with the same one stay together.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfllm.data.rows import BadRow
from hfllm.errors import InputError

Row = Mapping[str, Any]
TEXT, WORDS, SPANS = TASKS = ("text-classification", "token-classification", "question-answering")
COLUMNS = {
    TEXT: ("text", "label", "text_pair"),
    WORDS: ("words", "tags"),
    SPANS: ("context", "question", "answers", "id"),
}
OPTIONAL = ("text_pair", "id")
NO_TEXT, NO_LABEL, MISPLACED = "without a text", "without a label", "whose answer is not at its place"


def reader_of(task: str, class_names: Sequence[str] | None = None) -> Callable[[str, Row], dict[str, Any]]:
    """Return the function that reads a row of a task, given its origin.

    Args:
        task: one of `TASKS`.
        class_names: names of labels that the rows write as numbers from 0, as datasets of the Hub do.
    """

    def named(origin: str, label: object) -> str:
        text = str(label).strip()
        if not class_names:
            return text
        if text in class_names:
            return text
        if not text.isdecimal() or int(text) >= len(class_names):
            raise InputError(
                f"{origin}: label {text!r} is neither one of --class_names ({', '.join(class_names)}) nor a number "
                f"from 0 to {len(class_names) - 1}"
            )
        return class_names[int(text)]

    def read(origin: str, row: Row) -> dict[str, Any]:
        for column in COLUMNS[task]:
            if column not in row and column not in OPTIONAL:
                raise InputError(
                    f"{origin}: no column {column!r} for {task}; there are: {', '.join(row)}; name it by "
                    f"--column_mapping {column}=..."
                )
        if task == SPANS:
            return _span_row(origin, row)
        return _text_row(origin, row, named) if task == TEXT else _word_row(origin, row, named)

    return read


def _text_row(origin: str, row: Row, named: Callable[[str, object], str]) -> dict[str, Any]:
    text, pair, label = row["text"], row.get("text_pair"), row["label"]
    if not isinstance(text or "", str):
        raise InputError(f"{origin}: text is {type(text).__name__}; expected a string")
    if not (text or "").strip():
        raise BadRow(f"{origin}: a row {NO_TEXT}", NO_TEXT)
    if label is None or not str(label).strip():
        raise BadRow(f"{origin}: a row {NO_LABEL}", NO_LABEL)
    if isinstance(label, list | dict):
        raise InputError(f"{origin}: label is {type(label).__name__}; expected one label: a string or a number")
    prompt = text if not pair else f"{text}\n{pair}"
    return {"prompt": prompt, "text": text, "text_pair": pair or None, "label": named(origin, label)}


def _word_row(origin: str, row: Row, named: Callable[[str, object], str]) -> dict[str, Any]:
    words, tags = (_as_list(origin, row, column) for column in ("words", "tags"))
    if len(words) != len(tags):
        raise InputError(f"{origin}: {len(words)} words and {len(tags)} tags; expected a tag for each word")
    if not words:
        raise BadRow(f"{origin}: a row {NO_TEXT}", NO_TEXT)
    words = [str(word).strip() for word in words]
    if not all(words):
        raise InputError(f"{origin}: word {words.index('') + 1} of {len(words)} is empty")
    return {"prompt": " ".join(words), "words": words, "tags": [named(origin, tag) for tag in tags]}


def _as_list(origin: str, row: Row, column: str) -> list[Any]:
    value = row[column]
    if isinstance(value, str):
        value = _from_json(origin, column, value) if value.lstrip().startswith("[") else value.split()
    if not isinstance(value, list):
        kind = type(value).__name__
        raise InputError(f"{origin}: {column} is {kind}; expected a list, or text with spaces between its parts")
    return value


def _span_row(origin: str, row: Row) -> dict[str, Any]:
    context, question = (str(row[column] or "") for column in ("context", "question"))
    if not context.strip() or not question.strip():
        raise BadRow(f"{origin}: a row {NO_TEXT}", NO_TEXT)
    texts, starts = _answers(origin, row["answers"])
    for text, start in zip(texts, starts, strict=True):
        if not text or context[start : start + len(text)] != text:
            raise BadRow(f"{origin}: a row {MISPLACED}: {text[:40]!r} is not at {start} of its context", MISPLACED)
    return {"prompt": context, "context": context, "question": question.strip(), "texts": texts, "starts": starts}


def _answers(origin: str, answers: object) -> tuple[list[str], list[int]]:
    """Return texts and places of answers in either of SQuAD's forms: lists in an object, or a list of objects."""
    if isinstance(answers, str):
        answers = _from_json(origin, "answers", answers) if answers.strip() else []
    if isinstance(answers, list) and all(isinstance(each, dict) for each in answers):
        answers = {name: [each.get(name) for each in answers] for name in ("text", "answer_start")}
    texts, starts = (answers.get(name) for name in ("text", "answer_start")) if isinstance(answers, dict) else (0, 0)
    is_whole = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    if not is_whole or not all(isinstance(each, str) for each in texts):
        raise InputError(f"{origin}: answers need text and answer_start, lists of one length; got {answers!r:.80}")
    try:
        return list(texts), [int(start) for start in starts]
    except (TypeError, ValueError):
        raise InputError(f"{origin}: answer_start must be whole numbers, got {starts!r:.80}") from None


def _from_json(origin: str, column: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{origin}: {column} is not JSON ({error}): {text[:60]!r}") from None


def labels_of(task: str, rows: Sequence[Row], class_names: Sequence[str] | None = None) -> list[str]:
    """Return the labels that rows have, in the order of `class_names` or of the alphabet; none for spans.

    Raises:
        InputError: when all rows have the same one.
    """
    if task == SPANS:
        return []
    found = {row["label"] for row in rows} if task == TEXT else {tag for row in rows for tag in row["tags"]}
    if len(found) < 2:
        raise InputError(f"all rows have the label {next(iter(found), '')!r}; at least 2 different ones are needed")
    return [*class_names] if class_names else sorted(found)

"""Rows with labels, of whole texts, of words, of answer spans and of the steps of a solution, and their tokens.

Every reader maps one row of a dataset, and refuses an unreadable one, naming its origin and its columns:

    text-classification    text, label; also text_pair
    token-classification   words, tags: lists, or text with spaces between them
    question-answering     context, question, answers (SQuAD: text and answer_start, a list of each); none: no answer

All rows get `prompt`, the key for splitting off a held-out part: rows with the same one stay together.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import BadRow, as_messages, prompt_of
from hfllm.data.packing import IGNORE
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- rows ----


Row = Mapping[str, Any]
TEXT, WORDS, SPANS = TASKS = ("text-classification", "token-classification", "question-answering")
COLUMNS = {
    TEXT: ("text", "label", "text_pair"),
    WORDS: ("words", "tags"),
    SPANS: ("context", "question", "answers", "id"),
}
OPTIONAL = ("text_pair", "id")
# More labels than this, almost all of which occur once, are ids or texts; more with fractions are measurements.
MOST_LABELS, MOST_NUMBERS = 50, 20
NO_TEXT, NO_LABEL, MISPLACED = "without a text", "without a label", "whose answer is not at its place"


def reader_of(task: str, class_names: Sequence[str] | None = None) -> Callable[[str, Row], dict[str, Any]]:
    """Return the function for reading a row of a task, given its origin.

    Args:
        task: one of `TASKS`.
        class_names: names of labels that the rows write as numbers from 0, as datasets of the Hub do.
    """

    def named(origin: str, label: object) -> str:
        text = str(label).strip()
        if not class_names or text in class_names:
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
    refuse_if(not isinstance(text or "", str), f"{origin}: text is {type(text).__name__}; expected a string")
    if not (text or "").strip():
        raise BadRow(f"{origin}: a row {NO_TEXT}", NO_TEXT)
    if label is None or not str(label).strip() or str(label).strip().lower() == "nan":
        raise BadRow(f"{origin}: a row {NO_LABEL}", NO_LABEL)
    if isinstance(label, list | dict):
        raise InputError(f"{origin}: label is {type(label).__name__}; expected one label: a string or a number")
    prompt = text if not pair else f"{text}\n{pair}"
    return {"prompt": prompt, "text": text, "text_pair": pair or None, "label": named(origin, label)}


def _has_fraction(label: object) -> bool:
    """Return whether a label is a number such as 3.7, also in a csv file."""
    try:
        number = float(str(label))
    except ValueError:
        return False
    return math.isfinite(number) and not number.is_integer()


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
    """Return texts and positions of answers in either of SQuAD's forms: lists in an object, or a list of objects."""
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
    """Return the labels of rows, in the order of `class_names` or of the alphabet; none for spans.

    Raises:
        InputError: when all rows have the same one.
    """
    if task == SPANS:
        return []
    result = {row["label"] for row in rows} if task == TEXT else {tag for row in rows for tag in row["tags"]}
    if task == TEXT and not class_names and len(result) > 1:
        _refuse_no_classes(Counter(row["label"] for row in rows))
    if len(result) < 2:
        raise InputError(f"all rows have the label {next(iter(result), '')!r}; at least 2 different ones are needed")
    return [*class_names] if class_names else sorted(result)


def _refuse_no_classes(counts: Counter[str]) -> None:
    """Refuse labels that are measurements, or almost all different."""
    first, total, once = min(counts), counts.total(), [*counts.values()].count(1)
    words = f"{total:,} rows have {len(counts):,} different labels, such as {first!r}"
    advice = "Name another column by --column_mapping label=..., or name the classes by --class_names"
    if len(counts) > MOST_NUMBERS and any(map(_has_fraction, counts)):
        raise InputError(f"{words}, numbers with fractions: expected the names or numbers of classes. {advice}")
    if len(counts) > MOST_LABELS and once >= 0.9 * total:
        raise InputError(f"{words}: is it an id, or a text? {advice}")


# ---- tokens with labels ----
#
# Tokens of rows with labels: of texts, of words with a label on one token each, and windows of long contexts.
#
# Every encoded row has `input_ids` and `labels`; the end token comes last, since a causal model has read everything
# only there. Rows with tokens of the tokenizer at the beginning or end, such as BERT's, keep them.


Encoded = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """A part of a context, with its question before it.

    Args:
        row: the number of its row.
        offsets: of each token the position of its text in the context, `None` for one outside of the context.
    """

    row: int
    offsets: tuple[tuple[int, int] | None, ...]


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot give the positions of its tokens in the text."""
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} does not say where tokens are in a text: a fast one is needed")


def encode_texts(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, labels: Sequence[str]
) -> tuple[list[Encoded], int]:
    """Return texts as tokens, each with the number of its label, and how many of them are cut to `max_length`."""
    encoded, cut, numbers = [], 0, {name: number for number, name in enumerate(labels)}
    for row in rows:
        ids = tokenizer(row["text"], row["text_pair"], verbose=False)["input_ids"]
        ids, is_cut = _with_end(ids, tokenizer, max_length)
        cut += is_cut
        encoded.append({"input_ids": ids, "labels": numbers[row["label"]]})
    return encoded, cut


def encode_words(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Sequence[str],
    label_token: str = "first",
) -> tuple[list[Encoded], list[list[int]]]:
    """Return words as tokens, and for each row the index of the token that stands for each word.

    Args:
        rows: with `words` and `tags`.
        labels: the names of all tags.
        label_token: which token of a word has its label: the `first`, as is usual, or the `last`, at which a causal
            model has read the whole word. Other tokens have none (-100).

    Returns:
        The rows, and the indices; -1 for a word that is cut off.
    """
    numbers, encoded, indices = {name: number for number, name in enumerate(labels)}, [], []
    for row in rows:
        result = tokenizer(" ".join(row["words"]), return_offsets_mapping=True, verbose=False)
        ids, _ = _with_end(result["input_ids"], tokenizer, max_length)
        index = _token_indices(row["words"], result["offset_mapping"], len(ids) - 1, label_token == "last")
        targets = [IGNORE] * len(ids)
        for where, tag in zip(index, row["tags"], strict=True):
            if where >= 0:
                targets[where] = numbers[tag]
        encoded.append({"input_ids": ids, "labels": targets})
        indices.append(index)
    return encoded, indices


def _token_indices(words: Sequence[str], offsets: Sequence[tuple[int, int]], most: int, takes_last: bool) -> list[int]:
    """Return for each word the index of its first or last token among the first `most`; -1 where there is none."""
    indices, begin, token = [], 0, 0
    for word in words:
        end = begin + len(word)
        # A token may begin with the space before its word, and others are of no text.
        while token < len(offsets) and (offsets[token][1] <= begin or offsets[token][0] == offsets[token][1]):
            token += 1
        last = token
        while last + 1 < len(offsets) and begin < offsets[last + 1][1] and max(offsets[last + 1][0], begin) < end:
            last += 1
        is_there = token < len(offsets) and offsets[token][0] < end
        where = last if takes_last else token
        indices.append(where if is_there and where < most else -1)
        token, begin = (last + 1 if is_there else token), end + 1
    return indices


def _with_end(ids: list[int], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> tuple[list[int], bool]:
    """Return ids with a special token at the end, cut to a length, and whether they were cut."""
    special = set(tokenizer.all_special_ids)
    end = ids[-1] if ids and ids[-1] in special else tokenizer.eos_token_id
    text = ids[:-1] if ids and ids[-1] in special else ids
    return [*text[: max_length - 1], end], len(text) > max_length - 1


def encode_spans(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", max_length: int, stride: int
) -> tuple[list[Encoded], list[Window]]:
    """Return the windows of all rows, a question and a part of its context each.

    `labels` are the indices of the first and the last token of the answer; of the end token, twice, in a window
    without the whole answer. A causal model knows only there that there was none.

    Args:
        rows: with `context`, `question`, and answers as `texts` and `starts`; the first one is learned.
        max_length: the longest window, in tokens.
        stride: how many tokens two neighboring windows share.

    Raises:
        InputError: when a question leaves no room for its context.
    """
    encoded, windows = [], []
    for number, row in enumerate(rows):
        head, tail = _question(row["question"], tokenizer)
        room = max_length - len(head) - len(tail)
        result = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = result["input_ids"], [tuple(each) for each in result["offset_mapping"]]
        if room <= stride:
            raise InputError(
                f"a question of {len(head)} tokens leaves {room} of --max_length {max_length} for its context; more "
                f"than --doc_stride {stride} are needed: {row['question'][:60]!r}"
            )
        for begin in range(0, max(len(ids) - stride, 1), room - stride):
            part = slice(begin, begin + room)
            window_offsets = (*[None] * len(head), *offsets[part], *[None] * len(tail))
            whole = [*head, *ids[part], *tail]
            labels = _span_labels(row, window_offsets) or [len(whole) - 1] * 2
            encoded.append({"input_ids": whole, "labels": labels})
            windows.append(Window(number, window_offsets))
    return encoded, windows


def _question(question: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the tokens before and after a context: the ones of a tokenizer of pairs, or a new line and the end."""
    mark = tokenizer.eos_token_id
    alone = tokenizer(question, add_special_tokens=False)["input_ids"]
    pair = tokenizer(question, question)
    sides = pair.sequence_ids(0)
    if len(pair["input_ids"]) == 2 * len(alone) or None not in sides:
        return tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"], [mark]
    second = sides.index(1)
    tail = pair["input_ids"][second + sides.count(1) :]
    return pair["input_ids"][:second], tail or [mark]


def _span_labels(row: Row, offsets: Sequence[tuple[int, int] | None]) -> list[int] | None:
    """Return the indices of the first and the last token of the answer, `None` where it is not whole in the window."""
    if not row["texts"]:
        return None
    begin, end = row["starts"][0], row["starts"][0] + len(row["texts"][0])
    inside = [index for index, each in enumerate(offsets) if each and each[1] > begin and each[0] < end]
    if not inside or offsets[inside[-1]][1] < end or offsets[inside[0]][0] > begin:
        return None
    return [inside[0], inside[-1]]


# ---- steps ----
#
# Solutions whose steps are labeled right or wrong. A row gets `prompt`, `response`, the solution as a model writes it,
# and `labels`, the probability of each step to be right.


STEP_FORMATS = (
    "prompt + completions + labels (a list of steps, and whether each is right: true, false, or a number from 0 to 1)",
    "question + label with steps (PRM800K)",
    "input + label with + and - at the end of steps (Math-Shepherd)",
)
# The mark in Math-Shepherd's `input` where its `label` has + or -.
STEP_MARK = "\N{CYRILLIC SMALL LETTER KA}\N{CYRILLIC SMALL LETTER I}"
RIGHTNESS = {"+": 1.0, "-": 0.0}
UNMARKED, UNLIKE = "with a last step without a mark", "whose label does not repeat its input"
NO_BEGINNING = "without 'Step 1:' behind the problem"
NO_STEP, NO_STEP_LABEL = "without a step", "with a step without a label"


def to_steps(origin: str, row: Row) -> dict[str, Any]:
    """Convert a row to `prompt`, `response` and `labels`.

    Each step becomes a line of the response; line breaks inside of it become spaces.

    Raises:
        BadRow: for one without a step, or with a step without a label.
        InputError: when the row cannot be read.
    """
    if isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict):
        prompt, steps, labels = _prm800k(origin, row)
    elif isinstance(row.get("input"), str) and isinstance(row.get("label"), str):
        prompt, steps, labels = _math_shepherd(origin, row)
    elif isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
        rest = {name: value for name, value in row.items() if name not in ("completions", "labels")}
        prompt, steps, labels = prompt_of(origin, rest), row["completions"], row["labels"]
    else:
        raise InputError(
            f"{origin}: columns {', '.join(row) or '(none)'}; expected one of: {'; '.join(STEP_FORMATS)}; name others "
            "by --column_mapping OURS=THEIRS"
        )
    if len(steps) != len(labels):
        raise InputError(f"{origin}: {len(steps)} steps and {len(labels)} labels; expected one for each step")
    if wrong := [step for step in steps if not isinstance(step, str)]:
        raise InputError(f"{origin}: the step {wrong[0]!r} is no text")
    kept = [
        (" ".join(step.split()), _rightness(origin, label))
        for step, label in zip(steps, labels, strict=True)
        if step.strip()
    ]
    if not kept:
        raise BadRow(f"{origin}: {NO_STEP}", NO_STEP)
    lines, rightness = zip(*kept, strict=True)
    return {"prompt": as_messages(prompt), "response": "\n".join(lines), "labels": list(rightness)}


def _rightness(origin: str, label: object) -> float:
    if label is None:
        raise BadRow(f"{origin}: {NO_STEP_LABEL}", NO_STEP_LABEL)
    if isinstance(label, str) and label.strip() in RIGHTNESS:
        return RIGHTNESS[label.strip()]
    if isinstance(label, (bool, int, float)) and 0 <= label <= 1:
        return float(label)
    raise InputError(f"{origin}: the label {label!r} of a step; expected true, false, or a number from 0 to 1")


def _prm800k(origin: str, row: Row) -> tuple[str, list[Any], list[Any]]:
    """Read PRM800K (Lightman et al. 2023): of each step the answer that was gone on with, else the first rated one.

    A neutral rating, 0, counts as right, as in the paper (section 2.6). Steps behind a wrong one are no part of the
    solution.
    """
    problem, told = row["question"].get("problem"), row["label"].get("steps")
    if not isinstance(problem, str) or not isinstance(told, list):
        raise InputError(f"{origin}: question has no problem, or label no steps")
    steps: list[Any] = []
    labels: list[Any] = []
    for each in told:
        each = each if isinstance(each, dict) else {}
        completions, chosen = each.get("completions") or [], each.get("chosen_completion")
        if isinstance(chosen, int) and 0 <= chosen < len(completions):
            step = completions[chosen]
        elif each.get("human_completion"):
            step = each["human_completion"]
            # A person has written it, as right, and no rating beside it.
            step = {"text": step, "rating": 1} if isinstance(step, str) else {**step, "rating": 1}
        elif completions:
            step = completions[0]
        else:
            break
        if not isinstance(step, dict) or not isinstance(step.get("rating"), (int, type(None))):
            raise InputError(f"{origin}: the step {step!r} has no text with a rating of -1, 0 or 1")
        rating = step.get("rating")
        steps.append(step.get("text"))
        labels.append(None if rating is None else float(rating >= 0))
        if labels[-1] == 0.0:
            break
    return problem, steps, labels


def _math_shepherd(origin: str, row: Row) -> tuple[str, list[str], list[str]]:
    """Read Math-Shepherd (Wang et al. 2023, arXiv:2312.08935): the label repeats the input with + and - for marks."""
    *parts, rest = row["input"].split(STEP_MARK)
    if not parts:
        raise InputError(f"{origin}: input has no {STEP_MARK!r} at the end of its steps")
    if rest.strip():
        raise BadRow(f"{origin}: {UNMARKED}", UNMARKED)
    label, labels = row["label"], []
    for part in parts:
        if not label.startswith(part) or label[len(part) : len(part) + 1] not in RIGHTNESS:
            raise BadRow(f"{origin}: {UNLIKE} (+ or - in place of {STEP_MARK!r})", UNLIKE)
        labels.append(label[len(part)])
        label = label[len(part) + 1 :]
    begin = re.search(r"\bstep 1:", parts[0], re.I)
    if begin is None:
        raise BadRow(f"{origin}: {NO_BEGINNING}", NO_BEGINNING)
    return parts[0][: begin.start()].strip(), [parts[0][begin.start() :], *parts[1:]], labels


def encode_steps(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    ends_of: Callable[[Sequence[int]], Sequence[int]],
    max_length: int | None,
) -> tuple[list[dict[str, list]], int]:
    """Return rows as tokens with a label at each token that ends a step, and how many rows are left out.

    Those are longer than `max_length` tokens, or have other steps as tokens than labels.

    Args:
        ends_of: from a response's tokens the indices of those that end a step.
    """
    before = tokenize_prompts([row["prompt"] for row in rows], tokenizer)
    encoded = []
    for prompt, row in zip(before, rows, strict=True):
        response = tokenizer(row["response"], add_special_tokens=False, verbose=False)["input_ids"]
        ends, length = ends_of(response), len(prompt) + len(response)
        if len(ends) != len(row["labels"]) or len({*ends}) < len(ends) or length > (max_length or length):
            continue
        labels: list[float] = [IGNORE] * length
        for end, label in zip(ends, row["labels"], strict=True):
            labels[len(prompt) + end] = label
        encoded.append({"input_ids": [*prompt, *response], "labels": labels})
    return encoded, len(rows) - len(encoded)

"""Multiple choice and exact match from local files, with worked examples from the same file or without.

Rows are recognized by their columns: a question with a list of choices and the right one (ARC, MMLU and their like), a
question whose text holds `Answer1: ... Answer2: ...`, or a question and the answer that must be written.

    acc        the right choice is the likeliest
    acc_norm   the same, each log-likelihood divided by the choice's characters (lm-eval's `acc_norm`)
    exact_match   the written answer is the right one, apart from case, punctuation and what stands before its number
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hfllm.errors import InputError
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Suite
from hfllm.evaluation.suites.choices import chosen
from hfllm.evaluation.suites.files import rows_of
from hfllm.evaluation.suites.likelihood import Likelihood
from hfllm.evaluation.suites.subjects import Prompt, Subject

FLAG = "--few_shot_files"
QUESTION, CHOICES, ANSWER = (
    ("question", "prompt", "instruction", "input"),
    ("choices", "options"),
    ("answer", "answerKey", "gold", "label", "target"),
)
# Choices inside a question's text, and what comes before and after.
INSIDE = re.compile(r"\s*\bAnswer ?(\d+):\s*")
LEAD, TAIL = re.compile(r"^Please choose the correct answer to the question:\s*"), re.compile(r"\n+Answer format:.*$")
FINAL = re.compile(r"####\s*(.+)")


@dataclass(frozen=True)
class Question:
    """A question to choose or write the answer of.

    Args:
        question: its text.
        choices: to choose from; empty where the answer is written.
        answer: the right choice or text.
        shots: worked examples before it, question and answer each.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    shots: tuple[tuple[str, str], ...] = ()


def iter_scored(
    suite: str, subject: Subject, items: Sequence[Item[Question]]
) -> Iterator[tuple[Item[Question], list[Likelihood] | None]]:
    """Yield each item with how likely its choices are; `None` for one that does not fit the context.

    Args:
        suite: its name, for errors.
        subject: the model.
        items: questions with the same worked examples, which are read once.
    """
    space = "" if subject.uses_chat_template else " "
    found = subject.iter_choices(
        [asked_as(subject, item.body) for item in items],
        [[space + each for each in item.body.choices] for item in items],
        shared=shared_of(subject, items[0].body.shots) if items else "",
        names=[f"{suite}, item {item.key}" for item in items],
    )
    yield from zip(items, found, strict=True)


class FewShot(Suite[Question]):
    """Questions of local files, a group each.

    Args:
        paths: the files.
        num_items: questions of each, from the first after the worked examples; all by default.
        num_shots: of each file so many first rows are worked examples, and not asked.
        max_new_tokens: longest written answer.
    """

    name: ClassVar[str] = "few_shot"
    better: ClassVar[Mapping[str, int]] = dict.fromkeys(("acc", "acc_norm", "exact_match"), 1)

    def __init__(
        self, paths: Sequence[str], num_items: int | None = None, num_shots: int = 0, max_new_tokens: int = 64
    ):
        self.paths, self.num_items, self.num_shots = list(paths), num_items, num_shots
        self.max_new_tokens = max_new_tokens

    def items(self) -> list[Item[Question]]:
        return [item for path in self.paths for item in self._of_file(path)]

    def _of_file(self, path: str) -> list[Item[Question]]:
        questions = [question_of(origin, row) for origin, row in rows_of(path, (), FLAG)]
        if len(questions) <= self.num_shots:
            raise InputError(
                f"--num_shots {self.num_shots}: {path} has {len(questions)} rows, expected more, to ask some"
            )
        shots = tuple((each.question, each.answer) for each in questions[: self.num_shots])
        group = Path(path).name.split(".")[0]
        asked = questions[self.num_shots :][: self.num_items]
        return [
            Item(f"{group}-{number}", group, Question(each.question, each.choices, each.answer, shots))
            for number, each in enumerate(asked, self.num_shots + 1)
        ]

    def judge(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        for shots in dict.fromkeys(item.body.shots for item in items):
            of_shots = [item for item in items if item.body.shots == shots]
            yield from self._choose(subject, [item for item in of_shots if item.body.choices])
            yield from self._write(subject, [item for item in of_shots if not item.body.choices])

    def _choose(self, subject: Subject, items: Sequence[Item[Question]]) -> Iterator[Record]:
        if not items:
            return
        for item, scored in iter_scored(self.name, subject, items):
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
        said = subject.iter_answers([asked_as(subject, item.body) for item in items], self.max_new_tokens)
        for item, answer in zip(items, said, strict=True):
            if answer is None:
                yield self.record(subject, item, asked=item.body.question, skipped=TOO_LONG)
                continue
            if not subject.uses_chat_template:
                answer = answer.split("\nQuestion:")[0].strip()
            scores = {"exact_match": float(same_answer(answer, item.body.answer))}
            yield self.record(subject, item, scores, item.body.question, answer)


def question_of(origin: str, row: Mapping[str, Any]) -> Question:
    """Return the question of a row, by the columns that it has.

    Raises:
        InputError: naming the row and what it lacks.
    """
    texts = [row[name].strip() for name in QUESTION if isinstance(row.get(name), str) and row[name].strip()]
    # An instruction may have an input that it is about.
    has_input = {"instruction", "input"} <= row.keys() and len(texts) > 1
    question = "\n".join(texts[-2:]) if has_input else next(iter(texts), None)
    choices = next((row[name] for name in CHOICES if row.get(name) is not None), None)
    answer = next((row[name] for name in ANSWER if row.get(name) is not None), None)
    if question is None or answer is None:
        missing = QUESTION if question is None else ANSWER
        raise InputError(
            f"{origin}: no column of {', '.join(missing)}; found {', '.join(map(repr, list(row)[:12]))}; expected a "
            "question, its answer, and for multiple choice its choices"
        )
    labels: list[str] | None = None
    if isinstance(choices, Mapping):
        labels, choices = [str(each) for each in choices.get("label", ())], choices.get("text")
    if choices is None and len(INSIDE.findall(question)) > 1:
        first, *rest = INSIDE.split(LEAD.sub("", TAIL.sub("", question)))
        question, choices, labels = first, rest[1::2], [f"answer{number}" for number in rest[::2]]
    if choices is None:
        return Question(question.strip(), (), _final(str(answer)))
    texts = [str(each).strip() for each in choices]
    place = _place(answer, texts, labels)
    if len(texts) < 2 or place is None:
        raise InputError(f"{origin}: the answer {answer!r:.40} is none of the choices {texts!r:.120}")
    return Question(question.strip(), tuple(texts), texts[place])


def _place(answer: object, texts: list[str], labels: list[str] | None) -> int | None:
    """Return which choice an answer means: a label, a letter, a number from 0, or its text."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    said = str(answer).strip()
    for named in (labels, texts, [chr(ord("A") + place) for place in range(len(texts))], None):
        names = [str(place) for place in range(len(texts))] if named is None else named
        if said in names:
            return names.index(said)
    return None


def _final(answer: str) -> str:
    found = FINAL.findall(answer)
    return (found[-1] if found else answer).strip()


def same_answer(said: str, right: str) -> bool:
    """Return whether a written answer is the right one, as a whole or by its last number or letter in brackets."""
    if _plain(said) == _plain(right):
        return True
    if re.fullmatch(r"-?[\d,.]+", right):
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", said)
        return bool(numbers) and _number(numbers[-1]) == _number(right)
    if re.fullmatch(r"\([A-Z]\)", right):
        return re.findall(r"\([A-Z]\)", said)[-1:] == [right]
    # An answer of a word or two that a sentence gives.
    first = said.strip().split("\n")[0]
    return _plain(first) == _plain(right)


def _number(text: str) -> float:
    return float(text.replace(",", "").rstrip("."))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def asked_as(subject: Subject, body: Question) -> Prompt:
    """Return a question after its worked examples, as the subject reads it."""
    if subject.uses_chat_template:
        return [*_turns(body.shots), {"role": "user", "content": body.question}]
    return f"{shared_of(subject, body.shots)}Question: {body.question}\nAnswer:"


def shared_of(subject: Subject, shots: Sequence[tuple[str, str]]) -> Prompt:
    """Return the worked examples alone."""
    if subject.uses_chat_template:
        return _turns(shots)
    return "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)


def _turns(shots: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for shot in shots for role, text in zip(roles, shot, strict=True)]

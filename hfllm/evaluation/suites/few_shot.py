"""Multiple choice and exact match from local files, with worked examples from the same file or without.

Rows are recognized by their columns (`hfllm.evaluation.suites.question_rows`): a question with choices and the right
one (ARC, MMLU, GPQA, HellaSwag and their like), or a question and the answer to be written.

    acc        the right choice is the likeliest
    acc_norm   the same, each log-likelihood divided by the choice's characters (lm-eval's `acc_norm`)
    exact_match   the written answer is the right one, apart from case, punctuation, number formats, and the text
                  before its number
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from hfllm.data.thoughts import FRACTION, NUMBER, PLAIN_NUMBER, final_answer, plain_answer
from hfllm.errors import refuse_if
from hfllm.evaluation.suites.base import TOO_LONG, Item, Prompt, Record, Subject, Suite, chosen, turns_of
from hfllm.evaluation.suites.question_rows import Question, read_questions
from hfllm.generation.scoring import Likelihood

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

"""The parts of a suite: items with lasting keys, a judge for their scores, answering subjects, and local files.

    suite = TruthfulQA("TruthfulQA.csv")
    for record in suite.judge(subject, suite.items()):
        print(record["item"], record["scores"])

A suite only judges. Whoever runs it averages the records by group and metric, puts errors next to the means, and
leaves out the items judged already.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar

from hfllm.data.formats import Message, unspelled
from hfllm.data.images.rows import words_of_places
from hfllm.data.receipt import receipted_whole
from hfllm.data.sources import load_source, parse_json
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError, refuse_if
from hfllm.generation.scoring import NOT_NUMBERS, Likelihood, Pair, Scorer, encode_pair, pass_precision
from hfllm.models.loading.saved import max_length_of
from hfllm.outputs.report import Found

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


# ---- what a suite is ----


Body = TypeVar("Body")
# Why an item has no scores, where it is for want of room.
TOO_LONG = "longer than the model's context"


@dataclass(frozen=True)
class Item(Generic[Body]):
    """One question of a suite.

    Args:
        key: unique in the suite, and the same in every run.
        group: its row of the table, such as `typos 0.1`.
        body: the suite's data for asking it.
    """

    key: str
    group: str
    body: Body


class Record(TypedDict):
    """The result of an item.

    Fields:
        model, suite, item, group: whose it is.
        scores: figures of this item by metric, all finite.
        asked, said: the model's input and output, for readers; either may be empty.
        skipped: the reason for missing scores; empty if there are scores.
        primary: metrics for comparing models in this group, with whether more is better (1) or less (-1).
    """

    model: str
    suite: str
    item: str
    group: str
    scores: dict[str, float]
    asked: str
    said: str
    skipped: str
    primary: dict[str, int]


class Suite(ABC, Generic[Body]):
    """Items, and how a model is judged by them.

    Attributes:
        name: as `--suites` names it.
        better: per metric whether more is better (1) or less (-1); others are neither.
        primary: metrics for comparing models, all of them in `better`; neither controls nor descriptive figures.
    """

    name: ClassVar[str]
    better: ClassVar[Mapping[str, int]] = {}
    primary: ClassVar[Sequence[str]] = ()

    def primary_of(self, group: str) -> Sequence[str]:
        """Return the primary metrics of a group of items; none for a control group."""
        return self.primary

    @abstractmethod
    def items(self) -> Sequence[Item[Body]]:
        """Return all items, the same in every run; read and check their files."""

    @abstractmethod
    def judge(self, subject: "Subject", items: Sequence[Item[Body]]) -> Iterator[Record]:
        """Yield the record of each of these items, possibly some of all, as soon as it is known, in any order.

        An item's scores do not depend on the other items asked.
        """

    def extra(self, records: Sequence[Record]) -> Found | None:
        """Return the report's additions to the mean of each metric, of all models' records; `None` for none.

        Names of metrics, tables and plots begin with the suite's.
        """
        return None

    def logprobs(
        self, subject: "Subject", item: Item[Body], prompt: "Prompt", answers: Sequence[str]
    ) -> list[float] | None:
        """Return the log-probability of each answer to a prompt; `None` where one does not fit the context."""
        texts = [subject.space + each for each in answers]
        (result,) = subject.choices([prompt], [texts], names=[self.name_of(item)])
        return None if result is None else [each.logprob for each in result]

    def name_of(self, item: Item[Body]) -> str:
        """Return the name of an item in errors."""
        return f"{self.name}, item {item.key}"

    def record(
        self,
        subject: "Subject",
        item: Item[Body],
        scores: Mapping[str, float] | None = None,
        asked: str = "",
        said: str = "",
        skipped: str = "",
    ) -> Record:
        """Return the record of an item.

        Raises:
            InputError: for a non-finite score, naming the item, and for an item with neither.
        """
        scores = {name: float(value) for name, value in (scores or {}).items()}
        for name, value in scores.items():
            if not math.isfinite(value):
                raise InputError(f"{self.name_of(item)}: {name} of {subject.label} is {value}, not a number")
        refuse_if(not scores and not skipped, f"{self.name_of(item)}: it has neither scores nor a reason why not")
        return Record(
            model=subject.label,
            suite=self.name,
            item=item.key,
            group=item.group,
            scores=scores,
            asked=asked,
            said=said,
            skipped=skipped,
            primary={name: self.better[name] for name in self.primary_of(item.group)},
        )


# ---- files ----
#
# Rows of a suite's local files, with the necessary columns.


Rows = list[tuple[str, dict[str, Any]]]


def rows_of(path: str, needed: Sequence[str], flag: str) -> Rows:
    """Return the rows of a local file with their positions, such as `FILE, row 3`.

    Args:
        path: a csv, tsv, json or jsonl file; a JSON object with the list `examples`, as BIG-bench writes it, counts as
            this list.
        needed: columns of all rows.
        flag: the file's flag, for errors.

    Raises:
        InputError: when there is no such file, it cannot be read, or a row lacks a column.
    """
    refuse_if(not Path(path).is_file(), f"{flag} {path}: no such file")
    examples = _examples(path)
    source = None if examples is not None else load_source(path)
    found = examples if source is None else zip(source.origins, source.rows, strict=True)
    rows = receipted_whole(path, found)
    refuse_if(not rows, f"{flag} {path}: it has no rows")
    for origin, row in rows:
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise InputError(
                f"{origin}: no column {missing[0]!r}; expected {', '.join(map(repr, needed))}, "
                f"found {', '.join(map(repr, list(row)[:12]))}"
            )
    return rows


def _examples(path: str) -> Rows | None:
    """Return the rows of a JSON object's `examples`; `None` for any other file."""
    if not path.endswith(".json"):
        return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        value = parse_json(text) if text.lstrip().startswith("{") else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if value is None:
        return None
    rows = value.get("examples")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected a list of objects, or an object with such a list as 'examples'")
    return [(f"{path}, example {number}", row) for number, row in enumerate(rows, 1)]


# ---- choices ----
#
# Figures of likelihoods of choices: the chosen one, and how probability is shared among them.
#
# All of them take natural logarithms and subtract the largest one before they exponentiate, so that choices of very
# small probability, with an exponential of 0, still have shares.


def shares(logprobs: Sequence[float]) -> list[float]:
    """Return the probability of each choice, given that one of them is said: they add up to 1."""
    most = max(logprobs)
    weights = [math.exp(each - most) for each in logprobs]
    total = math.fsum(weights)
    return [each / total for each in weights]


def mc1(best: float, wrong: Sequence[float]) -> float:
    """Return whether the best answer is likelier than every wrong one, 1 or 0 (Lin et al. 2022, arXiv:2109.07958)."""
    return float(best > max(wrong))


def mc2(true: Sequence[float], false: Sequence[float]) -> float:
    """Return the share of probability on the true answers: all answers are normalized together, by one maximum."""
    return math.fsum(shares([*true, *false])[: len(true)])


def mc3(true: Sequence[float], false: Sequence[float]) -> float:
    """Return the share of true answers likelier than every false one."""
    return sum(each > max(false) for each in true) / len(true)


def chosen(scores: Sequence[float]) -> int:
    """Return the index of the largest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)


# ---- subjects ----
#
# A judged model: how it is asked, with its chat template or without, and how likely it finds answers.


Prompt = str | list[Message]


def turns_of(pairs: Sequence[tuple[str, str]]) -> list[Message]:
    """Return questions and answers as turns of a conversation."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


@dataclass
class Subject:
    """A judged model.

    Args:
        label: its name in tables.
        model: any causal class of transformers, also with an adapter or quantized.
        tokenizer: with a padding token.
        uses_chat_template: whether questions are messages to it, or plain text.
        batch_size: prompts, or choices of a question, in one pass.
        processor: of a vision-language model.
    """

    label: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    uses_chat_template: bool = False
    batch_size: int = 8
    processor: "ProcessorMixin | None" = None
    scorer: Scorer = field(init=False, repr=False)
    _has_numbers: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        self.model.eval()
        self.scorer = Scorer(self.model, self.batch_size)

    @property
    def space(self) -> str:
        """What separates a prompt and its answer; a chat template ends a prompt itself."""
        return "" if self.uses_chat_template else " "

    def as_asked(self, prompt: Prompt) -> Prompt:
        """Return a prompt as the model is asked it: messages with the chat template, and else text.

        A text becomes the user's message; of messages without a template the contents are kept, a paragraph each. For
        a vision-language model, words with the spelling of the image placeholder token get a space in it.
        """
        if self.uses_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return [{**message, "content": self._plain(message["content"])} for message in messages]
        return self._plain(prompt if isinstance(prompt, str) else "\n\n".join(each["content"] for each in prompt))

    def _plain(self, text: str) -> str:
        return unspelled(words_of_places(self.processor), text)

    def text_of(self, prompt: Prompt) -> str:
        """Return the model's input text, with its chat template up to the assistant's turn.

        Messages ending with the assistant's are to be continued: the turn stays open after them.
        """
        prompt = self.as_asked(prompt)
        if isinstance(prompt, str):
            return prompt
        is_prefilled = prompt[-1]["role"] == "assistant"
        options = {"continue_final_message": True} if is_prefilled else {"add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, **options)

    # ---- answers ----

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str | None]:
        """Return the greedy answers to the prompts, without special tokens; see `iter_answers`."""
        return list(self.iter_answers(prompts, max_new_tokens))

    def iter_answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[str | None]:
        """Yield the greedy answers to the prompts, a batch at a time.

        `None` stands for a prompt too long, with the answer, for the model's context.

        Raises:
            InputError: for NaN logits after the first prompt: greedy decoding would not notice.
        """
        for start in range(0, len(prompts), self.batch_size):
            yield from self._answer_batch(prompts[start : start + self.batch_size], max_new_tokens)

    def _answer_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str | None]:
        from hfllm.generation.responses import sample_responses

        texts = [self._to_generate(prompt) for prompt in prompts]
        longest = max_length_of(self.model.config)
        lengths = [len(tokenize_prompts([each], self.tokenizer)[0]) for each in texts]
        fits = [longest is None or length + max_new_tokens <= longest for length in lengths]
        selected = [each for each, is_short in zip(texts, fits, strict=True) if is_short]
        if selected:
            self.check_numbers(selected[0])
        responses = iter(
            sample_responses(self.model, self.tokenizer, selected, max_new_tokens, do_sample=False) if selected else []
        )
        return [next(responses)[0] if is_short else None for is_short in fits]

    def check_numbers(self, text: str) -> None:
        """Refuse a model whose logits after a text are not numbers, as damaged weights make them; once is enough."""
        import torch

        if self._has_numbers:
            return

        ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=self.model.device)
        with torch.inference_mode(), pass_precision(self.model):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        refuse_if(bool(logits.isnan().any()), f"{self.label}, prompt {text[-60:]!r}: {NOT_NUMBERS}")
        self._has_numbers = True

    def _to_generate(self, prompt: Prompt) -> str:
        """Return the text of a prompt without the tokenizer's own token before a text."""
        text, start = self.text_of(prompt), self.tokenizer.bos_token
        adds_start = self.uses_chat_template and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(start) if adds_start and start else text

    # ---- choices ----

    def choices(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        shared: Prompt = "",
        names: Sequence[str] | None = None,
    ) -> list[list[Likelihood] | None]:
        """Return how likely continuations are after their contexts; see `iter_choices`."""
        return list(self.iter_choices(contexts, continuations, shared, names))

    def iter_choices(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        shared: Prompt = "",
        names: Sequence[str] | None = None,
    ) -> Iterator[list[Likelihood] | None]:
        """Yield for each context the likelihood of all its continuations; `None` where one does not fit the context.

        Args:
            continuations: per context; for a text with the space before a word.
            shared: the common beginning of all contexts, such as worked examples: it is read once.
            names: of the contexts, for errors.

        Raises:
            InputError: for NaN logits, naming the context, and a continuation without a token.
        """
        ids = self._shared_ids(shared)
        for index, (context, ends) in enumerate(zip(contexts, continuations, strict=True)):
            name = f"item {index + 1}" if names is None else names[index]
            yield from self.scorer.score([self.pairs(context, ends)], ids, [name])

    def pairs(self, context: Prompt, continuations: Sequence[str]) -> list[Pair]:
        """Return the tokens of a context with all of its continuations."""
        prompt, continuations = self.as_asked(context), [self._plain(each) for each in continuations]
        if isinstance(prompt, str):
            return [encode_pair(self.tokenizer, prompt, each) for each in continuations]
        # After a template's own tokens an answer begins again, as it does when the model writes it.
        before = list(self.tokenizer(self.text_of(prompt), add_special_tokens=False)["input_ids"])
        after = [list(self.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in continuations]
        return [Pair(before, each) for each in after]

    def _shared_ids(self, shared: Prompt) -> list[int]:
        """Return the contexts' shared tokens, without the last one: before other text it may be another token."""
        if not shared:
            return []
        prompt = self.as_asked(shared)
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])[:-1]
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[:-1]


# ---- judging ----
#
# A language model as judge of one answer at a time: a question answered with yes or no.


YES, NO = "Yes", "No"


def yes_shares(judge: Subject, questions: Sequence[str]) -> list[float | None]:
    """Return how likely a judge says yes rather than no to each question; `None` where one does not fit its context.

    The two words' probabilities are compared and nothing is written, so every judge replies. Its reliability shows in
    questions with known answers: suites ask some next to the others.

    Args:
        judge: with its chat template, or, without, as text ending in `Answer:`.
    """
    prompts, words = list(questions), [f"{judge.space}{word}" for word in (YES, NO)]
    if not judge.uses_chat_template:
        prompts = [f"{question}\nAnswer:" for question in questions]
    names = [f"judged answer {number}" for number in range(1, len(prompts) + 1)]
    result = judge.iter_choices(prompts, [words] * len(prompts), names=names)
    return [None if each is None else shares([number.logprob for number in each])[0] for each in result]

"""What a suite is: items with lasting keys, a judge that scores them, subjects that answer, and local files.

    suite = TruthfulQA("TruthfulQA.csv")
    for record in suite.judge(subject, suite.items()):
        print(record["item"], record["scores"])

A suite only judges. Whoever runs it averages the records by group and metric, puts errors beside the means, and leaves
out the items that have been judged already.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar

from hfllm.data.images.rows import words_of_places
from hfllm.data.rows import Message, unspelled
from hfllm.data.sources import load_source, parse_json
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.errors import InputError
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
        group: the row of the table that it counts in, such as `typos 0.1`.
        body: what the suite needs to ask it.
    """

    key: str
    group: str
    body: Body


class Record(TypedDict):
    """What became of an item.

    Fields:
        model, suite, item, group: whose it is.
        scores: figures of this item by metric, all finite.
        asked, said: what the model read and wrote, for readers; either may be empty.
        skipped: why there are no scores; empty where there are.
        primary: metrics by which models are compared in this group, each with whether more is better (1) or less (-1).
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
        better: of each metric whether more is better (1) or less (-1); others are neither.
        primary: metrics by which models are compared, each of them in `better`; not controls, nor what only describes.
    """

    name: ClassVar[str]
    better: ClassVar[Mapping[str, int]] = {}
    primary: ClassVar[Sequence[str]] = ()

    def primary_of(self, group: str) -> Sequence[str]:
        """Return the primary metrics of a group of items; none for a group that is a control."""
        return self.primary

    @abstractmethod
    def items(self) -> Sequence[Item[Body]]:
        """Return all items, the same in every run; read and check the files that they come from."""

    @abstractmethod
    def judge(self, subject: "Subject", items: Sequence[Item[Body]]) -> Iterator[Record]:
        """Yield the record of each of these items, which may be some of all, as soon as it is known, in any order.

        An item's scores do not depend on which others are asked.
        """

    def extra(self, records: Sequence[Record]) -> Found | None:
        """Return what stands in the report beside the mean of each metric, of all models' records; `None` for nothing.

        Names of metrics, tables and plots begin with the suite's.
        """
        return None

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
            InputError: for a score that is not finite, naming the item, and for an item with neither.
        """
        scores = {name: float(value) for name, value in (scores or {}).items()}
        for name, value in scores.items():
            if not math.isfinite(value):
                raise InputError(f"{self.name}, item {item.key}: {name} of {subject.label} is {value}, not a number")
        if not scores and not skipped:
            raise InputError(f"{self.name}, item {item.key}: it has neither scores nor a reason why not")
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
# Rows of a suite's local files, with the columns that they need.


Rows = list[tuple[str, dict[str, Any]]]


def rows_of(path: str, needed: Sequence[str], flag: str) -> Rows:
    """Return the rows of a local file with where each is, such as `FILE, row 3`.

    Args:
        path: a csv, tsv, json or jsonl file; a JSON object with the list `examples`, as BIG-bench writes it, counts as
            that list.
        needed: columns that each row has.
        flag: that names the file, for errors.

    Raises:
        InputError: when there is no such file, it cannot be read, or a row lacks a column.
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: no such file")
    examples = _examples(path)
    source = None if examples is not None else load_source(path)
    rows = examples if source is None else list(zip(source.origins, source.rows, strict=True))
    if not rows:
        raise InputError(f"{flag} {path}: it has no rows")
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
# Figures of likelihoods of choices: which is chosen, and how probability is shared among them.
#
# All of them take natural logarithms and subtract the largest one before they exponentiate, so that choices of very
# small probability, whose exponential is 0, still have shares.


def shares(logprobs: Sequence[float]) -> list[float]:
    """Return the probability of each choice if one of them is said: they add up to 1."""
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
    """Return the share of true answers that are likelier than every false one."""
    return sum(each > max(false) for each in true) / len(true)


def chosen(scores: Sequence[float]) -> int:
    """Return the place of the largest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)


# ---- subjects ----
#
# A model that is judged: how it is asked, with its chat template or without, and how likely it finds answers.


Prompt = str | list[Message]


@dataclass
class Subject:
    """A model that is judged.

    Args:
        label: its name in tables.
        model: any causal class of transformers, also with an adapter or quantized.
        tokenizer: with a padding token.
        uses_chat_template: whether questions are messages to it, or plain text.
        batch_size: prompts, or choices of a question, in one pass.
        processor: of a model that sees.
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

    def as_asked(self, prompt: Prompt) -> Prompt:
        """Return a prompt as the model is asked it: messages with the chat template, and else text.

        A text becomes the user's message; of messages without a template the contents are kept, a paragraph each. Of a
        model that sees, words that spell the token of a picture's place get a space in it.
        """
        if self.uses_chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return [{**message, "content": self._plain(message["content"])} for message in messages]
        return self._plain(prompt if isinstance(prompt, str) else "\n\n".join(each["content"] for each in prompt))

    def _plain(self, text: str) -> str:
        return unspelled(words_of_places(self.processor), text)

    def text_of(self, prompt: Prompt) -> str:
        """Return the text that the model reads, with its chat template up to the assistant's turn.

        Messages that end with the assistant's are to be continued: the turn stays open after them.
        """
        prompt = self.as_asked(prompt)
        if isinstance(prompt, str):
            return prompt
        is_prefilled = prompt[-1]["role"] == "assistant"
        options = {"continue_final_message": True} if is_prefilled else {"add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, **options)

    # ---- answers ----

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str | None]:
        """Return the greedy answer to each prompt, without special tokens; see `iter_answers`."""
        return list(self.iter_answers(prompts, max_new_tokens))

    def iter_answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[str | None]:
        """Yield the greedy answer to each prompt, a batch at a time.

        `None` stands for a prompt that, with the answer, does not fit the model's context.

        Raises:
            InputError: for logits that are not numbers after the first prompt: greedy decoding would not notice.
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
            sample_responses(self.model, self.tokenizer, selected, max_new_tokens, do_sample=False, fast=True)
            if selected
            else []
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
        if bool(logits.isnan().any()):
            raise InputError(f"{self.label}, prompt {text[-60:]!r}: {NOT_NUMBERS}")
        self._has_numbers = True

    def _to_generate(self, prompt: Prompt) -> str:
        """Return the text of a prompt without the token that the tokenizer itself puts before a text."""
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
        """Return how likely each continuation is after its context; see `iter_choices`."""
        return list(self.iter_choices(contexts, continuations, shared, names))

    def iter_choices(
        self,
        contexts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        shared: Prompt = "",
        names: Sequence[str] | None = None,
    ) -> Iterator[list[Likelihood] | None]:
        """Yield of each context how likely each of its continuations is; `None` where one does not fit the context.

        Args:
            continuations: of each context; for a text with the space that goes before a word.
            shared: what all contexts begin with, such as worked examples: it is read once.
            names: of the contexts, for errors.

        Raises:
            InputError: for logits that are not numbers, naming the context, and a continuation without a token.
        """
        ids = self._shared_ids(shared)
        for index, (context, ends) in enumerate(zip(contexts, continuations, strict=True)):
            name = f"item {index + 1}" if names is None else names[index]
            yield from self.scorer.score([self.pairs(context, ends)], ids, [name])

    def pairs(self, context: Prompt, continuations: Sequence[str]) -> list[Pair]:
        """Return the tokens of a context with each of its continuations."""
        prompt, continuations = self.as_asked(context), [self._plain(each) for each in continuations]
        if isinstance(prompt, str):
            return [encode_pair(self.tokenizer, prompt, each) for each in continuations]
        # After a template's own tokens an answer begins anew, as it does when the model writes it.
        before = list(self.tokenizer(self.text_of(prompt), add_special_tokens=False)["input_ids"])
        after = [list(self.tokenizer(each, add_special_tokens=False)["input_ids"]) for each in continuations]
        return [Pair(before, each) for each in after]

    def _shared_ids(self, shared: Prompt) -> list[int]:
        """Return the tokens that contexts share, without the last one, which may be another before other text."""
        if not shared:
            return []
        prompt = self.as_asked(shared)
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])[:-1]
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])[:-1]


# ---- judging ----
#
# A language model as judge of one answer at a time: a question that it answers with yes or no.


YES, NO = "Yes", "No"


def yes_shares(judge: Subject, questions: Sequence[str]) -> list[float | None]:
    """Return how likely a judge says yes rather than no to each question; `None` where one does not fit its context.

    The two words' probabilities are compared and nothing is written, so that every judge replies. How far it can be
    relied on shows in questions whose answer is known: suites ask some beside the others.

    Args:
        judge: with its chat template, or, without, as text that ends in `Answer:`.
    """
    if judge.uses_chat_template:
        prompts, words = list(questions), [YES, NO]
    else:
        prompts, words = [f"{question}\nAnswer:" for question in questions], [f" {YES}", f" {NO}"]
    names = [f"judged answer {number}" for number in range(1, len(prompts) + 1)]
    result = judge.iter_choices(prompts, [words] * len(prompts), names=names)
    return [None if each is None else shares([number.logprob for number in each])[0] for each in result]


# ---- overlap ----
#
# How much of a reference's words a text has: BLEU and ROUGE, by the libraries that people quote, where installed.


OVERLAPS = ("bleu", "rouge1", "rougeL")
PACKAGES = {"sacrebleu": "BLEU", "rouge_score": "ROUGE"}


def missing_overlaps() -> str:
    """Return the line about measures that are not installed; empty where all are."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if not missing:
        return ""
    names = " and ".join(PACKAGES[each] for each in missing)
    return f"{names} left out: pip install {' '.join(each.replace('_', '-') for each in missing)}"


def overlap_scores(text: str, true: Sequence[str], false: Sequence[str]) -> dict[str, float]:
    """Return of each measure whether a text is nearer to a true answer than to every false one, and by how much.

    Returns:
        `NAME_acc`, 1 or 0, and `NAME_diff`, in hundredths, of each measure whose library is installed.
    """
    result: dict[str, float] = {}
    for name, best in _measured(text, true).items():
        difference = best - _measured(text, false)[name]
        result |= {f"{name}_acc": float(difference > 0), f"{name}_diff": difference}
    return result


def _measured(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return of each measure the largest over the references."""
    result: dict[str, float] = {}
    if find_spec("sacrebleu") is not None:
        from sacrebleu import corpus_bleu

        # As lm-eval counts: with every n-gram of a sentence smoothed, and words split as for international text.
        options = {"smooth_method": "exp", "smooth_value": 0.0, "force": False, "tokenize": "intl"}
        options |= {"lowercase": False, "use_effective_order": False}
        result["bleu"] = max(corpus_bleu([text], [[each]], **options).score for each in references)
    if find_spec("rouge_score") is not None:
        scores = [_rouge().score(each, text) for each in references]
        result |= {name: max(100 * each[name].fmeasure for each in scores) for name in ("rouge1", "rougeL")}
    return result


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"])

"""Tokenize conversations, find the tokens of the assistant's turns, and read the learned turns back."""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import TRAIN, Dropped, Message, learned_turns, origin_of
from hfllm.data.packing import IGNORE
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- tokens and labels ----


Row = Mapping[str, Any]
# Rows tokenized at a time.
ROWS = 1000
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
REWRITES = "conversations are split into one row per answer: the chat template rewrites what was said before"
DIFFERENT = "rows are learned from where they part from their prompt, which the chat template ends otherwise"
UNSEEN = "rows have tools that the chat template does not write"
UNMARKED = "--assistant_only_loss learns each answer, and a message is marked as not to be learned (train, weight)"
FIRST = "conversations begin with the assistant, and that turn is not learned: it answers nothing"


@dataclass
class Labeled:
    """A tokenized conversation.

    Args:
        input_ids: its tokens.
        labels: the same where they are learned, else `IGNORE`.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass
class Conversations:
    """Tokenizer of conversations that labels the turns of the assistant in each row's `completion`.

    A completion of one turn is everything after the tokens of its prompt, as in TRL's SFTTrainer. In a longer one the
    turns are marked by `{% generation %}` in the chat template. Where it has no such markers, or they leave out the
    token at the end of a turn, or where an answer is not to be learned, a turn is the difference between the
    conversation up to its end and the conversation before it with the generation prompt. If the conversation up to a
    turn is no beginning of the whole, as with templates that drop the thoughts of earlier turns, it is split into one
    row per turn, each as the model sees it when it answers.

    Args:
        tokenizer: with a chat template.
        marked_template: a template with markers, to learn its marked parts in every row and nothing else.

    Attributes:
        notes: other remarks for the user, counted by kind.
    """

    tokenizer: "PreTrainedTokenizerBase"
    marked_template: str | None = None
    notes: Dropped = field(default_factory=Dropped)

    def __post_init__(self):
        self._uses_markers = self.marked_template is None and self._markers_suffice()

    def label(self, rows: Sequence[Row]) -> Iterator[list[Labeled]]:
        """Yield the tokenized conversations of each row of `prompt` and `completion` messages, usually one.

        Raises:
            InputError: when the chat template cannot write a row, naming it.
        """
        rows = iter(enumerate(rows))
        while batch := list(islice(rows, ROWS)):
            yield from self._label_batch(batch)

    def wholes(self, rows: Sequence[Row], answer: str) -> list[list[int]]:
        """Return for each row the tokens of its `prompt` and of the messages in its column `answer`."""
        ids, rows = [], iter(rows)
        while batch := list(islice(rows, ROWS)):
            texts = [self._whole(row, answer) for row in batch]
            ids += self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def _whole(self, row: Row, answer: str) -> str:
        origin, messages = origin_of(row, "a row"), [*row["prompt"], *row[answer]]
        text = self._render(origin, row, messages)
        check_written(origin, row, messages, text, self.notes)
        return text

    def _label_batch(self, batch: Sequence[tuple[int, Row]]) -> Iterator[list[Labeled]]:
        """Render all rows first, so that they are tokenized in one call."""
        texts: list[str] = []
        plans: list[tuple[Row, str, slice]] = []
        for number, row in batch:
            origin, begin, messages = origin_of(row, f"row {number}"), len(texts), [*row["prompt"], *row["completion"]]
            for turn in () if self._is_marked(row) else self._turns(origin, row):
                texts.append(self._render(origin, row, messages[:turn], add_generation_prompt=True))
                texts.append(self._render(origin, row, messages[: turn + 1]))
            if row.get("tools") or has_more_than_text(messages):
                check_written(origin, row, messages, self._render(origin, row, messages), self.notes)
            plans.append((row, origin, slice(begin, len(texts))))
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for row, origin, indices in plans:
            if self._is_marked(row):
                yield self._by_markers(origin, row)
            else:
                yield self._by_prefixes(origin, ids[indices][::2], ids[indices][1::2])

    def _is_marked(self, row: Row) -> bool:
        if self.marked_template is not None:
            return True
        learns_all = all(message.get(TRAIN) is not False for message in row["completion"])
        return self._uses_markers and len(row["completion"]) > 1 and learns_all

    def _turns(self, origin: str, row: Row) -> list[int]:
        """Return the indices of the turns to learn among all messages."""
        before = len(row["prompt"])
        turns = [before + index for index in learned_turns(row["completion"])]
        if turns and turns[0] == 0:
            # There is no conversation before it for a comparison.
            self.notes.add(FIRST, origin)
            del turns[0]
        return turns

    def _by_markers(self, origin: str, row: Row) -> list[Labeled]:
        """Return the labels of marked parts: of a whole row, or of each turn where earlier thoughts are dropped."""
        if any(message.get(TRAIN) is False for message in (*row["prompt"], *row["completion"])):
            raise InputError(f"{origin}: {UNMARKED}")
        before, completion = list(row["prompt"]), list(row["completion"])
        whole = self._marked(origin, row, [*before, *completion])
        if not has_thoughts(completion):
            return [whole]
        turns = [at for at, message in enumerate(completion) if message["role"] == "assistant"]
        parts = [self._marked(origin, row, [*before, *completion[: at + 1]]) for at in turns]
        if all(part.input_ids == whole.input_ids[: len(part.input_ids)] for part in parts):
            return [whole]
        self.notes.add(REWRITES, origin)
        for at, part in zip(turns, parts, strict=True):
            if not before and not at:
                continue
            prompt = self._render(origin, row, [*before, *completion[:at]], tokenize=True, add_generation_prompt=True)
            begin = self._answer_begins(origin, prompt["input_ids"], part.input_ids)
            part.labels[:begin] = [IGNORE] * begin
        return parts

    def _marked(self, origin: str, row: Row, messages: Sequence[Message]) -> Labeled:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._render(origin, row, messages, **options)
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return Labeled(list(encoded["input_ids"]), [token if learned else IGNORE for token, learned in pairs])

    def _by_prefixes(self, origin: str, starts: Sequence[list[int]], ends: Sequence[list[int]]) -> list[Labeled]:
        """Return the labels of a row from its tokens before and after each turn, or one row per turn."""
        if not ends:
            return []
        whole = ends[-1]
        labels = [IGNORE] * len(whole)
        *earlier, _ = zip(starts, ends, strict=True)
        if all(whole[: len(end)] == end and end[: len(start)] == start for start, end in earlier):
            for start, end in earlier:
                labels[len(start) : len(end)] = end[len(start) :]
            begin = self._answer_begins(origin, starts[-1], whole)
            labels[begin:] = whole[begin:]
            return [Labeled(whole, labels)]
        self.notes.add(REWRITES, origin)
        split = []
        for start, end in zip(starts, ends, strict=True):
            begin = self._answer_begins(origin, start, end)
            split.append(Labeled(end, [IGNORE] * begin + end[begin:]))
        return split

    def _answer_begins(self, origin: str, prompt: Sequence[int], whole: Sequence[int]) -> int:
        """Return the length of the common beginning of a conversation and its prompt, as TRL does."""
        if list(whole[: len(prompt)]) == list(prompt):
            return len(prompt)
        self.notes.add(DIFFERENT, origin)
        pairs = zip(prompt, whole, strict=False)
        return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(whole)))

    def _render(self, origin: str, row: Row, messages: Sequence[Message], **options: Any) -> Any:
        options = {"tokenize": False, **options}
        if row.get("tools"):
            options["tools"] = row["tools"]
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=self.marked_template, **options)
        except template_errors() as error:
            reason = one_line(error)
            raise InputError(f"{origin}: the chat template cannot write this conversation: {reason}") from None

    def _markers_suffice(self) -> bool:
        """Return whether the chat template marks the assistant's turns with the token at their end."""
        if not has_markers(template_of(self.tokenizer)):
            return False
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        try:
            encoded = self.tokenizer.apply_chat_template(
                [question, answer, question, answer],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:  # a template may refuse anything, and is then asked row by row
            return False
        learned = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
        return learned.count(self.tokenizer.eos_token_id) == 2


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the chat template of a tokenizer, of several the one for conversations."""
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, dict) else template or ""


def has_markers(template: str) -> bool:
    """Return whether a chat template marks the assistant's words by `{% generation %}`."""
    return MARKERS.search(template) is not None


def has_thoughts(messages: Sequence[Message]) -> bool:
    """Return whether an assistant's message has thoughts, apart from its words or between marks in them."""
    return any(
        message["role"] == "assistant" and ("reasoning_content" in message or "</think>" in message["content"])
        for message in messages
    )


def has_more_than_text(messages: Sequence[Message]) -> bool:
    """Return whether messages have anything but a role and a text, or are results of a tool."""
    return any(set(message) - {"role", "content", TRAIN} or message["role"] == "tool" for message in messages)


def check_written(origin: str, row: Row, messages: Sequence[Message], text: str, notes: Dropped) -> None:
    """Refuse a conversation whose tool calls, tool results or last thoughts are left out by a chat template."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            if not _is_in(name := call["function"]["name"], text):
                raise InputError(f"{origin}: the chat template leaves out calls of tools ({name!r}); {_way_out(text)}")
        if message["role"] == "tool" and not _is_in(message["content"], text):
            raise InputError(f"{origin}: the chat template leaves out messages of the role tool; {_way_out(text)}")
    # Thoughts of earlier turns may well be dropped.
    if messages[-1]["role"] == "assistant" and not _is_in(messages[-1].get("reasoning_content", ""), text):
        raise InputError(f"{origin}: the chat template leaves out reasoning_content; {_way_out(text)}")
    for tool in row.get("tools") or ():
        function = tool.get("function", tool)
        name = str(function.get("name", ""))
        # A call names a tool too, so its name shows something only before the first question.
        question = next((message["content"] for message in messages if message["role"] == "user"), "")
        before = text.partition(question.strip())[0] if question.strip() else ""
        if not _is_in(str(function.get("description") or name), text) and not (name and _is_in(name, before)):
            notes.add(UNSEEN, origin)
            break


def _way_out(text: str) -> str:
    """Return advice about a chat template that leaves something out, based on its output."""
    marks = {"chatml": "<|im_start|>", "hfllm": "<|assistant|>"}
    ours = next((f" {name}" for name, mark in marks.items() if mark in text), "")
    return f"it takes a model whose template writes them, or --chat_template_path{ours}"


def _is_in(content: str, text: str) -> bool:
    """Return whether a text contains `content`, as it is, or inside a JSON text."""
    content = content.strip()
    return (
        content in text or json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text
    )


# ---- read back ----
#
# Whether calls and thoughts written by a chat template are read back as they were.
#
# A model trained on calls that are read back differently calls other tools than it learned to.


# Tested rows with calls or thoughts, each rendered twice for each turn.
MOST_ROWS = 1000


@dataclass
class ReadBack:
    """Counts of written and read items.

    Args:
        calls, exact_calls: tool calls, and tool calls with the same name and arguments as before.
        thoughts, exact_thoughts: the same of thoughts.
        first: origin of the first row with an item that is not exact.
    """

    calls: int = 0
    exact_calls: int = 0
    thoughts: int = 0
    exact_thoughts: int = 0
    first: str = ""

    def __str__(self) -> str:
        counts = (("calls of tools", self.exact_calls, self.calls), ("thoughts", self.exact_thoughts, self.thoughts))
        parts = [f"{exact:,} of {all_:,} {what}" for what, exact, all_ in counts if all_]
        first = f" (first that are not: {self.first})" if self.first else ""
        return f"{' and '.join(parts)} are read back exactly{first}"


def response_template_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any] | None:
    """Return how a tokenizer's responses are read: as it says, or as TRL knows for its chat template, if at all."""
    from trl.chat_template_utils import add_response_schema

    if getattr(tokenizer, "response_template", None) is not None:
        return tokenizer.response_template
    try:
        return add_response_schema(copy.copy(tokenizer)).response_template
    except (ValueError, *template_errors()):
        return None


def read_back(rows: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> ReadBack | None:
    """Return how much of the rows' completions is read back by `parse_response` as the chat template wrote it.

    Args:
        rows: with `prompt` and `completion` messages; of rows with calls or thoughts the first `MOST_ROWS` are tried.
        tokenizer: with a chat template.

    Returns:
        `None` where rows have neither, or the way to read the template's turns is unknown.
    """
    result, template = ReadBack(), None
    for row in islice((row for row in rows if any(map(_is_read_back, row["completion"]))), MOST_ROWS):
        template = template or response_template_of(tokenizer)
        if template is None:
            return None
        for index, message in enumerate(row["completion"]):
            if _is_read_back(message):
                before = [*row["prompt"], *row["completion"][:index]]
                _count(result, message, _read(tokenizer, template, before, message, row.get("tools")), row)
    return result if result.calls or result.thoughts else None


def _is_read_back(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def _read(
    tokenizer: "PreTrainedTokenizerBase",
    template: dict[str, Any],
    before: Sequence[Message],
    message: Message,
    tools: Sequence[dict[str, Any]] | None,
) -> Message:
    """Return the parsed message of a turn, from the tokens that a model would write."""
    options = {"tools": tools, "tokenize": False}
    try:
        prompt = tokenizer.apply_chat_template([*before], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*before, message], **options)
        if not whole.startswith(prompt):
            return {}
        ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        return tokenizer.parse_response(ids, template, prefix=prompt)
    # Such as a call that is no JSON.
    except (ValueError, *template_errors()):
        return {}


def _count(counts: ReadBack, written: Message, read: Message, row: Mapping[str, Any]) -> None:
    calls = [_call(call) for call in written.get("tool_calls") or ()]
    exact = [_call(call) for call in read.get("tool_calls") or ()]
    counts.calls += len(calls)
    counts.exact_calls += (same_calls := len(calls) if calls == exact else 0)
    has_thought = bool(written.get("reasoning_content"))
    counts.thoughts += has_thought
    is_same = has_thought and read.get("reasoning_content", "").strip() == written["reasoning_content"].strip()
    counts.exact_thoughts += is_same
    if not counts.first and (same_calls < len(calls) or has_thought > is_same):
        counts.first = origin_of(row, "a row")


def _call(call: Mapping[str, Any]) -> tuple[object, object]:
    function = call.get("function", call)
    return function.get("name"), function.get("arguments")

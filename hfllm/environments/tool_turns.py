"""Calls of tools in a policy's turns, and the tokens of the answering turns, with their images."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message, content_text, in_parts, unspelled
from hfllm.data.images.rows import words_of_places
from hfllm.data.tokenizer import template_errors
from hfllm.errors import InputError, one_line, refuse_if

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


REWRITES = "tools: the chat template writes a turn otherwise when a result follows it: set one that does not"
NO_IMAGES = "tools: a result has an image, which the chat template cannot write in a tool's turn"
UNREADABLE = "{'error': 'the result cannot be written as plain text'}"
# The number of the probe that stands for names.
NAME_PROBE = "9"
# Number of kept replies, and of turns: tools often repeat the same text.
KEPT_REPLIES = 512


class ToolTurns:
    """The policy's own way to call tools and to read their results, by its chat template and response template.

    Args:
        processing_class: the policy's tokenizer, or where it reads images its processor. A tokenizer without a
            `response_template` gets TRL's for its chat template.
        schemas: of the tools, as `get_json_schema` gives them.
        end_token_ids: tokens at the end of a turn.

    Raises:
        InputError: when its chat template cannot write calls and results, or calls cannot be told from its text.
    """

    def __init__(
        self,
        processing_class: "ProcessingClass",
        schemas: Sequence[dict[str, Any]],
        end_token_ids: Sequence[int],
    ):
        from trl.chat_template_utils import supports_tool_calling

        original = getattr(processing_class, "tokenizer", processing_class)
        self.processor, self.tokenizer = _with_one_template(processing_class)
        self.schemas, self.end_token_ids, tokenizer = list(schemas), set(end_token_ids), self.tokenizer
        writer = self.processor or tokenizer
        if not supports_tool_calling(writer):
            raise InputError(
                "tools: the tokenizer's chat template cannot write an assistant's tool_calls and a tool's message; "
                "--chat_template_path own keeps its turns and adds them (set_chat_template in code)"
            )
        _find_response_template(tokenizer)
        original.response_template = tokenizer.response_template
        self.chat_template = _lasting_template(writer)
        added, template = tokenizer.added_tokens_decoder.items(), str(self.chat_template)
        self.control = {
            number
            for number, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._special = [tokenizer.added_tokens_decoder[number].content for number in self.control]
        self._special += words_of_places(self.processor) if self.processor is not None else ()
        self.marks = self._plain_marks()
        messages = _calling([])[:1]
        before, opened = (self._tokens(messages, add_generation_prompt=is_opened) for is_opened in (False, True))
        self.opening, self._prompt_ids = opened[len(before) :], before
        self._before = lru_cache(KEPT_REPLIES)(self._tokens_before)
        self._written = lru_cache(KEPT_REPLIES)(self._write)
        self._parsed = lru_cache(KEPT_REPLIES)(self._parse)
        self._turn_end = set(self._before(("tool",))[-1:]) & self.end_token_ids
        # Of one result, so an unsuitable chat template is refused before training.
        self._skeletons = {1: self._control_of(self._reply([_message_of("tool", "x")]))}

    def parse(self, turn_ids: Sequence[int]) -> Message:
        """Return the assistant's message of a turn, with `tool_calls` where it has them.

        As in TRL, a turn whose calls cannot be read, such as broken JSON, is a message of plain text.
        """
        # Policies often say the same; whoever gets a message may change it.
        try:
            return copy.deepcopy(self._parsed(tuple(turn_ids)))
        # JSON that is nested too deeply to be copied.
        except RecursionError:
            return self._plain_turn(turn_ids)

    def _parse(self, turn_ids: tuple[int, ...]) -> Message:
        from trl.chat_template_utils import parse_response

        try:
            message = parse_response(self.tokenizer, list(turn_ids), prefix=self.opening, tools=self.schemas)
            if message.get("tool_calls"):
                message["tool_calls"] = _encodable(message["tool_calls"])
            return message
        # Model output unexpected by TRL, such as too deeply nested JSON.
        except Exception:
            return self._plain_turn(turn_ids)

    def _plain_turn(self, turn_ids: Sequence[int]) -> Message:
        return {"role": "assistant", "content": self.tokenizer.decode(turn_ids, skip_special_tokens=True)}

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from the end of a turn with calls to the beginning of the policy's next turn.

        Output of tools is plain text, also where it spells special tokens: they cannot open or end a turn. A result
        doing this is replaced in place, in `messages`, by an error; of the template's marks in plain text see `plain`.
        """
        for message in messages:
            message |= _message_of(self.plain(message["name"]), self.plain(message["content"]))
        for content in (UNREADABLE, ""):
            try:
                ids = self._reply(messages)
                if self._control_of(ids) == self._skeleton(len(messages)):
                    return ids
            # The tokenizer makes a special token even of plain text.
            except ValueError:
                pass
            for message in messages:
                message |= _message_of("tool", content)
        # Nothing of the tools' output is left.
        return self._reply(messages)

    def reply(self, messages: Sequence[Message]) -> "tuple[list[int], Mapping[str, torch.Tensor]]":
        """Return `reply_ids`, and the tensors of the results' images by the model's argument.

        Raises:
            InputError: when the chat template cannot write an image in a tool's turn.
        """
        if not any(map(_has_image, messages)):
            for message in messages:
                message["content"] = content_text(message["content"])
            return self.reply_ids(messages), {}
        for message in messages:
            content = _with_texts(message["content"], self.without_marks)
            message |= _message_of(self.without_marks(message["name"]), content)
        blank = [_message_of(each["name"], _with_texts(each["content"], lambda text: "x")) for each in messages]
        self._check_image(next(message for message in blank if _has_image(message)))
        # The processor may refuse an image, such as one whose sides are too unequal for it.
        expected: list[int] = []
        with suppress(*template_errors()):
            ids, pictures = self._rendered(messages)
            expected = self._control_of(self._rendered(blank)[0])
        if expected and self._control_of(ids) == expected:
            return list(ids), pictures
        for message in messages:
            message |= _message_of("tool", UNREADABLE)
        return self.reply_ids(messages), {}

    def _check_image(self, message: Message) -> None:
        """Refuse a chat template that cannot write the image of a tool's message, or leaves it out."""
        words = [part for part in message["content"] if part["type"] == "text"]
        both = (message, {**message, "content": words})
        try:
            shown, left_out = (self._text([*_calling([message["name"]]), each]) for each in both)
        except template_errors() as error:
            raise InputError(f"{NO_IMAGES}: {one_line(error)}") from None
        refuse_if(shown == left_out, f"{NO_IMAGES}: it leaves it out")

    def end_of(self, turn_ids: Sequence[int]) -> list[int]:
        """Return the missing last token of a turn ended by a text, such as one of `stop_strings`."""
        return [] if {*turn_ids[-1:]} & self.end_token_ids else list(self._turn_end)

    def forges(self, text: str) -> bool:
        """Return whether a text spells special tokens, or others of the chat template."""
        tokens = self.tokenizer.added_tokens_decoder
        return any(tokens[number].content in text for number in self.control)

    def plain(self, text: str) -> str:
        """Return a text with a space in each plain mark of the chat template: `</tool_response>` in Qwen 2.5's, say.

        A result with such a mark would end itself, and speak as another tool, as the user or as the policy.
        """
        for mark, pattern in self.marks.items():
            text = pattern.sub(lambda found, mark=mark: found[0].replace(mark, f"{mark[0]} {mark[1:]}"), text)
        return text

    def without_marks(self, text: str) -> str:
        """Return a text as `plain` does, with a space in each special token too: it is one for no processor."""
        return unspelled(self._special, self.plain(text))

    def _plain_marks(self) -> dict[str, re.Pattern[str]]:
        """Return what begins or ends messages in ordinary text, found by writing conversations of probes.

        What the template writes behind a special token cannot be reached by a text, and what it writes at once after
        one, as `user` after `<|im_start|>`, is no mark without it.
        """
        tokens = self.tokenizer.added_tokens_decoder
        special = re.compile("|".join(re.escape(tokens[number].content) for number in self.control) or "(?!)")
        lines: set[str] = set()
        for conversation in _probes():
            # Some chat templates have no system, or refuse to write two results.
            with suppress(*template_errors()):
                _, *parts = re.split(r"probe(\d)x", self._text(conversation))
                for number, piece, next_number in zip(parts[::2], parts[1::2], [*parts[2::2], ""], strict=True):
                    # Names and what stands around them are no ends of a text.
                    if NAME_PROBE not in (number, next_number):
                        lines |= _marks_between(special.split(piece))
        marks = sorted((line for line in lines if len(line) > 1 and self._reaches(line)), key=len, reverse=True)
        return {mark: _pattern_of(mark) for mark in marks}

    def _reaches(self, line: str) -> bool:
        """Return whether a result stands in the text as it is, where JSON would write a mark's quotes otherwise."""
        text = f"a{line}b"
        for conversation in ([*_calling(("x",)), _message_of("x", text)], [{"role": "user", "content": text}]):
            with suppress(*template_errors()):
                return text in self._text(conversation)
        return True

    def _text(self, messages: Sequence[Message]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, "chat_template": self.chat_template}
        messages = list(messages) if self.processor is None else in_parts(messages)
        return self.tokenizer.apply_chat_template(messages, **options)

    def _skeleton(self, count: int) -> list[int]:
        """Return the special tokens of a reply with so many results."""
        if count not in self._skeletons:
            self._skeletons[count] = self._control_of(self._reply([_message_of("tool", "x")] * count))
        return self._skeletons[count]

    def _control_of(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control]

    def _reply(self, messages: Sequence[Message]) -> list[int]:
        return list(self._written(tuple((each["name"], each["content"]) for each in messages)))

    def _write(self, results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a reply with these results."""
        return self._rendered([_message_of(*each) for each in results])[0]

    def _rendered(self, messages: Sequence[Message]) -> "tuple[tuple[int, ...], Mapping[str, torch.Tensor]]":
        """Return the tokens of a reply with these results, all with the names of their tools, and their images."""
        names = tuple(message["name"] for message in messages)
        try:
            return self._write_after(names, messages)
        # Some chat templates, such as Llama 3.1's, refuse to write more than one call.
        except template_errors():
            if len(names) == 1:
                raise
            return self._write_after(names[:1], messages)

    def _write_after(
        self, names: tuple[str, ...], messages: Sequence[Message]
    ) -> "tuple[tuple[int, ...], Mapping[str, torch.Tensor]]":
        """Return the tokens of a reply to a turn with calls of these tools, and the tensors of its images."""
        before = self._before(names)
        whole, pictures = self._encoded([*_calling(names), *messages], add_generation_prompt=True)
        refuse_if(tuple(whole[: len(before)]) != before, REWRITES)
        if pictures:
            from hfllm.multimodal.processors import PER_TOKEN

            pictures = {name: value[len(before) :] if name in PER_TOKEN else value for name, value in pictures.items()}
        return tuple(whole[len(before) :]), pictures

    def _tokens_before(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the tokens of a conversation up to the end of a turn with calls of these tools."""
        before = self._tokens(_calling(names), add_generation_prompt=False)
        # The policy's turn stops at its end token: the template's text after it is part of the reply. Some
        # templates, such as Gemma 4's, end a turn with calls by none.
        pairs = enumerate(zip(before, self._prompt_ids, strict=False))
        begin = next((index for index, (one, other) in pairs if one != other), len(self._prompt_ids))
        ends = [index for index in range(begin, len(before)) if before[index] in self.end_token_ids]
        return tuple(before[: ends[-1] + 1] if ends else before)

    def _tokens(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        return self._encoded(messages, add_generation_prompt)[0]

    def _encoded(
        self, messages: list[Message], add_generation_prompt: bool
    ) -> "tuple[list[int], Mapping[str, torch.Tensor]]":
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": self.chat_template}
        # Some processors cannot take both images and this; texts beside images have no marks, see `reply`.
        options["sanitize_control_tokens"] = not any(_has_image(message) for message in messages)
        if self.processor is None:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options), {}
        from hfllm.multimodal.processors import encode_messages

        return encode_messages(messages, self.processor, **options)


def _probes() -> Iterator[list[Message]]:
    """Yield conversations of all kinds, with a probe as each text and as each name."""
    roles = {"system": 4, "user": 0, "assistant": 1, "asked": 2, "answered": 3}
    texts = {name: f"probe{number}x" for name, number in roles.items()}
    system, user, assistant = ({"role": role, "content": texts[role]} for role in ("system", "user", "assistant"))
    asked, answered = {**user, "content": texts["asked"]}, {**assistant, "content": texts["answered"]}
    name = f"probe{NAME_PROBE}x"
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {}}]}
    calling["tool_calls"][0]["function"] = {"name": name, "arguments": {}}
    results = [_message_of(name, f"probe{number}x") for number in (5, 6)]
    yield [user, assistant, asked, answered]
    yield [system, user, assistant, asked]
    yield [user, assistant, system, asked]
    yield [user, calling, *results, answered, asked]
    yield [user, calling, results[0], answered, asked]


def _marks_between(pieces: Sequence[str]) -> set[str]:
    """Return the lines by which a template ends a text and begins the next one.

    Args:
        pieces: what stands between the two, split at special tokens.
    """
    lines = {line.strip() for line in pieces[0].splitlines()}
    if len(pieces) > 1:
        first, *others = pieces[-1].splitlines() or [""]
        lines |= {line.strip() for line in others}
        if not first[:1].isalnum():
            lines.add(first.strip())
    return lines


def _pattern_of(mark: str) -> re.Pattern[str]:
    """Return where a mark is one: a word at the beginning of a line, `user` as a whole line, others anywhere."""
    line_end = r"[ \t\r]*$" if mark.isalnum() else ""
    return re.compile(rf"(?m)^[ \t\r]*{re.escape(mark)}{line_end}" if mark[0].isalnum() else re.escape(mark))


def _message_of(name: str, content: str | list[dict[str, Any]]) -> Message:
    return {"role": "tool", "name": name, "content": content}


def _has_image(message: Message) -> bool:
    content = message["content"]
    return isinstance(content, list) and any(part["type"] == "image" for part in content)


def _with_texts(content: str | list[dict[str, Any]], change: Callable[[str], str]) -> str | list[dict[str, Any]]:
    """Return a message's content with its texts changed, and its images as they are."""
    if isinstance(content, str):
        return change(content)
    return [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]


def _calling(names: Sequence[str]) -> list[Message]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "", "tool_calls": calls}]


def _encodable(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls without halves of characters, possible in JSON but not in tokenizers, files or logs."""
    return json.loads(json.dumps(calls, ensure_ascii=False).encode("utf-8", "replace"))


def can_show_images(processing_class: "ProcessingClass") -> bool:
    """Return whether it is a processor of images with a chat template."""
    return hasattr(processing_class, "image_processor") and bool(processing_class.chat_template)


def _with_one_template(
    processing_class: "ProcessingClass",
) -> "tuple[ProcessorMixin | None, PreTrainedTokenizerBase]":
    """Return a processor, if it is one with a chat template, and the tokenizer with the template of both.

    Of several chat templates it is the one for tools.
    """
    processor = processing_class if can_show_images(processing_class) else None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    template = (processor or tokenizer).chat_template
    if isinstance(template, dict):
        template = template.get("tool_use") or template.get("default")
        processor = processor and copy.copy(processor)
        if processor is not None:
            processor.chat_template = template
    if template != tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return processor, tokenizer


def _lasting_template(writer: "ProcessingClass") -> str:
    """Return a chat template with one text for a turn, whatever follows: the model's, or TRL's for training."""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

    if is_chat_template_prefix_preserving(writer):
        return writer.chat_template
    try:
        return get_training_chat_template(writer) or writer.chat_template
    except ValueError:
        raise InputError(REWRITES) from None


def _find_response_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set TRL's response template for a chat template, where the tokenizer has none."""
    from trl.chat_template_utils import add_response_schema

    if getattr(tokenizer, "response_template", None) is not None:
        return
    try:
        add_response_schema(tokenizer)
    except (ValueError, *template_errors()):
        raise InputError(
            "tools: the tokenizer has no response_template, by which calls are read, and TRL knows none for its chat "
            "template: set tokenizer.response_template"
        ) from None

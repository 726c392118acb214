"""A conversation in the terminal: the model that answers, the commands, and what is kept."""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer, set_seed

from hfllm.data.formats import Message, content_text, unspelled
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import png_of, words_of_places
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import end_tokens, template_errors, tokenize_prompts
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import encodable
from hfllm.errors import InputError, one_line
from hfllm.generation.scoring import evaluating
from hfllm.models.loading.saved import max_length_of
from hfllm.multimodal.processors import Pictures, encode_messages, place_tokens
from hfllm.rewards.functions import transcript
from hfllm.runs.models import named_model
from hfllm.stages.chat.flags import ChatArguments
from hfllm.stages.rlhf.build import load_tools
from hfllm.stages.shared import load_speaking, processor_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Write = Callable[[str], None]
# What would move the cursor, change colors or turn lines around: a model may write anything.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Lower ones leave no token to sample.
LEAST_TEMPERATURE = 1e-3
# The end of a prompt, where a chat template may open a thought.
TAIL = 16


def shown(text: str) -> str:
    """Return a text without characters that steer a terminal."""
    return CONTROL.sub("", text)


class Printed(TextStreamer):
    """Streamer that writes an answer as it comes, and keeps it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", write: Write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the next words."""
        self.text += text
        self.write(shown(text))


@dataclass
class Speaker:
    """A model that answers conversations.

    Args:
        model, tokenizer: loaded.
        processor: of a vision-language model.
        settings: of its sampling, where they differ from its generation config.
        max_new_tokens: the longest answer.
        runner: answers with tools, `None` without.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    processor: "ProcessorMixin | None" = None
    settings: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    runner: ToolRunner | None = None

    def set_temperature(self, temperature: float) -> None:
        """Sample at a temperature, 0 is greedy."""
        self.settings.pop("temperature", None)
        self.settings |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})

    def answer(self, messages: Sequence[Message], write: Write) -> list[Message]:
        """Return the messages that answer a conversation, and write them meanwhile.

        Ctrl-C ends the answer, which is kept as far as it came.

        Raises:
            InputError: when the conversation has no room in the model's context, or the chat template cannot write it.
        """
        if self.runner is not None:
            return self._with_tools(messages, write)
        ids, images = self._encoded(messages)
        begin = torch.tensor([ids], device=self.model.device)
        inputs = Pictures([images]).inputs(begin, [0]) if images else {}
        room = self.room(len(ids))
        ends = sorted(end_tokens(self.tokenizer, self.model))
        settings = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": ends, "num_beams": 1}
        settings |= {"suppress_tokens": sorted(place_tokens(self.model)) or None, **self.settings}
        streamer = Printed(self.tokenizer, write)
        with evaluating(self.model), torch.inference_mode(), suppress(KeyboardInterrupt):
            mask = torch.ones_like(begin)
            settings |= {"max_new_tokens": room, "streamer": streamer}
            self.model.generate(begin, attention_mask=mask, **settings, **inputs)
        # What waits for the end of a word; more than once is nothing.
        streamer.end()
        is_open = self.tokenizer.decode(ids[-TAIL:]).rstrip().endswith(OPEN)
        return [thinking_message(streamer.text, is_open)]

    def _with_tools(self, messages: Sequence[Message], write: Write) -> list[Message]:
        self.runner.response_length = self.room(self.length(messages))
        sampling = _own_sampling(self.model) | self.settings
        self.runner.settings |= {name: value for name, value in sampling.items() if value is not None}
        # The same question may have another answer.
        self.runner.seed += 1
        try:
            (episode,) = self.runner([self._plain(messages)])
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None
        write(shown(transcript(episode.messages)))
        return episode.messages

    def _plain(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which what was typed, and what tools said, spells no special token."""
        plain = self.runner.environment.turns.without_marks
        return [
            {**message, "content": plain(message["content"])}
            if message["role"] != "assistant" and isinstance(message["content"], str)
            else message
            for message in messages
        ]

    def length(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a conversation."""
        if self.runner is None:
            return len(self._encoded(messages)[0])
        try:
            return self.runner.lengths([self._plain(messages)])[0]
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None

    def room(self, length: int) -> int:
        """Return how many tokens an answer to a conversation of so many may have; nothing or less is no room."""
        context = max_length_of(self.model.config)
        return self.max_new_tokens if context is None else min(self.max_new_tokens, context - length)

    @staticmethod
    def _unwritable(error: Exception) -> InputError:
        if isinstance(error, InputError):
            return error
        return InputError(f"the chat template cannot write this conversation: {one_line(error)}")

    def _encoded(self, messages: Sequence[Message]) -> tuple[list[int], Mapping[str, torch.Tensor]]:
        try:
            if self.processor is not None:
                # Not by the processor itself: some cannot take both images and this.
                plain = [_without_tokens(message, self.tokenizer, self.processor) for message in messages]
                return encode_messages(plain, self.processor, add_generation_prompt=True)
            return tokenize_prompts([list(messages)], self.tokenizer, as_plain_text=True)[0], {}
        except (ValueError, *template_errors()) as error:
            raise self._unwritable(error) from None


def _own_sampling(model: "PreTrainedModel") -> dict[str, Any]:
    """Return how a model's generation config samples."""
    own = model.generation_config
    if not own.do_sample:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}


def _without_tokens(message: Message, tokenizer: "PreTrainedTokenizerBase", processor: "ProcessorMixin") -> Message:
    """Return a message of a person in which nothing spells a special token, or one that stands for an image."""
    if message["role"] == "assistant":
        return message
    tokens = [each.content for each in tokenizer.added_tokens_decoder.values() if each.special]
    tokens += words_of_places(processor)
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": unspelled(tokens, content)}
    parts = [{**part, "text": unspelled(tokens, part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def load_speaker(args: ChatArguments) -> Speaker:
    """Load the model that the flags name, with its tools."""
    from trl import ModelConfig

    names = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")
    model = named_model(ModelConfig(**{name: getattr(args, name) for name in names}))
    processor = processor_of(model.name, model.revision)
    loaded = load_speaking(model, processor)
    set_seed(args.seed)
    speaker = Speaker(loaded.model, loaded.tokenizer, processor, max_new_tokens=args.max_new_tokens)
    if args.tools or args.mcp_servers:
        tools = load_tools(args.tools, args.mcp_servers)
        limits = {"response_length": args.max_new_tokens, "tool_timeout": args.tool_timeout, "seed": args.seed}
        speaker.runner = ToolRunner(loaded.model, processor or loaded.tokenizer, tools, **limits)
    if args.top_p is not None:
        speaker.settings |= {"do_sample": True, "top_p": args.top_p}
    if args.temperature is not None:
        speaker.set_temperature(args.temperature)
    return speaker


def read_lines() -> Iterator[str]:
    """Yield what is typed, or the lines of a file or a pipe. Ctrl-C twice, like Ctrl-D, is the end."""
    # Keys for earlier lines, where the system has them.
    with suppress(ImportError):
        import readline  # noqa: F401
    if sys.stdin is None:
        return
    is_typed, was_stopped = sys.stdin.isatty(), False
    while True:
        try:
            line = encodable(input("\nyou: " if is_typed else ""))
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"a line is not {error.encoding}: {error.reason}") from None
        except KeyboardInterrupt:
            if was_stopped or not is_typed:
                return
            was_stopped = True
            print("\n(Ctrl-C again, or Ctrl-D, ends the conversation)")
            continue
        was_stopped = False
        if not is_typed and line.strip():
            _print(f"\nyou: {line}\n")
        yield line


class Chat:
    """A conversation: the questions, the answers, and the commands.

    Args:
        speaker: answers.
        system: what it is told before, or `None`.
        write: shows text.

    Attributes:
        messages: the conversation, without the system's message.
        images: its images, in their order.
    """

    def __init__(self, speaker: Speaker, system: str | None = None, write: Write | None = None):
        self.speaker, self.system, self.write = speaker, system, write or _print
        self.messages: list[Message] = []
        self.images: list[Image] = []
        self._waiting: list[Image] = []
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "undo": (self._undo, "take back the last question and what came after it"),
            "again": (self._again, "answer the last question again"),
            "clear": (self._clear, "begin a new conversation"),
            "system": (
                self._set_system,
                "TEXT: tell the model something before the conversation, or nothing",
            ),
            "temperature": (self._set_temperature, "NUMBER: sample at it, 0 is greedy"),
            "image": (self._add_image, "FILE: show it with the next question (vision-language models)"),
            "save": (self._save, "FILE.jsonl: add the conversation to it, as a row that hfllm sft reads"),
            "help": (self._help, "list the commands"),
        }

    def greet(self) -> None:
        """Say who answers."""
        model, tools = self.speaker.model, self.speaker.runner
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        names = f", tools: {', '.join(_names(tools))}" if tools is not None else ""
        name = getattr(model, "name_or_path", "") or type(model).__name__
        self.write(f"{name} ({size:,.1f} million parameters, {model.dtype}, {model.device}{names})\n")
        self.write("Ask; /help lists the commands, Ctrl-C ends an answer, Ctrl-D the conversation.\n")

    def take(self, line: str) -> bool:
        """Do what a line says, a question or a command; return whether the conversation continues."""
        line = line.strip()
        if line in ("/exit", "/quit"):
            return False
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._ask(line.removeprefix("/"))
            return True
        name, _, argument = line[1:].partition(" ")
        command = self.commands.get(name)
        if command is None:
            self._note(f"no command /{name}; there are: {', '.join(f'/{each}' for each in (*self.commands, 'exit'))}")
            return True
        try:
            command[0](argument.strip())
        except InputError as error:
            self._note(str(error))
        return True

    def _ask(self, question: str) -> None:
        images = self._waiting
        content = [{"type": "image", "image": image} for image in images]
        content = [*content, {"type": "text", "text": question}] if content else question
        self.messages.append({"role": "user", "content": content})
        self.images += images
        if self._answer():
            self._waiting = []
        else:
            self.messages.pop()
            del self.images[len(self.images) - len(images) :]

    def _answer(self) -> bool:
        """Answer the last question; return whether there was room and a way to."""
        try:
            messages = self._fitting()
            self.write("\nmodel: ")
            self.messages += self.speaker.answer(messages, self.write)
        except InputError as error:
            self._note(str(error))
            return False
        # Such as settings of the sampling that leave no token, and Ctrl-C while a tool works.
        except (RuntimeError, ValueError, KeyboardInterrupt) as error:
            self._note(f"no answer: {one_line(error) if str(error) else type(error).__name__}")
            return False
        self.write("\n")
        return True

    def _fitting(self) -> list[Message]:
        """Return the conversation with the earliest questions left out that have no room, and say so."""
        begins = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        before = [{"role": "system", "content": self.system}] if self.system else []
        for number, begin in enumerate(begins):
            messages = [*before, *self.messages[begin:]]
            if self.speaker.room(self.speaker.length(messages)) > 0:
                if number:
                    self._note(f"the model's context is full: it no longer reads the first {number} of {len(begins)}")
                return messages
        context = max_length_of(self.speaker.model.config)
        raise InputError(f"the question has no room in the model's context of {context} tokens with an answer to it")

    def _note(self, text: str) -> None:
        self.write(f"[{shown(text)}]\n")

    # ---- commands ----

    def _undo(self, argument: str) -> None:
        last = self._last_question()
        content = self.messages[last]["content"]
        count = len(content) - 1 if isinstance(content, list) else 0
        del self.messages[last:], self.images[len(self.images) - count :]
        self._note(f"taken back; {sum(message['role'] == 'user' for message in self.messages)} questions are left")

    def _again(self, argument: str) -> None:
        last = self._last_question()
        kept = self.messages[last + 1 :]
        del self.messages[last + 1 :]
        if not self._answer():
            self.messages += kept

    def _last_question(self) -> int:
        last = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not last:
            raise InputError("nothing was asked yet")
        return last[-1]

    def _clear(self, argument: str) -> None:
        self.messages, self.images, self._waiting = [], [], []
        self._note("a new conversation")

    def _set_system(self, argument: str) -> None:
        self.system = argument or None
        self._note("the model is told so from now on" if argument else "the model is told nothing before")

    def _set_temperature(self, argument: str) -> None:
        try:
            temperature = float(argument)
        except ValueError:
            temperature = -1.0
        if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
            raise InputError(
                f"/temperature {argument}: expected 0, or a number from {LEAST_TEMPERATURE:g} on, such as 0.7"
            )
        self.speaker.set_temperature(temperature)
        self._note("greedy" if temperature == 0 else f"temperature {temperature:g}")

    def _add_image(self, argument: str) -> None:
        if self.speaker.processor is None:
            raise InputError("/image: the model reads words alone")
        self._waiting.append(read_image(str(Path(argument).expanduser()), "/image"))
        self._note(f"{len(self._waiting)} shown with the next question")

    def _save(self, argument: str) -> None:
        if not argument.endswith(".jsonl"):
            raise InputError(f"/save {argument}: expected a file that ends in .jsonl")
        self._last_question()
        system = [{"role": "system", "content": self.system}] if self.system else []
        row: dict[str, Any] = {"messages": [*system, *map(_without_pixels, self.messages)]}
        if self.speaker.runner is not None:
            row["tools"] = self.speaker.runner.environment.schemas
        if self.images:
            # Within the row, since paths that lead out of a dataset's folder are refused.
            row["images"] = [
                f"data:image/png;base64,{base64.b64encode(png_of(each)).decode()}" for each in self.images
            ]
        try:
            with Path(argument).expanduser().open("a", encoding="utf-8") as file:
                file.write(encodable(json.dumps(row, ensure_ascii=False)) + "\n")
        except (OSError, ValueError) as error:
            raise InputError(f"/save {argument}: {getattr(error, 'strerror', None) or error}") from None
        self._note(f"added to {argument}")

    def _help(self, argument: str) -> None:
        for name, (_, text) in self.commands.items():
            self.write(f"/{name} {text}\n" if text[:1].isupper() else f"/{name}: {text}\n")
        self.write("/exit: end the conversation\n")


def _names(runner: ToolRunner) -> list[str]:
    return [schema["function"]["name"] for schema in runner.environment.schemas]


def _without_pixels(message: Message) -> Message:
    content = message["content"]
    if not isinstance(content, list):
        return message
    if message["role"] == "tool":
        return {**message, "content": content_text(content, "[image]")}
    return {**message, "content": [part if part["type"] == "text" else {"type": "image"} for part in content]}


def _print(text: str) -> None:
    # A terminal may not have each letter.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)

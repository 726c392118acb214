"""A conversation in the terminal: the model that answers, the commands, and what is kept."""

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

from hfllm.data.formats import Message
from hfllm.data.images.files import read_image
from hfllm.data.thoughts import OPEN, thinking_message
from hfllm.data.tokenizer import end_tokens, template_errors, tokenize_prompts
from hfllm.environments.runner import ToolRunner
from hfllm.errors import InputError, one_line
from hfllm.generation.scoring import evaluating
from hfllm.models.loading.saved import max_length_of
from hfllm.multimodal.processors import Pictures, encode_messages
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
        if self.runner is not None:
            self.runner.settings |= self.settings

    def answer(self, messages: Sequence[Message], write: Write) -> list[Message]:
        """Return the messages that answer a conversation, and write them meanwhile.

        Ctrl-C ends the answer, which is kept as far as it came.

        Raises:
            InputError: when the conversation has no room in the model's context, or the chat template cannot write it.
        """
        if self.runner is not None:
            (episode,) = self.runner([list(messages)])
            write(shown(transcript(episode.messages)))
            return episode.messages
        ids, images = self._encoded(messages)
        begin = torch.tensor([ids], device=self.model.device)
        inputs = Pictures([images]).inputs(begin, [0]) if images else {}
        room = self.room(len(ids))
        ends = sorted(end_tokens(self.tokenizer, self.model))
        settings = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": ends, **self.settings}
        streamer = Printed(self.tokenizer, write)
        with evaluating(self.model), torch.inference_mode(), suppress(KeyboardInterrupt):
            mask = torch.ones_like(begin)
            settings |= {"max_new_tokens": room, "streamer": streamer}
            self.model.generate(begin, attention_mask=mask, **settings, **inputs)
        # What waits for the end of a word; more than once is nothing.
        streamer.end()
        is_open = self.tokenizer.decode(ids[-TAIL:]).rstrip().endswith(OPEN)
        return [thinking_message(streamer.text, is_open)]

    def length(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a conversation."""
        return self.runner.lengths([list(messages)])[0] if self.runner is not None else len(self._encoded(messages)[0])

    def room(self, length: int) -> int:
        """Return how many tokens an answer to a conversation of so many may have; nothing or less is no room."""
        context = max_length_of(self.model.config)
        needed = self.max_new_tokens if self.runner is not None else 1
        left = self.max_new_tokens if context is None else min(self.max_new_tokens, context - length)
        return left if left >= needed else 0

    def _encoded(self, messages: Sequence[Message]) -> tuple[list[int], Mapping[str, torch.Tensor]]:
        try:
            if self.processor is not None:
                options = {"add_generation_prompt": True, "sanitize_control_tokens": True}
                return encode_messages(messages, self.processor, **options)
            return tokenize_prompts([list(messages)], self.tokenizer, as_plain_text=True)[0], {}
        except (ValueError, *template_errors()) as error:
            raise InputError(f"the chat template cannot write this conversation: {one_line(error)}") from None


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
        speaker.settings["top_p"] = args.top_p
    if args.temperature is not None:
        speaker.set_temperature(args.temperature)
    return speaker


def read_lines() -> Iterator[str]:
    """Yield what is typed, or the lines of a file or a pipe. Ctrl-C twice, like Ctrl-D, is the end."""
    # Keys for earlier lines, where the system has them.
    with suppress(ImportError):
        import readline  # noqa: F401
    is_typed, was_stopped = sys.stdin.isatty(), False
    while True:
        try:
            line = input("\nyou: " if is_typed else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_stopped or not is_typed:
                return
            was_stopped = True
            print("\n(Ctrl-C again, or Ctrl-D, ends the conversation)")
            continue
        was_stopped = False
        if not is_typed and line.strip():
            print(f"\nyou: {line}", flush=True)
        yield line


class Chat:
    """A conversation: the questions, the answers, and the commands.

    Args:
        speaker: answers.
        system: what it is told before, or `None`.
        write: shows text.

    Attributes:
        messages: the conversation, without the system's message.
        images: the paths of its images, in their order.
    """

    def __init__(self, speaker: Speaker, system: str | None = None, write: Write | None = None):
        self.speaker, self.system, self.write = speaker, system, write or _print
        self.messages: list[Message] = []
        self.images: list[str] = []
        self._waiting: list[tuple[str, Image]] = []
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
        if not line.startswith("/"):
            if line:
                self._ask(line)
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
        content = [{"type": "image", "image": image} for _, image in images]
        content = [*content, {"type": "text", "text": question}] if content else question
        self.messages.append({"role": "user", "content": content})
        self.images += [path for path, _ in images]
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
        if not 0 <= temperature < float("inf"):
            raise InputError(f"/temperature {argument}: expected a number from 0 on, such as 0.7")
        self.speaker.set_temperature(temperature)
        self._note("greedy" if temperature == 0 else f"temperature {temperature:g}")

    def _add_image(self, argument: str) -> None:
        if self.speaker.processor is None:
            raise InputError("/image: the model reads words alone")
        self._waiting.append((argument, read_image(argument, "/image")))
        self._note(f"{len(self._waiting)} shown with the next question")

    def _save(self, argument: str) -> None:
        if not argument.endswith(".jsonl"):
            raise InputError(f"/save {argument}: expected a file that ends in .jsonl")
        self._last_question()
        system = [{"role": "system", "content": self.system}] if self.system else []
        row = {"messages": [*system, *map(_without_pixels, self.messages)]}
        if self.images:
            row["images"] = [str(Path(path).resolve()) for path in self.images]
        try:
            with Path(argument).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"/save {argument}: {error.strerror}") from None
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
    return {**message, "content": [part if part["type"] == "text" else {"type": "image"} for part in content]}


def _print(text: str) -> None:
    print(text, end="", flush=True)

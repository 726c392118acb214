"""A conversation in the terminal: its commands, and what is kept."""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfllm.data.formats import Message, content_text
from hfllm.data.images.files import read_image
from hfllm.data.images.rows import png_of
from hfllm.data.passages import with_passages
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import encodable
from hfllm.errors import InputError, one_line
from hfllm.models.loading.saved import max_length_of
from hfllm.stages.chat.flags import ChatArguments
from hfllm.stages.chat.speaker import Speaker, load_speaker
from hfllm.stages.rlhf.build import load_tools

if TYPE_CHECKING:
    from PIL.Image import Image

Show = Callable[[str], None]
# What would move the cursor, change colors or turn lines around: a model may write anything.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Longer words are no file's name.
MOST_OF_NAME = 250
# Lower ones leave no token to sample.
LEAST_TEMPERATURE = 1e-3


def shown(text: str) -> str:
    """Return a text without characters that steer a terminal."""
    return CONTROL.sub("", text)


def load_chat(args: ChatArguments) -> "Chat":
    """Load the model that the flags name, with its tools."""
    speaker = load_speaker(args)
    if args.tools or args.mcp_servers:
        tools = load_tools(args.tools, args.mcp_servers)
        limits = {"response_length": args.max_new_tokens, "tool_timeout": args.tool_timeout, "seed": args.seed}
        speaker.runner = ToolRunner(speaker.model, speaker.processor or speaker.tokenizer, tools, **limits)
    if args.top_p is not None:
        speaker.settings |= {"do_sample": True, "top_p": args.top_p}
    if args.temperature is not None:
        speaker.set_temperature(args.temperature)
    return Chat(speaker, args.system)


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

    def __init__(self, speaker: Speaker, system: str | None = None, write: Show | None = None):
        self.speaker, self.system, self.write = speaker, system, write or _print
        self.messages: list[Message] = []
        self.images: list[Image] = []
        self._waiting: list[Image] = []
        self._passages: list[str] = []
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
            "passage": (
                self._add_passage,
                "TEXT or FILE: let the next question be answered from it",
            ),
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
        question = with_passages(question, self._passages)
        content = [*content, {"type": "text", "text": question}] if content else question
        self.messages.append({"role": "user", "content": content})
        self.images += images
        if self._answer():
            self._waiting, self._passages = [], []
        else:
            self.messages.pop()
            del self.images[len(self.images) - len(images) :]

    def _answer(self) -> bool:
        """Answer the last question; return whether there was room and a way to."""
        try:
            messages = self._fitting()
            self.write("\nmodel: ")
            self.messages += self.speaker.answer(messages, lambda text, tokens=(): self.write(shown(text)))
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
        self.messages, self.images, self._waiting, self._passages = [], [], [], []
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

    def _add_passage(self, argument: str) -> None:
        if not argument:
            raise InputError("/passage: expected a text, or a file with one")
        path = Path(argument).expanduser()
        try:
            # A text may be too long for a file's name.
            text = path.read_text(encoding="utf-8") if len(argument) < MOST_OF_NAME and path.is_file() else argument
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"/passage {argument}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}"
            ) from None
        self._passages.append(text)
        self._note(f"[{len(self._passages)}] is read with the next question")

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

"""Call the tools requested by a policy, whatever they do, and the built-in tools: sums, look-ups, retrieval."""

import ast
import copy
import inspect
import json
import math
import operator
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import thread as pools
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from hfllm.data.formats import Message
from hfllm.data.images.files import read_image
from hfllm.data.word_index import WordIndex, import_bm25s, words_of
from hfllm.environments.side_by_side import MAX_THREADS, Called, LateError, NoLoopError, called, run_together
from hfllm.errors import InputError, one_line, refuse_if

# ---- calls ----


Tool = Callable[..., Any]
# What a message shows of a result: text, or where there are images a list of parts, as in TRL: `{"type": "text",
# "text": ...}` and `{"type": "image", "image": ...}`.
Content = str | list[dict[str, Any]]


@dataclass
class Answers:
    """What the calls of one turn came to.

    Args:
        messages: the tools' messages, in the order of the calls; a failure is `{'error': ...}`.
        failures: how many calls failed.
        seconds: how long the calls took, without waiting for a thread.
    """

    messages: list[Message] = field(default_factory=list)
    failures: int = 0
    seconds: float = 0.0

    def add(self, name: str, content: "Content", has_failed: bool) -> None:
        """Add the answer to a call."""
        self.messages.append({"role": "tool", "name": name, "content": content})
        self.failures += has_failed


# Seconds between two looks at whether a coroutine blocks the loop, where a call may take longer.
LONGEST_PATIENCE = 3600.0


class ToolBox:
    """Python functions as tools, with TRL's rules: annotated arguments, and a docstring in Google's style.

    A function with an attribute `json_schema` has it as its schema.

    Coroutine functions are tools too: they run on one event loop that lasts, so a tool may keep a connection. Another
    tool runs in a thread of this process, a few of one name at once (see `MAX_THREADS`), or as many as the function's
    attribute `max_threads` says. All have the rights of the process.

    A result is an image of PIL, a list of parts with an image among them, or anything else as text (see `as_text`).

    Args:
        tools: the functions; a tool's name is the function's.
        timeout: seconds until a call is given up; a coroutine is cancelled, another tool's thread may still run.
        max_length: most characters of a result; longer ones are cut.
        reads_images: whether messages may have images. Otherwise a text stands for each, such as `[image]`.

    Attributes:
        is_late: whether a call was given up.

    Raises:
        InputError: for a tool without a JSON schema, or two of one name.
    """

    is_late = False

    def __init__(
        self, tools: Sequence[Tool], timeout: float = 10.0, max_length: int = 1000, reads_images: bool = False
    ):
        from transformers.utils import get_json_schema

        self.tools: dict[str, Tool] = {}
        self.schemas: list[dict[str, Any]] = []
        self.timeout, self.max_length, self.reads_images = timeout, max_length, reads_images
        for tool in tools:
            name = getattr(tool, "__name__", None)
            refuse_if(not callable(tool) or name is None, f"tools: {tool!r} is no function")
            refuse_if(name in self.tools, f"tools: two are named {name!r}")
            _check_parameters(name, tool)
            most = _max_threads(tool)
            is_number = isinstance(most, int) and not isinstance(most, bool) and most > 0
            refuse_if(not is_number, f"tools: {name!r} has max_threads {most!r}; expected a number from 1 on")
            try:
                self.schemas.append(getattr(tool, "json_schema", None) or get_json_schema(tool))
            # Of missing annotations or descriptions, all with errors of their own.
            except Exception as error:
                raise InputError(f"tools: {name!r} has no schema: {one_line(error)}") from error
            self.tools[name] = tool

    def bound(self, tools: Sequence[Tool]) -> "ToolBox":
        """Return a box like this one, with these functions in place of the tools of the same names."""
        box = copy.copy(self)
        box.tools, box.is_late = {**self.tools, **{tool.__name__: tool for tool in tools}}, False
        return box

    def call(self, call: Mapping[str, Any]) -> tuple[Message, bool]:
        """Return the tool's message for a call, and whether the call failed; a failure is `{'error': ...}`.

        Args:
            call: of an assistant's message, `{"type": "function", "function": {"name": ..., "arguments": ...}}`.
        """
        (answers,) = answers_of([(self, math.inf, [call])])
        return answers.messages[0], bool(answers.failures)

    async def answer(self, calls: Sequence[Mapping[str, Any]], seconds: float, answers: Answers) -> bool:
        """Add the answers to the calls of a turn, which are made one after another, as the turn wrote them.

        Args:
            seconds: for all of them together.
        """
        for call in calls:
            function = call.get("function", call)
            name = _name_of(call)
            try:
                done = await self._run(name, _arguments(function), seconds - answers.seconds)
                answers.seconds += done.seconds
                if isinstance(done.result, BaseException):
                    raise _Refused(_described(done.result))
                answers.add(name, self._cut(done.result), has_failed=False)
            except _Refused as error:
                answers.seconds += error.seconds
                answers.add(name, self._cut(str({"error": str(error)})), has_failed=True)
        return True

    def add_unanswered(self, calls: Sequence[Mapping[str, Any]], reason: str, answers: Answers) -> None:
        """Add the errors of the calls that have no answer."""
        for call in calls[len(answers.messages) :]:
            name = _name_of(call)
            answers.add(name, self._cut(str({"error": f"{name} {reason}"})), has_failed=True)

    async def _run(self, name: str, arguments: dict[str, Any], left: float) -> Called:
        tool = self.tools.get(name)
        if tool is None:
            raise _Refused(f"Tool {name} not found. There are: {', '.join(self.tools)}.")
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            raise _Refused(f"wrong arguments for {name}: {error}") from None
        if left <= 0:
            raise _Refused(f"{name} was not called: the episode's seconds for tools are over")

        def work() -> object:
            # The tool's changes to its arguments must not show in the call.
            return tool(**copy.deepcopy(arguments))

        shown = partial(_awaited if inspect.iscoroutinefunction(tool) else _content, work, self.reads_images)
        seconds = min(self.timeout, left)
        try:
            return await called(shown, seconds, f"tool-{name}"[:40], _max_threads(tool))
        except LateError:
            self.is_late = True
            _leave_behind()
            limit = f"{self.timeout:g} seconds" if seconds == self.timeout else "what is left of the episode's seconds"
            raise _Refused(f"{name} did not answer within {limit}", seconds) from None
        # The system has a limit, maybe reached through hanging tools.
        except RuntimeError as error:
            raise _Refused(f"{name} was not called: {error}") from None

    def _cut(self, content: Content) -> Content:
        if isinstance(content, list):
            return self._cut_parts(content)
        length = len(content)
        truncated = (
            content if length <= self.max_length else f"{content[: self.max_length]}... (cut, of {length} characters)"
        )
        return encodable(truncated)

    def _cut_parts(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return parts whose texts are no longer together than a result may be."""
        shown, left = [], self.max_length
        for part in parts:
            if part["type"] != "text":
                shown.append(part)
            elif left > 0:
                text = part["text"]
                more = "" if len(text) <= left else f"... (cut, of {len(text)} characters)"
                shown.append({**part, "text": encodable(text[:left] + more)})
                left -= len(text)
        return shown


def _name_of(call: Mapping[str, Any]) -> str:
    return encodable(str(call.get("function", call).get("name")))


def _max_threads(tool: Tool) -> int:
    return getattr(tool, "max_threads", MAX_THREADS)


def encodable(text: str) -> str:
    """Return a text fit for tokenizing, without halves of characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _check_parameters(name: str, tool: Tool) -> None:
    """Refuse a tool with arguments without names in a call."""
    try:
        parameters = inspect.signature(tool).parameters.values()
    # Of some functions not written in Python.
    except (TypeError, ValueError):
        return
    for each in parameters:
        if each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL):
            sort = "*" * (each.kind is each.VAR_POSITIONAL) + each.name
            raise InputError(f"tools: {name!r} takes {sort!r} by its place; calls give arguments by their names")


class _Refused(Exception):
    """The policy's message in place of a result, after so many seconds."""

    def __init__(self, message: str, seconds: float = 0.0):
        super().__init__(message)
        self.seconds = seconds


def answers_of(turns: Sequence[tuple[ToolBox, float, Sequence[Mapping[str, Any]]]]) -> list[Answers]:
    """Return the answers to the calls of several turns, which are called side by side.

    Args:
        turns: each turn's tools, the seconds that its calls may take together, and the calls.
    """
    if not turns:
        return []
    answers = [Answers() for _ in turns]
    coroutines = [box.answer(calls, seconds, own) for (box, seconds, calls), own in zip(turns, answers, strict=True)]
    patience = min(max(box.timeout for box, _, _ in turns), LONGEST_PATIENCE)
    reason = "did not answer: a coroutine blocked the event loop, where it must wait by `await`"
    try:
        have_ended = run_together(coroutines, patience)
    except NoLoopError as error:
        have_ended, reason = [None] * len(turns), f"was not called: {error}"
    except BaseException:
        # At Ctrl-C: a method of an environment may still run.
        for box, _, _ in turns:
            box.is_late = True
        raise
    for index, (box, _, calls) in enumerate(turns):
        if not have_ended[index]:
            box.is_late = True
            # The loop may go on, and add to its own.
            answers[index] = replace(answers[index], messages=list(answers[index].messages))
            box.add_unanswered(calls, reason, answers[index])
    return answers


async def _awaited(work: Callable[[], Awaitable[object]], reads_images: bool) -> Content:
    return as_content(await work(), reads_images)


def _content(work: Callable[[], object], reads_images: bool) -> Content | Coroutine[Any, Any, Content]:
    """Return what is shown of a function's result, or a coroutine of it where it returned a coroutine."""
    result = work()
    return _awaited(lambda: result, reads_images) if inspect.iscoroutine(result) else as_content(result, reads_images)


def _leave_behind() -> None:
    """Let the process end without waiting for thread pools of hanging tools.

    Threads of a tool are daemons as the tool's own thread is, and do not keep a process from ending. Yet Python waits
    at its end for all threads of pools, such as the pool of `asyncio.to_thread`, daemons or not.
    """
    queues = getattr(pools, "_threads_queues", {})
    for thread in [thread for thread in queues if thread.daemon]:
        queues.pop(thread, None)


def as_content(result: object, reads_images: bool) -> Content:
    """Return what a message shows of a tool's result: text, or parts where it has images.

    Args:
        reads_images: see `ToolBox`.

    Raises:
        BadImage: for an image that cannot be read.
    """
    parts = _parts(result)
    if parts is None:
        return as_text(result)
    if not reads_images:
        return "\n".join(
            as_text(part["text"]) if part["type"] == "text" else f"[{part.get('mime_type', 'image')}]"
            for part in parts
        )
    return [
        {"type": "text", "text": as_text(part["text"])}
        if part["type"] == "text"
        else {"type": "image", "image": read_image(part["image"], "the result")}
        for part in parts
    ]


def _parts(result: object) -> list[dict[str, Any]] | None:
    """Return a result as parts if it has images: of PIL, at the frame where they stand, or in parts; else `None`."""
    pillow = sys.modules.get("PIL.Image")
    items = list(result) if isinstance(result, list | tuple) else [result]
    parts = []
    for item in items:
        if pillow is not None and isinstance(item, pillow.Image):
            item = {"type": "image", "image": item}
        if not isinstance(item, dict) or item.get("type") not in ("image", "text") or item["type"] not in item:
            return None
        if pillow is not None and isinstance(item.get("image"), pillow.Image):
            item = {**item, "image": item["image"].copy()}
        parts.append(item)
    return parts if any(part["type"] == "image" for part in parts) else None


def as_text(result: object) -> str:
    """Return a tool's result as text: bytes as UTF-8, anything else as `str` gives it."""
    if isinstance(result, bytes | bytearray):
        return result.decode("utf-8", "replace")
    return str(result)


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments, also from JSON text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise _Refused(f"the arguments are no JSON: {arguments[:80]}") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise _Refused(f"the arguments must be an object of names and values, got {str(arguments)[:80]}")
    return arguments


# ---- built in ----
#
# Built-in tools of the package: a calculator, look-ups in a table and in passages, and Python.


Value = TypeVar("Value")
LONGEST_EXPRESSION, MOST_BITS = 200, 4096
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """Work out a sum, such as 12 * (3 + 4).

    Args:
        expression: numbers with + - * / // % ** and parentheses.
    """
    # Names, calls and anything else with code for Python to run are not read.
    expression = str(expression)
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no sum") from None
    if isinstance(value, float):
        # 0.1 + 0.2 is 0.3, and 6 / 2 is 3; with all the certain digits of a float.
        return f"{value:.15g}" if not value.is_integer() or abs(value) >= 1e15 else str(int(value))
    return str(value)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * max(math.log2(abs(left) or 1), 0) > MOST_BITS:
            raise ValueError("the result is too large")
        value = OPERATORS[type(node.op)](left, right)
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are understood")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError("the result is too large")
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("the result is no number")
    return value


def lookup_in(table: Mapping[str, Mapping[str, object]]) -> Callable[[str, str], str]:
    """Return a tool `lookup(key, attribute)` over a table, such as `{"owl": {"color": "gray"}}`.

    Letter case and spaces around a word do not matter. A missing word is reported, with the table's own words.

    Raises:
        InputError: for something else than such a table, and for words in it with differences only in case or spaces.
    """
    if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
        raise InputError(f'lookup_in: expected a table such as {{"owl": {{"color": "gray"}}}}, got {str(table)[:80]}')
    rows = _by_plain_word({key: _by_plain_word(row) for key, row in table.items()})

    def lookup(key: str, attribute: str) -> str:
        """Look up what is known of something.

        Args:
            key: its name.
            attribute: what to look up of it.
        """
        row = rows.get(_plain(key))
        if row is None:
            raise LookupError(f"nothing is known of {key!r}")
        if _plain(attribute) not in row:
            raise LookupError(f"{attribute!r} is not known; there are: {', '.join(row)}")
        return str(row[_plain(attribute)])

    return lookup


def _by_plain_word(row: Mapping[str, Value]) -> dict[str, Value]:
    results: dict[str, Value] = {}
    for word, value in row.items():
        if _plain(word) in results:
            raise InputError(f"lookup_in: {word!r} comes twice, where letter case and spaces around it do not matter")
        results[_plain(word)] = value
    return results


def _plain(word: str) -> str:
    return str(word).strip().casefold()


# ---- retrieval ----
#
# A tool for finding passages by words.


def retrieval_over(passages: Sequence[str], top_k: int = 3) -> Callable[[str], str]:
    """Return a tool `search(query)`, which gives the best passages by BM25, one per line.

    Words are compared without letter case; passages without common words with the query are not given. Of equal
    scores the earlier passage comes first. `hfllm.data.word_index.WordIndex` has the formula.

    Args:
        passages: texts to search.
        top_k: the maximum of passages per search.

    Raises:
        InputError: without passages, for a text in place of a list, a bad `top_k`, or when bm25s is not installed.
    """
    import_bm25s("retrieval_over", "tools")
    if isinstance(passages, str):
        raise InputError(f"retrieval_over: expected a list of passages, got the text {passages[:40]!r}")
    texts = [" ".join(str(passage).split()) for passage in passages]
    refuse_if(not any(map(words_of, texts)), f"retrieval_over: none of {len(texts)} passages has a word")
    refuse_if(top_k < 1, f"retrieval_over: top_k must be at least 1, got {top_k}")
    index = WordIndex()
    index.add(texts)
    # Tools may be called from several threads.
    index.finish()

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: words to find.
        """
        results = index.search(str(query), top_k)
        if not results:
            raise LookupError(f"no passage has a word of {str(query)[:80]!r}")
        return "\n".join(texts[position] for position, _ in results)

    return search

"""Questions answered with tools: whether they are called when needed, and not otherwise, and what comes of errors.

    right              the final answer is the row's, as `exact_match` compares them
    called             a tool was called, on questions that need one: the row's, where the row names it
    called_needlessly  a tool was called, on questions that need none; less is better
    failed_calls       the share of calls that failed

Questions that need a tool are asked twice more: with a first call that fails whatever it asks for, so that who relies
on it must call again, and, as a control, without tools.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hfllm.data.formats import Message
from hfllm.environments.episodes import Episode, add_methods
from hfllm.environments.runner import ToolRunner
from hfllm.environments.tools import Tool, ToolBox
from hfllm.errors import InputError, refuse_if
from hfllm.evaluation.suites.base import TOO_LONG, Item, Record, Subject, Suite, rows_of
from hfllm.models.loading.saved import max_length_of
from hfllm.rewards.functions import exact_match, transcript

FLAG = "--dataset_name"
NEEDED, NEEDLESS, ASKED = "needs a tool", "needs no tool", "asked"
FAILING, WITHOUT = "its first call fails", "without tools (control)"
# Turns of an episode in the length of a written answer.
TURNS = 4
ERROR = "the service did not answer, try again"


@dataclass(frozen=True)
class ToolQuestion:
    """A question.

    Args:
        prompt: messages up to the user's.
        answer: the right one.
        tool: the name of the tool that it needs; empty where any will do, or none is needed.
    """

    prompt: list[Message]
    answer: str
    tool: str


class Tools(Suite[ToolQuestion]):
    """Rows with a question in `prompt`, a text or messages, and its `answer`.

    A column `tool` says which tool a question needs: its name, or nothing for none. Without this column it is only
    seen whether tools are called.

    Args:
        path: the rows' file.
        tools: functions for the models to call.
        num_items: the first rows; by default all.
        max_new_tokens: of a turn; an episode has room for four, with the tools' words.
        timeout: seconds for a call.
    """

    name: ClassVar[str] = "tools"
    better: ClassVar[Mapping[str, int]] = {"right": 1, "called": 1, "called_needlessly": -1, "failed_calls": -1}
    primary: ClassVar[Sequence[str]] = ("right", "called", "called_needlessly")

    def __init__(
        self,
        path: str,
        tools: Sequence[Tool],
        num_items: int | None = None,
        max_new_tokens: int = 64,
        timeout: float = 10.0,
    ):
        self.path, self.num_items, self.timeout = path, num_items, timeout
        self.tools, self.response_length = list(tools), TURNS * max_new_tokens

    def primary_of(self, group: str) -> Sequence[str]:
        return () if group == WITHOUT else self.primary

    def items(self) -> list[Item[ToolQuestion]]:
        rows = rows_of(self.path, ("prompt", "answer"), FLAG)[: self.num_items]
        says_which = any("tool" in row for _, row in rows)
        names = [tool.__name__ for tool in self.tools]
        result = []
        for number, (origin, row) in enumerate(rows, 1):
            tool = str(row.get("tool") or "")
            refuse_if(tool and tool not in names, f"{origin}: its tool is {tool!r}; there are: {', '.join(names)}")
            question = ToolQuestion(_messages(origin, row["prompt"]), str(row["answer"]), tool)
            group = (NEEDED if tool else NEEDLESS) if says_which else ASKED
            groups = [group] if group == NEEDLESS else [group, FAILING, WITHOUT]
            result += [Item(f"{number:05d} {each}", each, question) for each in groups]
        return result

    def judge(self, subject: Subject, items: Sequence[Item[ToolQuestion]]) -> Iterator[Record]:
        by_group: dict[str, list[Item[ToolQuestion]]] = {}
        for item in items:
            by_group.setdefault(item.group, []).append(item)
        for group, each in by_group.items():
            yield from self._without(subject, each) if group == WITHOUT else self._with(subject, each, group)

    def _without(self, subject: Subject, items: Sequence[Item[ToolQuestion]]) -> Iterator[Record]:
        answers = subject.iter_answers([item.body.prompt for item in items], self.response_length // TURNS)
        for item, said in zip(items, answers, strict=True):
            asked = item.body.prompt[-1]["content"]
            if said is None:
                yield self.record(subject, item, asked=asked, skipped=TOO_LONG)
            else:
                yield self.record(subject, item, {"right": _is_right(item.body, said)}, asked, said)

    def _with(self, subject: Subject, items: Sequence[Item[ToolQuestion]], group: str) -> Iterator[Record]:
        runner = self._runner(subject, group == FAILING)
        longest = max_length_of(subject.model.config)
        for start in range(0, len(items), subject.batch_size):
            block = items[start : start + subject.batch_size]
            rows = [{"prompt": item.body.prompt} for item in block]
            room = math.inf if longest is None else longest - self.response_length
            fits = [length <= room for length in runner.lengths(rows)]
            episodes = iter(runner([row for row, is_short in zip(rows, fits, strict=True) if is_short]))
            for item, is_short in zip(block, fits, strict=True):
                asked = item.body.prompt[-1]["content"]
                if is_short:
                    yield self._judged(subject, item, next(episodes), asked)
                else:
                    yield self.record(subject, item, asked=asked, skipped=TOO_LONG)

    def _runner(self, subject: Subject, fails_first: bool) -> ToolRunner:
        tools = {"environment_factory": failing_first(self.tools)} if fails_first else {"tools": self.tools}
        settings = {"response_length": self.response_length, "tool_timeout": self.timeout}
        try:
            return ToolRunner(subject.model, subject.tokenizer, **tools, **settings, batch_size=subject.batch_size)
        except InputError as error:
            raise InputError(f"--suites tools: {subject.label}: {error}") from None

    def _judged(self, subject: Subject, item: Item[ToolQuestion], episode: Episode, asked: str) -> Record:
        called = [call["function"]["name"] for each in episode.messages for call in each.get("tool_calls") or ()]
        final = episode.messages[-1] if episode.messages else {}
        answer = final.get("content") or "" if final.get("role") == "assistant" and not final.get("tool_calls") else ""
        scores = {"right": _is_right(item.body, answer)}
        if item.group == NEEDLESS:
            scores["called_needlessly"] = float(bool(called))
        else:
            scores["called"] = float(item.body.tool in called if item.body.tool else bool(called))
        if episode.calls and item.group != FAILING:
            scores["failed_calls"] = episode.failures / episode.calls
        return self.record(subject, item, scores, asked, transcript(episode.messages))


def _is_right(question: ToolQuestion, answer: str) -> float:
    completion = [{"role": "assistant", "content": answer}]
    return exact_match([question.prompt], [completion], answer=[question.answer])[0]


def _messages(origin: str, prompt: object) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    is_list = isinstance(prompt, list) and bool(prompt) and all(isinstance(each, dict) for each in prompt)
    is_text = is_list and all(isinstance(each.get("content"), str) for each in prompt)
    if not is_text or prompt[-1].get("role") != "user":
        raise InputError(f"{origin}: prompt is {str(prompt)[:80]!r}; expected a text, or messages up to the user's")
    return prompt


def failing_first(tools: Sequence[Tool]) -> type:
    """Return a class of environments with these tools, whose first call in an episode fails."""

    class FirstCallFails:
        def reset(self, **row: object) -> None:
            self._has_failed = False

    schemas = ToolBox(tools).schemas
    methods = {tool.__name__: _method_of(tool, schema) for tool, schema in zip(tools, schemas, strict=True)}
    add_methods(FirstCallFails, methods, "--suites tools")
    return FirstCallFails


def _method_of(tool: Tool, schema: dict[str, Any]) -> Tool:
    def method(self, /, **arguments: object) -> object:
        if not self._has_failed:
            self._has_failed = True
            raise ConnectionError(ERROR)
        return tool(**arguments)

    # With the arguments of the tool, so that wrong ones are told as the tool's own.
    own = inspect.signature(tool)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = own.replace(parameters=[this, *own.parameters.values()])
    method.__name__, method.json_schema = schema["function"]["name"], schema
    if hasattr(tool, "max_threads"):
        method.max_threads = tool.max_threads
    return method

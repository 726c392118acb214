"""Environments with a state: an instance of a class for each episode, whose methods are the episode's tools."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hfllm.data.rows import Message
from hfllm.environments.tools import Tool, ToolBox, encodable
from hfllm.errors import InputError

EnvironmentFactory = Callable[[], Any]
FLAG = "environment_factory"


class StatefulEnvironments:
    """The instances of an `environment_factory`, as TRL's GRPOTrainer has them.

    An instance is made once and reset for each of its episodes. One whose method did not answer in time is not used
    for another episode, since the method may still change it.

    Args:
        factory: makes an instance: a class with `reset(**row)`, which returns `None` or text that is added to the last
            message of the prompt, and public methods that are tools. With `get_reward()` it has a reward of its own.
        tools: that are not methods.
        timeout, max_length: see `ToolBox`.

    Raises:
        InputError: for a factory that fails, an instance without `reset` or tools, or tools without schemas.
    """

    def __init__(self, factory: EnvironmentFactory, tools: Sequence[Tool], timeout: float, max_length: int):
        if isinstance(factory, Mapping) or not callable(factory):
            raise InputError(f"{FLAG}: expected a class or a function that makes one environment, got {factory!r}")
        self.factory, self._tools = factory, list(tools)
        first = self._make()
        self.name = type(first).__name__
        if not callable(getattr(first, "reset", None)):
            raise InputError(f"{FLAG}: {self.name} has no method reset, which begins an episode")
        self.has_reward = callable(getattr(first, "get_reward", None))
        if not methods_of(first):
            raise InputError(f"{FLAG}: {self.name} has no public method, which would be a tool")
        self.tools = ToolBox([*self._tools, *methods_of(first)], timeout, max_length)
        self._free = [first]
        self.current: list[Any] = []
        self.told: list[str] = []
        self.boxes: list[ToolBox] = []

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Message]]:
        """Reset an environment for each row, and return the rows' prompts with what the environments say.

        Raises:
            InputError: when `reset` fails, naming the row, or returns something else than text or `None`.
        """
        done = [each for each, box in zip(self.current, self.boxes, strict=True) if not box.is_late]
        self._free = [*done, *self._free]
        while len(self._free) < len(rows):
            self._free.append(self._make())
        self.current, self._free = self._free[: len(rows)], self._free[len(rows) :]
        self.boxes = [self.tools.bound(methods_of(each)) for each in self.current]
        self.told = [self._reset(*each) for each in zip(self.current, rows, strict=True)]
        return [_with_more(row["prompt"], told) for row, told in zip(rows, self.told, strict=True)]

    def get_reward(self, environments: Sequence[Any], **columns: object) -> list[float]:
        """Return the environments' own rewards of the episodes that have just ended."""
        rewards = [each.get_reward() for each in environments]
        return [asyncio.run(each) if inspect.iscoroutine(each) else each for each in rewards]

    def _make(self) -> Any:
        try:
            return self.factory()
        except Exception as error:
            raise InputError(f"{FLAG}: it failed with {error!r}") from error

    def _reset(self, environment: Any, row: Mapping[str, Any]) -> str:
        """Reset an environment, and return what it says; an empty text for nothing."""
        prompt = row["prompt"]
        if not prompt:
            raise InputError(f"{FLAG}: a prompt has no message, to which {self.name}.reset could add")
        origin = f"{FLAG}: {self.name}.reset for the prompt {str(prompt[-1].get('content'))[:80]!r}"
        try:
            said = environment.reset(**row)
        except Exception as error:
            raise InputError(f"{origin} failed with {error!r}") from error
        if not isinstance(said, str | None):
            raise InputError(f"{origin} returned {type(said).__name__}; expected text or None")
        return encodable(said or "")


def _with_more(prompt: Sequence[Message], told: str) -> list[Message]:
    """Return a prompt with a text added to its last message."""
    if not told:
        return list(prompt)
    content = prompt[-1].get("content") or ""
    added = told if isinstance(content, str) else [{"type": "text", "text": told}]
    return [*prompt[:-1], {**prompt[-1], "content": content + added}]


def methods_of(environment: object) -> list[Tool]:
    """Return the public methods of an environment's class that are tools: all but `reset` and `get_reward`."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    kept = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
    return [getattr(environment, name) for name in kept]

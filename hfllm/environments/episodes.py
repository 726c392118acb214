"""Episodes: texts written in turn by a policy and its environment, and environments of tools, with state too.

Tokens in, tokens out: sampled tokens are never decoded and tokenized again, so the policy is trained on exactly its
chosen tokens, after exactly the tokens it read.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from hfllm.data.formats import Message, OriginRow, origin_of
from hfllm.data.tokenizer import tokenize_prompts
from hfllm.environments.side_by_side import settled
from hfllm.environments.tool_turns import ToolTurns, can_show_images
from hfllm.environments.tools import Tool, ToolBox, answers_of, encodable
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from hfllm.environments.tool_turns import ProcessingClass
    from hfllm.multimodal.processors import ImageTensors, Pictures


# ---- episodes ----


# From sequences of token ids and the most tokens to add: lists of sampled tokens, and whether they came to an end.
# Where some sequences have images, these are a third argument: of each sequence what `Episode.images` says.
Continue = Callable[..., Sequence[tuple[list[int], bool]]]


@dataclass
class Episode:
    """One prompt and all that follows.

    Args:
        prompt_ids: the prompt's tokens.
        response_ids: tokens written by policy and environment, in order.
        action_mask: for every one of `response_ids` 1 if it is the policy's choice, 0 if the environment's.
        is_ended: whether it came to its end, and was not cut off by a limit of length.
        messages: the response as messages, if it is a conversation.
        calls, failures: calls of tools, and how many of them failed.
        tool_seconds: how long these calls took.
        place: index among the prompts sampled with it.
        images: the images read so far: of the prompt, and of replies.
    """

    prompt_ids: list[int]
    response_ids: list[int] = field(default_factory=list)
    action_mask: list[int] = field(default_factory=list)
    is_ended: bool = False
    messages: list[Message] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    tool_seconds: float = 0.0
    place: int = 0
    images: "list[ImageTensors]" = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Return all tokens so far."""
        return [*self.prompt_ids, *self.response_ids]

    @property
    def unread(self) -> int:
        """Return the number of tokens after the policy's last one."""
        return next((at for at, is_own in enumerate(reversed(self.action_mask)) if is_own), len(self.action_mask))

    def act(self, ids: Sequence[int]) -> None:
        """Append tokens of the policy."""
        self.response_ids += ids
        self.action_mask += [1] * len(ids)

    def read(self, ids: Sequence[int], images: "ImageTensors | None" = None) -> None:
        """Append tokens of the environment, with their images."""
        if images is not None:
            self.images.append((len(self.prompt_ids) + len(self.response_ids) + images[0], images[1]))
        self.response_ids += ids
        self.action_mask += [0] * len(ids)


@dataclass
class Turn:
    """A turn of the policy to be answered.

    Args:
        episode: all so far, with the turn.
        ids: the tokens of the policy's last turn.
        is_ended: whether it ended its turn; a cut-off turn has no room for an answer.
        room: the maximum of tokens of a reply.
        images: set by the environment where its reply has images: where in it their tokens begin, and their tensors.
    """

    episode: Episode
    ids: Sequence[int]
    is_ended: bool
    room: int
    images: "ImageTensors | None" = None


class Environment(Protocol):
    """The interface for answers to the policy's turns."""

    def replies(self, turns: Sequence[Turn]) -> Sequence[list[int] | None]:
        """Return for each turn the tokens after it, with the opening of the policy's next turn.

        Args:
            turns: of all unfinished episodes, which may be answered side by side.

        Returns:
            `None` to end an episode. A reply longer than the turn's `room` is left out, and the episode is cut off.
        """
        ...


def run_episodes(
    prompts: Sequence[Sequence[int]],
    continue_ids: Continue,
    environment: Environment,
    response_length: int,
    before_turn: Callable[[Sequence[Episode]], None] | None = None,
    pictures: "Pictures | None" = None,
) -> list[Episode]:
    """Let the policy act until every episode ends, all unfinished ones together in every turn.

    Args:
        prompts: token ids.
        continue_ids: samples from the policy.
        environment: answers its turns.
        response_length: the most tokens of an episode, with those of the environment.
        before_turn: called with the continuing episodes, before the policy writes their next turns.
        pictures: the images of the prompts.
    """
    episodes = [Episode(list(prompt), place=index) for index, prompt in enumerate(prompts)]
    for episode, tensors in zip(episodes, () if pictures is None else pictures.episodes, strict=False):
        episode.images += [(0, tensors)] if tensors else []
    going = episodes
    while going:
        if before_turn is not None:
            before_turn(going)
        room = response_length - min(len(episode.response_ids) for episode in going)
        images = [list(episode.images) for episode in going]
        turns = continue_ids([episode.ids for episode in going], room, *([images] if any(images) else []))
        taken = [_act(episode, *turn, response_length) for episode, turn in zip(going, turns, strict=True)]
        replies = environment.replies(taken)
        going = [turn.episode for turn, reply in zip(taken, replies, strict=True) if _read(turn, reply)]
        # Replies of like length are read together.
        going.sort(key=lambda episode: episode.unread)
    return episodes


def _act(episode: Episode, ids: Sequence[int], is_ended: bool, response_length: int) -> Turn:
    """Append a turn of the policy, and return it."""
    room = response_length - len(episode.response_ids)
    # Others of the batch may have had more room.
    ids, episode.is_ended = list(ids[:room]), is_ended and len(ids) <= room
    episode.act(ids)
    # A reply filling the episode would leave the policy no token for an answer.
    return Turn(episode, ids, episode.is_ended, room - len(ids) - 1)


def _read(turn: Turn, reply: Sequence[int] | None) -> bool:
    """Append the reply to a turn; return whether the policy's next turn follows."""
    if reply is None:
        return False
    turn.episode.is_ended = False
    if len(reply) > turn.room:
        return False
    turn.episode.read(reply, turn.images)
    return True


# ---- stateful ----
#
# Environments with a state: an instance of a class per episode, with its methods as the episode's tools.


EnvironmentFactory = Callable[[], Any]
FLAG = "environment_factory"
# The column that names a row's environment, where there are several.
ENVIRONMENT = "environment"


class _Kind:
    """The instances of one factory, made once and reset for each of their episodes.

    Attributes:
        name: of the instances' class.
        tools: their methods, and the tools of all.
        free: instances that are in no episode.
    """

    def __init__(
        self, factory: EnvironmentFactory, tools: Sequence[Tool], timeout: float, max_length: int, reads_images: bool
    ):
        if not callable(factory):
            raise InputError(f"{FLAG}: expected a class or a function that makes one environment, got {factory!r}")
        self._factory = factory
        first = self._make()
        self.type, self.name = type(first), type(first).__name__
        if not callable(getattr(first, "reset", None)):
            raise InputError(f"{FLAG}: {self.name} has no method reset, which begins an episode")
        self.has_reward = callable(getattr(first, "get_reward", None))
        refuse_if(not methods_of(first), f"{FLAG}: {self.name} has no public method, which would be a tool")
        self.tools = ToolBox([*tools, *methods_of(first)], timeout, max_length, reads_images)
        self.free = [first]

    def _make(self) -> Any:
        try:
            return self._factory()
        except Exception as error:
            raise InputError(f"{FLAG}: it failed with {error!r}") from error

    def take(self) -> Any:
        """Return an instance for an episode."""
        return self.free.pop(0) if self.free else self._make()


class StatefulEnvironments:
    """The instances of an `environment_factory`, as TRL's GRPOTrainer has them.

    An instance is made once and reset for each of its episodes. An instance whose method exceeded its time limit is
    not used for another episode, since the method may still change it.

    Args:
        factory: makes an instance: a class with `reset(**row)`, which returns `None` or text to add to the last
            message of the prompt, and public methods as tools. With `get_reward()` it has a reward of its own. Several
            of them by name, of which each row's column `environment` names one; `reset` does not get this column.
        tools: further tools, other than methods.
        timeout, max_length, reads_images: see `ToolBox`.

    Attributes:
        schemas: of all tools, those of several classes once.

    Raises:
        InputError: for a failing factory, an instance without `reset` or tools, or tools without schemas.
    """

    def __init__(
        self,
        factory: EnvironmentFactory | Mapping[str, EnvironmentFactory],
        tools: Sequence[Tool],
        timeout: float,
        max_length: int,
        reads_images: bool = False,
    ):
        self.is_by_row = isinstance(factory, Mapping)
        factories = dict(factory) if self.is_by_row else {None: factory}
        refuse_if(not factories, f"{FLAG}: it names no environment")
        self.kinds = {name: _Kind(each, tools, timeout, max_length, reads_images) for name, each in factories.items()}
        self.schemas: list[dict[str, Any]] = []
        for kind in self.kinds.values():
            self.schemas += [schema for schema in kind.tools.schemas if schema not in self.schemas]
        self._in_use: list[_Kind] = []
        self.current: list[Any] = []
        self.observations: list[str] = []
        self.boxes: list[ToolBox] = []

    def kind_of(self, row: Mapping[str, Any]) -> _Kind:
        """Return the instances for a row.

        Raises:
            InputError: where its column `environment` names none.
        """
        name = row.get(ENVIRONMENT) if self.is_by_row else None
        if not isinstance(name, str | None) or name not in self.kinds:
            known, origin = ", ".join(map(str, self.kinds)), origin_of(row, "a row")
            raise InputError(f"{FLAG}: {origin} has the environment {name!r} in its column; there are: {known}")
        return self.kinds[name]

    @property
    def rewards(self) -> list[Callable[..., list[float]]]:
        """Return the rewards of their own, by the names of the classes that have one."""
        kinds = {kind.type: kind.name for kind in self.kinds.values() if kind.has_reward}
        rewards = [partial(self.get_reward, kind) for kind in kinds]
        for reward, name in zip(rewards, kinds.values(), strict=True):
            reward.__name__ = name
        return rewards

    def begin(self, rows: Sequence[Mapping[str, Any]], plain: Callable[[str], str] = str) -> list[list[Message]]:
        """Reset an environment for every row, and return the rows' prompts with the environments' texts.

        Args:
            plain: applied to these texts, see `ToolTurns.plain`.

        Raises:
            InputError: when `reset` fails, naming the row, or returns something else than text or `None`.
        """
        for kind, environment, box in reversed(list(zip(self._in_use, self.current, self.boxes, strict=True))):
            kind.free[:0] = [environment] * (not box.is_late)
        self._in_use = list(map(self.kind_of, rows))
        self.current = [kind.take() for kind in self._in_use]
        self.boxes = [
            kind.tools.bound(methods_of(each)) for kind, each in zip(self._in_use, self.current, strict=True)
        ]
        self.observations = list(map(plain, self._reset(rows)))
        return [_with_more(row["prompt"], text) for row, text in zip(rows, self.observations, strict=True)]

    @staticmethod
    def get_reward(kind: type, environments: Sequence[Any], **columns: object) -> list[float]:
        """Return a class's own rewards of the just finished episodes, 0 for environments of other classes."""
        rewards = settled([each.get_reward() if type(each) is kind else 0.0 for each in environments])
        if error := next((each for each in rewards if isinstance(each, Exception)), None):
            raise error
        return rewards

    def _reset(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Reset the environments, coroutines side by side, and return their texts; an empty text for none."""
        begun: list[object] = []
        names = [kind.name for kind in self._in_use]
        for name, environment, row in zip(names, self.current, rows, strict=True):
            refuse_if(not row["prompt"], f"{FLAG}: a prompt has no message, to which {name}.reset could add")
            columns = {key: value for key, value in row.items() if not (self.is_by_row and key == ENVIRONMENT)}
            try:
                begun.append(environment.reset(**columns))
            except Exception as error:
                begun.append(error)
                break
        observations = settled(begun)
        for name, row, observation in zip(names, rows, observations, strict=False):
            origin = f"{FLAG}: {name}.reset for the prompt {str(row['prompt'][-1].get('content'))[:80]!r}"
            if isinstance(observation, Exception):
                raise InputError(f"{origin} failed with {observation!r}") from observation
            if not isinstance(observation, str | None):
                raise InputError(f"{origin} returned {type(observation).__name__}; expected text or None")
        return [encodable(observation or "") for observation in observations]


def _with_more(prompt: Sequence[Message], text: str) -> list[Message]:
    """Return a prompt with a text added to its last message."""
    if not text:
        return list(prompt)
    content = prompt[-1].get("content") or ""
    added = text if isinstance(content, str) else [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": content + added}]


def methods_of(environment: object) -> list[Tool]:
    """Return the tools among the public methods of an environment's class: all but `reset` and `get_reward`."""
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    tool_names = [name for name in names if not name.startswith("_") and name not in ("reset", "get_reward")]
    return [getattr(environment, name) for name in tool_names]


def add_methods(kind: type, methods: Mapping[str, Tool], origin: str) -> None:
    """Let a class of environments have further tools.

    Raises:
        InputError: for a name that an environment has itself, or that makes no tool.
    """
    for name, method in methods.items():
        is_taken = name.startswith("_") or name in ("reset", "get_reward") or hasattr(kind, name)
        refuse_if(
            is_taken, f"{origin}: a tool is named {name!r}, which an environment has itself: give it another name"
        )
        setattr(kind, name, method)


# ---- tool environment ----
#
# Tools as the environment of a policy: it calls them, reads their results, and answers.


class ToolEnvironment:
    """Environment for answers to calls of tools; a turn without calls ends the episode.

    Args:
        tools, timeout, max_length: see `ToolBox`.
        processing_class, end_token_ids: see `ToolTurns`; with a processor tools may return images.
        max_iterations: answered turns with calls; the call after them ends the episode. `None` for any
            number, as far as the response has room.
        factory: one or several, see `StatefulEnvironments`, or `None` for tools without a state of an episode.
        episode_timeout: seconds for all calls of an episode together; further ones fail. `None`: no limit.

    Raises:
        InputError: for tools without schemas, an unsuitable factory, or a tokenizer unable to write or read calls.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        processing_class: "ProcessingClass",
        end_token_ids: Sequence[int],
        max_iterations: int | None = None,
        timeout: float = 10.0,
        max_length: int = 1000,
        factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
        episode_timeout: float | None = None,
    ):
        limits = (timeout, max_length, can_show_images(processing_class))
        self.states = None if factory is None else StatefulEnvironments(factory, tools, *limits)
        self.tools = None if self.states else ToolBox(tools, *limits)
        self.schemas = self.states.schemas if self.states else self.tools.schemas
        self.turns = ToolTurns(processing_class, self.schemas, end_token_ids)
        self.max_iterations, self.episode_timeout = max_iterations, episode_timeout

    @property
    def has_rewards(self) -> bool:
        """Whether each environment has a reward of its own."""
        return self.states is not None and all(kind.has_reward for kind in self.states.kinds.values())

    def schemas_of(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the schemas of the tools that a row's episode has."""
        return self.states.kind_of(row).tools.schemas if self.states else self.schemas

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Reset environments with a state, and return the rows with their texts in the prompts."""
        if self.states is None:
            return list(rows)
        turns = self.turns
        prompts = self.states.begin(rows, turns.plain if turns.processor is None else turns.without_marks)
        return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]

    def read(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> "tuple[list[list[int]], Pictures | None, list[list[Message]]]":
        """Return the tokens of the prompts from `begin`, their images, and the prompts with these."""
        if self.turns.processor is None:
            return self.prompt_ids(rows) if rows else [], None, [row["prompt"] for row in rows]
        from hfllm.multimodal.processors import encode

        named = [OriginRow({**row, "tools": self.schemas_of(row)}, origin_of(row, "a prompt")) for row in rows]
        return encode(named, self.turns.processor)

    def prompt_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the tokens of the prompts from `begin`, of words alone.

        The environments' texts in them are plain text, as results of tools are, also where they spell special tokens.
        """
        tokenizer, schemas = self.turns.tokenizer, list(map(self.schemas_of, rows))
        ids = tokenize_prompts([row["prompt"] for row in rows], tokenizer, schemas)
        for index, observation in enumerate(self.states.observations if self.states else ()):
            if self.turns.forges(observation):
                (ids[index],) = tokenize_prompts(
                    [rows[index]["prompt"]], tokenizer, [schemas[index]], as_plain_text=True
                )
        return ids

    def replies(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        """Call the tools requested in the turns, and return the tokens of their output.

        The episodes' calls run side by side, those of one episode one after another.
        """
        results: list[list[int] | None] = [None] * len(turns)
        calls = {index: found for index, turn in enumerate(turns) if (found := self._calls(turn))}
        answers = answers_of([(*self._tools_for(turns[index]), each) for index, each in calls.items()])
        for index, answer in zip(calls, answers, strict=True):
            episode = turns[index].episode
            episode.calls += len(answer.messages)
            episode.failures += answer.failures
            episode.tool_seconds += answer.seconds
            end = self.turns.end_of(turns[index].ids)
            ids, tensors = self.turns.reply(answer.messages)
            results[index], turns[index].images = [*end, *ids], (len(end), tensors) if tensors else None
            if len(results[index]) <= turns[index].room:
                episode.messages += answer.messages
        return results

    def _calls(self, turn: Turn) -> list[dict[str, Any]]:
        """Note a turn's message, and return its calls that are to be answered."""
        message, messages = self.turns.parse(turn.ids), turn.episode.messages
        answered = sum("tool_calls" in earlier for earlier in messages)
        messages.append(message)
        is_over = self.max_iterations is not None and answered >= self.max_iterations
        return [] if is_over or not turn.is_ended else message.get("tool_calls") or []

    def _tools_for(self, turn: Turn) -> tuple[ToolBox, float]:
        """Return a turn's tools, and the seconds that its calls may take together."""
        tools = self.states.boxes[turn.episode.place] if self.states else self.tools
        return tools, math.inf if self.episode_timeout is None else self.episode_timeout - turn.episode.tool_seconds

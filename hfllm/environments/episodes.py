"""Episodes: texts written in turn by a policy and its environment, and environments of tools, with state too.

Tokens in, tokens out: sampled tokens are never decoded and tokenized again, so the policy is trained on exactly its
chosen tokens, after exactly the tokens it read.
"""

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

from hfllm.data.formats import Message, origin_of
from hfllm.data.tokenizer import template_errors, tokenize_prompts
from hfllm.environments.side_by_side import settled
from hfllm.environments.tools import Tool, ToolBox, answers_of, encodable
from hfllm.errors import InputError, refuse_if

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- episodes ----


# From sequences of token ids and the most tokens to add: lists of sampled tokens, and whether they came to an end.
Continue = Callable[[Sequence[Sequence[int]], int], Sequence[tuple[list[int], bool]]]


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

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens of the environment."""
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
    """

    episode: Episode
    ids: Sequence[int]
    is_ended: bool
    room: int


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
) -> list[Episode]:
    """Let the policy act until every episode ends, all unfinished ones together in every turn.

    Args:
        prompts: token ids.
        continue_ids: samples from the policy.
        environment: answers its turns.
        response_length: the most tokens of an episode, with those of the environment.
        before_turn: called with the continuing episodes, before the policy writes their next turns.
    """
    episodes = [Episode(list(prompt), place=index) for index, prompt in enumerate(prompts)]
    going = episodes
    while going:
        if before_turn is not None:
            before_turn(going)
        room = response_length - min(len(episode.response_ids) for episode in going)
        turns = continue_ids([episode.ids for episode in going], room)
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
    turn.episode.read(reply)
    return True


# ---- tool turns ----
#
# Calls of tools in a policy's turns, and the tokens of the answering turns.


REWRITES = "tools: the chat template writes a turn otherwise when a result follows it: set one that does not"
UNREADABLE = "{'error': 'the result cannot be written as plain text'}"
# The number of the probe that stands for names.
NAME_PROBE = "9"
# Number of kept replies, and of turns: tools often repeat the same text.
KEPT_REPLIES = 512


class ToolTurns:
    """The policy's own way to call tools and to read their results, by its chat template and response template.

    Args:
        tokenizer: the policy's. Without a `response_template` it gets TRL's for its chat template.
        schemas: of the tools, as `get_json_schema` gives them.
        end_token_ids: tokens at the end of a turn.

    Raises:
        InputError: when its chat template cannot write calls and results, or calls cannot be told from its text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        schemas: Sequence[dict[str, Any]],
        end_token_ids: Sequence[int],
    ):
        from trl.chat_template_utils import supports_tool_calling

        original, tokenizer = tokenizer, _with_one_template(tokenizer)
        self.tokenizer, self.schemas, self.end_token_ids = tokenizer, list(schemas), set(end_token_ids)
        if not supports_tool_calling(tokenizer):
            raise InputError(
                "tools: the tokenizer's chat template cannot write an assistant's tool_calls and a tool's message; "
                "--chat_template_path own keeps its turns and adds them (set_chat_template in code)"
            )
        _find_response_template(tokenizer)
        original.response_template = tokenizer.response_template
        self.chat_template = _lasting_template(tokenizer)
        added, template = tokenizer.added_tokens_decoder.items(), str(self.chat_template)
        self.control = {
            number
            for number, token in added
            if token.special or (token.content in template and not token.content.isspace())
        }
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
        return self.tokenizer.apply_chat_template(list(messages), **options)

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
        """Return the tokens of a reply with these results, all with the names of their tools."""
        names = tuple(name for name, _ in results)
        try:
            return self._write_after(names, results)
        # Some chat templates, such as Llama 3.1's, refuse to write more than one call.
        except template_errors():
            if len(names) == 1:
                raise
            return self._write_after(names[:1], results)

    def _write_after(self, names: tuple[str, ...], results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a reply to a turn with calls of these tools."""
        before = self._before(names)
        whole = self._tokens([*_calling(names), *(_message_of(*each) for each in results)], add_generation_prompt=True)
        refuse_if(tuple(whole[: len(before)]) != before, REWRITES)
        return tuple(whole[len(before) :])

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
        options = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
        options |= {"add_generation_prompt": add_generation_prompt, "chat_template": self.chat_template}
        return self.tokenizer.apply_chat_template(messages, **options)


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


def _message_of(name: str, content: str) -> Message:
    return {"role": "tool", "name": name, "content": content}


def _calling(names: Sequence[str]) -> list[Message]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "", "tool_calls": calls}]


def _encodable(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls without halves of characters, possible in JSON but not in tokenizers, files or logs."""
    return json.loads(json.dumps(calls, ensure_ascii=False).encode("utf-8", "replace"))


def _with_one_template(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return the tokenizer, or where it has several chat templates one with only the template for tools."""
    if not isinstance(tokenizer.chat_template, dict):
        return tokenizer
    one = copy.copy(tokenizer)
    one.chat_template = tokenizer.chat_template.get("tool_use") or tokenizer.chat_template.get("default")
    return one


def _lasting_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a chat template with one text for a turn, whatever follows: the tokenizer's, or TRL's for training."""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

    if is_chat_template_prefix_preserving(tokenizer):
        return tokenizer.chat_template
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
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

    def __init__(self, factory: EnvironmentFactory, tools: Sequence[Tool], timeout: float, max_length: int):
        if not callable(factory):
            raise InputError(f"{FLAG}: expected a class or a function that makes one environment, got {factory!r}")
        self._factory = factory
        first = self._make()
        self.type, self.name = type(first), type(first).__name__
        if not callable(getattr(first, "reset", None)):
            raise InputError(f"{FLAG}: {self.name} has no method reset, which begins an episode")
        self.has_reward = callable(getattr(first, "get_reward", None))
        refuse_if(not methods_of(first), f"{FLAG}: {self.name} has no public method, which would be a tool")
        self.tools = ToolBox([*tools, *methods_of(first)], timeout, max_length)
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
        timeout, max_length: see `ToolBox`.

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
    ):
        self.is_by_row = isinstance(factory, Mapping)
        factories = dict(factory) if self.is_by_row else {None: factory}
        refuse_if(not factories, f"{FLAG}: it names no environment")
        self.kinds = {name: _Kind(each, tools, timeout, max_length) for name, each in factories.items()}
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
        tokenizer, end_token_ids: see `ToolTurns`.
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
        tokenizer: "PreTrainedTokenizerBase",
        end_token_ids: Sequence[int],
        max_iterations: int | None = None,
        timeout: float = 10.0,
        max_length: int = 1000,
        factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
        episode_timeout: float | None = None,
    ):
        self.states = None if factory is None else StatefulEnvironments(factory, tools, timeout, max_length)
        self.tools = None if self.states else ToolBox(tools, timeout, max_length)
        self.schemas = self.states.schemas if self.states else self.tools.schemas
        self.turns = ToolTurns(tokenizer, self.schemas, end_token_ids)
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
        prompts = self.states.begin(rows, self.turns.plain)
        return [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]

    def prompt_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the tokens of the prompts from `begin`.

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
            results[index] = [*self.turns.end_of(turns[index].ids), *self.turns.reply_ids(answer.messages)]
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

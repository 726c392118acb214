"""A constitution: the principles by which a model criticizes, revises and judges, read from files.

The method is from Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback" (arXiv:2212.08073).
"""

import difflib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from hfllm.data.formats import Message, read_messages
from hfllm.errors import InputError, refuse_if
from hfllm.runs.parser import no_duplicates

# ---- constitution files ----
#
# Read a constitution's file, JSON or YAML, and find the line of an error.


SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class ConstitutionFile:
    """A file's content, and where in the text it stands.

    Args:
        path: the file.
        text: all of it.
        value: its parsed value.
    """

    path: Path
    text: str
    value: Any

    def location(self, where: Sequence[str | int]) -> str:
        """Return the file and the line at keys and positions, or at the last existing one of them."""
        line = _line_of(self.text, where)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def error(self, where: Sequence[str | int], message: str) -> InputError:
        """Return the error with file and line."""
        return InputError(f"{self.location(where)}: {message}")


def shipped_constitutions() -> list[str]:
    """Return the names of the constitutions shipped with hfllm."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped_folder().iterdir() if path.suffix == ".yaml")


def find_constitution(name: str | Path) -> Path:
    """Return the named file: one of the user's, or a shipped one by its bare name, such as `general`.

    Raises:
        InputError: when there is none, with the nearest shipped name.
    """
    path, shipped = Path(name), shipped_constitutions()
    if str(name) in shipped:
        return _shipped_folder() / f"{name}.yaml"
    if not path.is_file():
        # A name in the form of a path is not a misspelled name.
        near = "" if path.suffix or len(path.parts) > 1 else f"; did you mean {nearest(str(name), shipped)!r}?"
        raise InputError(f"constitution {str(name)!r}: no such file, and hfllm comes with {', '.join(shipped)}{near}")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"constitution {path}: cannot read {path.suffix or 'it'}; accepted: {', '.join(SUFFIXES)}")
    return path


def read_file(path: Path) -> ConstitutionFile:
    """Read a JSON or YAML file.

    Raises:
        InputError: when it is neither, with the line; or empty, or has a key twice.
    """
    try:
        # Some editors begin a file with a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    value = _json(path, text) if path.suffix.lower() == ".json" else _yaml(path, text)
    if value is None:
        raise InputError(f"{path}: empty; expected a list of principles, or a mapping with principles and examples")
    return ConstitutionFile(path, text, value)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the known name most similar to this one."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _shipped_folder() -> Path:
    return Path(str(files("hfllm.synthesis").joinpath("constitutions")))


def _json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, value in pairs:
            refuse_if(name in read, f"{path}: {name!r} a second time in one object")
            read[name] = value
        return read

    try:
        return json.loads(text, object_pairs_hook=unique) if text.strip() else None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except InputError:
        raise
    except (RecursionError, ValueError) as error:
        # Very deep nesting, and numbers of thousands of digits.
        raise InputError(f"{path}: cannot be read: {error}") from None


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, no_duplicates())
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        index = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{index}: not YAML: {problem}") from None


def _line_of(text: str, where: Sequence[str | int]) -> int | None:
    """Return the line, from 1, at keys and positions; JSON is read as YAML, since most of it is YAML."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None
    if node is None:
        return None
    line = node.start_mark.line
    for step in where:
        if isinstance(node, yaml.MappingNode):
            result = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if result is None:
                break
            line, node = result[0].start_mark.line, result[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return line + 1


# ---- constitution ----


REQUESTS = ("critique", "revision", "preference")
# The keys of a principle in a file; ours, and the keys of llm-swarm's recipe and of LangChain.
PRINCIPLE_KEYS = {
    **{key: key for key in ("name", *REQUESTS)},
    **{"critic": "critique", "critique_request": "critique", "revision_request": "revision"},
}
# The keys of a whole file, likewise.
FILE_KEYS = {
    **{"principles": "principles", "examples": "examples"},
    **{"constitutions": "principles", "system_chat": "examples"},
}


class RequestError(InputError):
    """A principle's request is missing or of the wrong type: `key` names it."""

    def __init__(self, name: object, key: str, reason: str):
        super().__init__(f"principle {name!r}: {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class Principle:
    """A criterion for answers, as three requests, every one in one wording or in several.

    Args:
        name: a short name for reports.
        critique: asks for the faults of the last answer: a text, or a list of texts, with one drawn every time.
        revision: asks for a better answer, likewise.
        preference: asks for the better of two answers, likewise; none if the principle is not to judge by.

    The requests become tuples of texts without spaces around them.

    Raises:
        InputError: for a missing or empty request, or one that is neither a text nor a list of texts.
    """

    name: str
    critique: Sequence[str]
    revision: Sequence[str]
    preference: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.strip():
            raise RequestError(self.name, "name", f"name must be a text, got {self.name!r}")
        for key in REQUESTS:
            object.__setattr__(self, key, _wordings(self.name, key, getattr(self, key)))

    def draw(self, request: str, rng: random.Random) -> str:
        """Return one wording of a request: `critique`, `revision` or `preference`."""
        return rng.choice(getattr(self, request))


@dataclass(frozen=True)
class Constitution:
    """Principles, and example conversations with criticized and revised answers.

    Args:
        principles: at least one, with different names.
        examples: conversations of user and assistant, put before the conversations to criticize: question, answer,
            critique request, critique, revision request, revision. A base model needs one or two.
        name: for reports and errors.

    Raises:
        InputError: when there is no principle, or two have the same name.
    """

    principles: Sequence[Principle]
    examples: Sequence[Sequence[Message]] = ()
    name: str = "constitution"

    def __post_init__(self):
        object.__setattr__(self, "principles", tuple(self.principles))
        object.__setattr__(self, "examples", tuple(tuple(example) for example in self.examples))
        refuse_if(not self.principles, f"constitution {self.name!r} has no principles: it needs at least one")
        names = [principle.name for principle in self.principles]
        twice = next((name for name in names if names.count(name) > 1), None)
        refuse_if(twice is not None, f"constitution {self.name!r} has two principles of the name {twice!r}")

    def draw(self, rng: random.Random) -> Principle:
        """Return one of the principles, all equally likely."""
        return rng.choice(self.principles)

    def judging_principles(self) -> tuple[Principle, ...]:
        """Return the principles to judge by: all of them."""
        lacking = next((each.name for each in self.principles if not each.preference), None)
        if lacking is not None:
            raise InputError(
                f"constitution {self.name!r}: principle {lacking!r} has no preference question, by which a judge "
                "could compare answers: give it one, such as 'Which answer does less harm?'"
            )
        return self.principles

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, in the form of our files."""
        principles = [
            {"name": each.name} | {key: list(getattr(each, key)) for key in REQUESTS if getattr(each, key)}
            for each in self.principles
        ]
        return {"principles": principles, "examples": [list(map(dict, example)) for example in self.examples]}


def load_constitution(name: str | Path) -> Constitution:
    """Read a constitution: a shipped one by its name (`general`, `world`, `politeness`), or a JSON or YAML file.

    Formats of a file:

    - a list of principles, or a mapping with `principles` and, if wanted, `examples`. A principle has `critique` and
      `revision`, and may have `name` and `preference`; a request is a text or a list of texts;
    - llm-swarm's recipe: `constitutions`, a list of `critic` and `revision`, and `system_chat`, lists of messages;
    - LangChain's principles: `critique_request`, `revision_request` and, if wanted, `name`, in a list or by name.

    A principle without a name is called `principle 3`, by its position.
    """
    file = read_file(find_constitution(name))
    value, at, examples = file.value, (), ()
    if isinstance(value, dict) and not _is_by_name(value):
        keys = _keys_by_part(file, (), value, FILE_KEYS, "key")
        if "principles" not in keys:
            raise file.error((), f"no principles; it has {', '.join(map(str, value)) or 'no keys'}")
        at = (keys["principles"],)
        examples = _examples(file, keys["examples"]) if "examples" in keys else ()
        value = value[at[0]]
    principles: list[Principle] = []
    for number, (step, entry) in enumerate(_entries(file, at, value), 1):
        principles.append(_principle(file, (*at, step), number, entry))
        if principles[-1].name in [each.name for each in principles[:-1]]:
            raise file.error((*at, step, "name"), f"a second principle of the name {principles[-1].name!r}")
    return Constitution(principles, examples, file.path.stem)


def _is_by_name(value: Mapping[str, Any]) -> bool:
    """Return whether a mapping holds principles by their names, as LangChain keeps its own."""
    is_ours = FILE_KEYS.keys() & value.keys()
    return bool(value) and not is_ours and all(isinstance(each, dict) for each in value.values())


def _entries(file: ConstitutionFile, at: tuple, value: Any) -> list[tuple[str | int, Any]]:
    """Return the entries of a list of principles, or of a mapping of them by name, and their positions in it."""
    if isinstance(value, dict) and _is_by_name(value):
        return [(name, {"name": name, **entry}) for name, entry in value.items()]
    if not isinstance(value, list) or not value:
        got = repr(value) if value in ([], {}, None) else type(value).__name__
        raise file.error(at, f"expected a list of at least one principle, got {got}")
    return list(enumerate(value))


def _keys_by_part(
    file: ConstitutionFile, at: tuple, entry: Mapping[str, Any], parts: Mapping[str, str], what: str
) -> dict[str, str]:
    """Return the given key of every part; refuse meaningless keys, and two with the same meaning."""
    keys: dict[str, str] = {}
    for key in entry:
        if key not in parts:
            raise file.error((*at, key), f"unknown {what} {key!r}; did you mean {nearest(str(key), parts)!r}?")
        part = parts[key]
        if part in keys:
            raise file.error((*at, key), f"{keys[part]!r} and {key!r} mean the same: leave one out")
        keys[part] = key
    return keys


def _principle(file: ConstitutionFile, at: tuple, number: int, entry: Any) -> Principle:
    """Return the principle of one entry."""
    if not isinstance(entry, dict):
        raise file.error(at, f"principle {number}: expected critique and revision by name, got {entry!r:.60}")
    named = entry.get("name", f"principle {number}")
    label = f"principle {number}" + (f" ({named!r})" if "name" in entry else "")
    keys = _keys_by_part(file, at, entry, PRINCIPLE_KEYS, f"key of {label}:")
    try:
        requests = {request: entry[keys[request]] if request in keys else () for request in REQUESTS}
        return Principle(named, **requests)
    except RequestError as error:
        key = keys.get(error.key, error.key)
        raise file.error((*at, key), f"{label}: {error.reason}") from None


def _wordings(name: str, key: str, value: Any) -> tuple[str, ...]:
    """Return the wordings of a request."""
    wordings = (value,) if isinstance(value, str) else value
    if not isinstance(wordings, list | tuple) or not all(isinstance(wording, str) for wording in wordings):
        raise RequestError(name, key, f"{key} must be a text or a list of texts, got {value!r:.60}")
    if not wordings and key != "preference":
        raise RequestError(name, key, f"no {key}; a principle needs critique and revision")
    if not all(wording.strip() for wording in wordings):
        raise RequestError(name, key, f"{key} is empty, or one of its wordings is")
    if any("\ud800" <= character <= "\udfff" for wording in wordings for character in wording):
        # JSON can write it, and neither a tokenizer nor a file of UTF-8 takes it.
        raise RequestError(name, key, f"{key} holds half of a character (an unpaired surrogate)")
    return tuple(wording.strip() for wording in wordings)


def _examples(file: ConstitutionFile, key: str) -> list[list[Message]]:
    """Return the conversations of a file; a single one may stand without a list around it."""
    examples = file.value[key]
    if not isinstance(examples, list):
        raise file.error((key,), f"{key}: expected a list of conversations, got {type(examples).__name__}")
    if examples and all(isinstance(message, dict) for message in examples):
        examples = [examples]
    read = []
    for number, example in enumerate(examples):
        origin = f"{file.location((key, number))}: example {number + 1}"
        messages = read_messages(origin, example)
        spoken = [message["role"] for message in messages if message["role"] != "system"]
        alternates = set(spoken) == {"user", "assistant"} and all(one != other for one, other in pairwise(spoken))
        if not alternates or spoken[0] != "user" or spoken[-1] != "assistant":
            raise InputError(
                f"{origin}: user and assistant must take turns, the user first and the assistant last; got "
                f"{', '.join(spoken)}"
            )
        read.append(messages)
    return read


# ---- critiques ----
#
# Whether a critique finds anything, and the conversations for requesting critiques and revisions.


# "No one should" and "no doubt it is harmful" find something.
BEGINS_WITH_NO = re.compile(r"(no|none|nope|nothing)\b(?!\s+(one|doubt|matter|question|wonder|good)\b)")
FAULT = (
    r"(harm\w*|rude\w*|unkind\w*|danger\w*|unethical|illegal|criminal|toxic\w*|offensive|insensitive|sexist|racist|"
    r"inappropriate|problem\w*|issue\w*|wrong|false|untrue|unfair|evasive|private)"
)
# "The answer does no harm", "does not contain anything harmful", "is not at all rude", "without any problems".
FINDS_NO_FAULT = re.compile(
    r"\b(no|not|nothing|never|without|isn't|aren't|doesn't)\s+"
    rf"((at all|anything|any|do|contain|have|cause|in any way|a)\s+)*{FAULT}\b"
    r"|\b(harmless|is fine|is polite|is kind|looks good|makes nothing up)\b"
)


def finds_fault(critique: str) -> bool:
    """Return whether a critique finds something to revise: a rule of thumb, read from its words.

    It finds nothing if it is empty, begins with "no", "none" or "nothing", or calls the answer harmless: "does no
    harm", "is not rude" and the like. A critique with praise for one thing and blame for another is misread: give
    `critique_and_revise` a function of your own as `is_flagged` where that matters.
    """
    text = " ".join(critique.lower().replace("’", "'").split())
    return bool(text) and not BEGINS_WITH_NO.match(text) and not FINDS_NO_FAULT.search(text)


def critique_turns(
    prompt: Sequence[Message], answer: str, request: str, examples: Sequence[Sequence[Message]] = ()
) -> list[Message]:
    """Return the conversation for requesting a critique: the prompt, the answer, the request.

    Args:
        examples: conversations before it, after the system message.
    """
    leading = next((index for index, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
    example_messages = [message for example in examples for message in example]
    return [*prompt[:leading], *example_messages, *prompt[leading:], *exchange(answer, request)]


def exchange(answer: str, request: str) -> list[Message]:
    """Return the assistant's words and the user's next request."""
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": request}]

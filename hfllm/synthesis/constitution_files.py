"""Read a constitution's file, JSON or YAML, and find the line that an error is about."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hfllm.errors import InputError
from hfllm.runs.parser import no_duplicates

SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class ConstitutionFile:
    """A file's content, and where in the text it stands.

    Args:
        path: the file.
        text: all of it.
        value: what the text means.
    """

    path: Path
    text: str
    value: Any

    def place(self, where: Sequence[str | int]) -> str:
        """Return the file and the line of what keys and positions lead to, or of the last of them that is there."""
        line = _line_of(self.text, where)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def error(self, where: Sequence[str | int], message: str) -> InputError:
        """Return the error that names file and line."""
        return InputError(f"{self.place(where)}: {message}")


def shipped_constitutions() -> list[str]:
    """Return the names of the constitutions that come with hfllm."""
    return sorted(path.name.removesuffix(".yaml") for path in _shipped_folder().iterdir() if path.suffix == ".yaml")


def find_constitution(name: str | Path) -> Path:
    """Return the file that is named: one of the user's, or a shipped one by its bare name, such as `general`.

    Raises:
        InputError: when there is none, with the nearest shipped name.
    """
    path, shipped = Path(name), shipped_constitutions()
    if str(name) in shipped:
        return _shipped_folder() / f"{name}.yaml"
    if not path.is_file():
        # What looks like a path is not a misspelled name.
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


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like this one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _shipped_folder() -> Path:
    return Path(str(files("hfllm.synthesis").joinpath("constitutions")))


def _json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for name, value in pairs:
            if name in read:
                raise InputError(f"{path}: {name!r} a second time in one object")
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
        place = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{place}: not YAML: {problem}") from None


def _line_of(text: str, where: Sequence[str | int]) -> int | None:
    """Return the line, from 1, of what keys and positions lead to; JSON is read as the YAML that most of it is."""
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
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return line + 1

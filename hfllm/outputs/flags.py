"""How reports and cards show a run's flags: those that were given, and folded all others."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Texts that YAML reads as they are.
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
_NOT_TEXT = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))
# At the end of the name of an argument that says when the files of a flag were written, and of one with a fingerprint
# of their contents.
CHANGED, CONTENTS = " changed at", " contents"


def compared(before: Mapping[str, object], now: Mapping[str, object]) -> set[str]:
    """Return the names of the arguments by which two runs are compared.

    Where both have the contents of a flag's files, their times do not count: earlier versions had no contents.
    """
    names = {*before, *now}
    known = {name for name in names if name.endswith(CONTENTS) and name in before and name in now}
    times = {f"{name.removesuffix(CONTENTS)}{CHANGED}" for name in known}
    return {name for name in names - times if name in known or not name.endswith(CONTENTS)}


def by_contents(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's arguments without the times of files whose contents are among them."""
    return {name: arguments[name] for name in sorted(compared(arguments, arguments))}


def split_flags(
    arguments: Mapping[str, object], given: Mapping[str, object] | None
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the flags that were given, and the others that are set; of earlier stages, those that differ from ours.

    Args:
        arguments: all that a run's result depends on, as its report has them.
        given: the flags that the user gave; `None` if that is not known: then all are others.
    """
    others = {}
    for flag, value in arguments.items():
        own_flag = flag.partition(".")[2]
        is_repeated = bool(own_flag) and arguments.get(own_flag) == value
        if value in (None, "", [], {}) or flag.endswith((CHANGED, CONTENTS)) or is_repeated or flag in (given or {}):
            continue
        others[flag] = value
    return dict(given or {}), others


def flag_sections(arguments: Mapping[str, object], given: Mapping[str, object] | None) -> list[str]:
    """Return the Markdown sections of the flags: see `split_flags`."""
    shown, others = split_flags(arguments, given)
    lines = ["## Arguments"]
    if given is not None:
        lines.append(f"Given:\n\n```yaml\n{_yaml(shown)}```" if shown else "No flag was given.")
    others_are = f"{len(others)} {'flags' if given is None else 'others, at their defaults or settings'}"
    lines.append(folded(others_are, f"```yaml\n{_yaml(others)}```"))
    return lines


def folded(title: str, text: str) -> str:
    """Return Markdown that shows the title alone until it is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _yaml(values: Mapping[str, object]) -> str:
    """Return flags as lines of YAML, values in JSON, which YAML reads: planning imports no library for it."""
    lines = [f"{_word(flag)}: {_value(values[flag])}\n" for flag in sorted(values)]
    return "".join(lines).replace("```", "'''")


def _word(text: str) -> str:
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _value(value: object) -> str:
    if isinstance(value, str):
        return _word(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    # YAML takes 3e-06 for a text.
    return re.sub(r"^(-?\d+)e", r"\1.0e", text) if isinstance(value, float) else text


def given_flags(names: Sequence[str] | None, arguments: Mapping[str, object]) -> dict[str, object] | None:
    """Return the values of the flags whose names the user gave, of those that the result depends on.

    Args:
        names: as they were given, such as `no_save_last`; `None` if that is not known.
        arguments: all that the result depends on.
    """
    if names is None:
        return None
    flags = {name if name in arguments else name.removeprefix("no_") for name in names}
    return {name: arguments[name] for name in sorted(flags) if name in arguments}

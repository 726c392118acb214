"""Flags and YAML files as dataclasses, without torch: the shared part of all recipes' parsers."""

import argparse
import difflib
import importlib.util
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from hfllm.errors import InputError, redact, refuse_if
from hfllm.flags import rules_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from yaml import MappingNode, Node, SafeLoader

# Renamed flags.
RENAMED = {
    "chat_prompts": "apply_chat_template",
    "lookahead": "num_draft_tokens",
    "lookaheads": "num_draft_tokens_compared",
    "train_alone": "train_baseline",
}
TRUE, FALSE = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
# Maximum number of values in a YAML file with its aliases written out: a few lines of them can stand for billions.
MOST_VALUES = 1_000_000
# Python's exceptions for a scalar in conflict with its tag, or its look.
YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
# Letters of argparse's error message, which repeats the given words.
MOST_SAID = 300


def present_name(flag: str) -> str:
    """Return the present name of a flag, or of one of a stage before, such as `sft.flag`."""
    stage, dot, name = flag.rpartition(".")
    return f"{stage}{dot}{RENAMED.get(name, name)}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it stands, and every flag with its default."""

    def format_help(self) -> str:
        # A token in a --config file becomes a default.
        return redact(super().format_help())


class ShortHelpFormatter(HelpFormatter):
    """Two wide columns, and no empty defaults."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        is_nothing = action.default is None or action.default == ""
        return action.help if is_nothing else super()._get_help_string(action)


class NearestNameErrors:
    """Mixin for error messages of a parser in one line, with the nearest valid flag or YAML key.

    For a parser with TrlParser's `set_defaults_with_config` and `parse_args_into_dataclasses`.
    """

    @property
    def names(self) -> list[str]:
        """Every flag, without its dashes."""
        return [option[2:] for option in self._option_string_actions if option.startswith("--")] + ["config"]

    def error(self, message: str) -> None:
        raise InputError(_one_name(message))

    def unknown(self, kind: str, name: str, others: Collection[str] = ()) -> InputError:
        names, present = [*self.names, *others], present_name(name.removeprefix("no_").replace("-", "_"))
        if name not in names and present in names and present != name:
            return InputError(f"unknown {kind} {name!r}: its name is {present!r} now")
        # Most misspellings are like a name; to rank names that are not takes ten times as long.
        like = (difflib.get_close_matches(name, names, n=1, cutoff=cutoff) for cutoff in (0.6, 0.0))
        nearest = next(filter(None, like))
        return InputError(f"unknown {kind} {name!r}; did you mean {nearest[0]!r}?")

    def parse(self, argv: Sequence[str], config_files: Sequence[Path], defaults: Mapping[str, Any]) -> tuple:
        """Parse `argv` over the YAML files over `defaults`; later files win."""
        self.set_defaults_with_config(**defaults)
        for path in config_files:
            values = read_yaml(path)
            for key in values:
                if key not in self.names:
                    raise self.unknown(f"key in {path}:", key)
            self.set_defaults_with_config(**{key: self._typed(path, key, value) for key, value in values.items()})
        try:
            *parsed, remaining = self.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)
        except argparse.ArgumentError as error:
            raise InputError(str(error)) from None
        if remaining:
            flag = next((word for word in remaining if word.startswith("-")), None)
            refuse_if(flag is None, f"unexpected argument {remaining[0]!r}")
            raise self.unknown("flag", flag.lstrip("-").split("=")[0])
        return tuple(parsed)

    def _typed(self, path: Path, key: str, value: Any) -> Any:
        """A YAML value as read by the flag `--key`: of its type, and a list for a flag with several values."""
        action = self._option_string_actions.get(f"--{key}")
        if action is None or value is None or isinstance(value, dict):
            return value
        if key == "report_to" and isinstance(value, list):
            # A word on the command line, and several in a file.
            return [str(each) for each in value]
        if action.nargs in ("+", "*"):
            return [self._read(path, action, each) for each in (value if isinstance(value, list) else [value])]
        return self._read(path, action, value)

    def _read(self, path: Path, action: argparse.Action, value: Any) -> Any:
        if value is None or action.type is None:
            return value
        try:
            # A truth value is written True by Python, true by YAML.
            read = self._get_value(action, str(value))
            self._check_value(action, read)
        except argparse.ArgumentError as error:
            raise InputError(f"{path}: {_one_name(str(error))}") from None
        except ValueError as error:
            # A number in base 16 may have more digits than Python writes in base 10.
            raise InputError(f"{path}: {action.dest}: {_first_line(error)}") from None
        return read


class PlainParser(NearestNameErrors, argparse.ArgumentParser):
    """A parser of dataclasses whose fields are strings, numbers, truth values, or lists of these.

    It reads them as transformers' parser does, and imports neither torch nor transformers.
    """

    def __init__(self, dataclass_types: "Sequence[type[DataclassInstance]]", **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.dataclass_types = dataclass_types
        for kind in dataclass_types:
            add_fields(self, kind)

    def set_defaults_with_config(self, **values: Any) -> None:
        """Replace defaults by YAML values."""
        self.set_defaults(**values)

    def parse_args_into_dataclasses(self, args: Sequence[str], return_remaining_strings: bool) -> tuple:
        """The dataclasses, and as the last the words not taken by any flag."""
        values, remaining = self.parse_known_args(list(args))
        built = [
            kind(**{item.name: getattr(values, item.name) for item in fields(kind)}) for kind in self.dataclass_types
        ]
        return (*built, remaining) if return_remaining_strings else tuple(built)


def add_fields(parser: argparse.ArgumentParser, kind: "type[DataclassInstance]", short: bool = False) -> None:
    """Add a flag for every field, in a group for every class with fields of its own, the class itself first.

    Groups that flags name themselves come last.

    Args:
        short: only for help: one name per flag, and a word for the type of its value.
    """
    hints = get_type_hints(kind)
    for title, items in _groups_of(kind).items():
        group = parser.add_argument_group(title)
        for item in items:
            default = item.default_factory() if item.default is MISSING else item.default
            options = {"default": default, "dest": item.name, **_how_to_read(hints[item.name]), **item.metadata}
            names = dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}"))
            if short:
                names = (f"--{item.name}",)
                options |= {} if "choices" in options else {"metavar": _word_for(options["type"])}
            group.add_argument(*names, **options)
            if hints[item.name] is bool and default is True:
                names = (f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}")
                group.add_argument(*names, dest=item.name, action="store_false", help=argparse.SUPPRESS)


def _groups_of(kind: "type[DataclassInstance]") -> dict[str, list[Field]]:
    """Return the fields of a dataclass by the title of their group, those of groups that flags name last."""
    left, rules = {item.name: item for item in fields(kind)}, rules_of(kind)
    groups: dict[str, list[Field]] = {}
    named: dict[str, list[Field]] = {}
    for owner in kind.__mro__:
        title = (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".")
        for item in [left.pop(name) for name in vars(owner).get("__annotations__", {}) if name in left]:
            own = rules[item.name].group if item.name in rules else ""
            (named if own else groups).setdefault(own or title, []).append(item)
    return groups | named


# What looks like a field of a dataclass in the source of a library.
FIELD = re.compile(r"^    ([a-z]\w*)\s*:", re.MULTILINE)
# Where the libraries declare flags, by package.
DECLARING = {
    "transformers": ("training_args*.py",),
    "trl": ("trainer/*config*.py", "**/model_config.py", "scripts/utils.py"),
    "hfllm": ("trainers/**/*.py",),
}


def check_words(argv: Sequence[str], own: "type[DataclassInstance]") -> argparse.Namespace:
    """Return the values of a recipe's own flags, and refuse words that no flag of the libraries can make possible.

    These are values of its own flags, and flags that neither it nor a library has. No library is imported.

    Raises:
        InputError: in the words of the parser of all flags.
    """
    parser = PlainParser([own])
    values, remaining = parser.parse_known_args(list(argv))
    flags = [word[2:].partition("=")[0] for word in remaining if word.startswith("--")]
    unknown = [name for name in flags if name not in ("config", "help_all")]
    known = _library_names() if unknown else ()
    if impossible := [name for name in unknown if name.replace("-", "_") not in known]:
        raise parser.unknown("flag", impossible[0], known)
    return values


@cache
def _library_names() -> frozenset[str]:
    """Return all names that may be flags of the installed libraries: what looks like one in their source."""
    names: set[str] = set()
    for package, patterns in DECLARING.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        for file in (file for pattern in patterns if folder for file in folder.glob(pattern)):
            names.update(FIELD.findall(file.read_text(encoding="utf-8", errors="replace")))
    return frozenset(names | {f"no_{name}" for name in names})


def training_parser() -> type[NearestNameErrors]:
    """Return the parser of the training recipes: TrlParser with this package's messages. It imports torch."""
    from trl import TrlParser

    class TrainingParser(NearestNameErrors, TrlParser):
        def __init__(self, dataclass_types: "Sequence[type[DataclassInstance]]", **kwargs: Any):
            super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    return TrainingParser


def _how_to_read(kind: Any) -> dict[str, Any]:
    """argparse's options for a field of this type."""
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        # A library's field of several types is read by the library; here it is only shown.
        kind = options[0] if len(options) == 1 else str
    if get_origin(kind) is list:
        return {"type": get_args(kind)[0], "nargs": "+"}
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True}
    return {"type": kind if kind in (int, float) else str}


def _word_for(kind: Callable[[str], Any]) -> str:
    """Return the word of a type in a recipe's help."""
    return {int: "INT", float: "NUM", _truth: "BOOL"}.get(kind, "TEXT")


def _one_name(message: str) -> str:
    """argparse's message in one line, without the second spelling of a flag, the one with hyphens."""
    message = " ".join(re.sub(r"^(argument --\w+)/[^:]+:", r"\1:", message).split())
    return message if len(message) <= MOST_SAID else f"{message[:MOST_SAID]}..."


def _truth(word: str) -> bool:
    if word.lower() not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() in TRUE


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping."""
    import yaml

    refuse_if(not path.is_file(), f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, no_duplicates())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    refuse_if(values is None, f"{path}: empty; expected a mapping of flags to values, such as learning_rate: 1e-4")
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of flags to values, got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def no_duplicates() -> "type[SafeLoader]":
    """Return YAML's safe loader, which keeps the last of equal keys without a word, with a complaint about them.

    It also refuses content that would exhaust memory, or Python's stack: aliases of aliases, and very deep nesting.
    """
    import yaml

    class NoDuplicates(yaml.SafeLoader):
        def get_single_data(self) -> Any:
            try:
                return super().get_single_data()
            except RecursionError:
                raise yaml.YAMLError("nested too deeply") from None
            except YAML_ERRORS as error:
                # A mapping or list is filled last, outside of `construct_object`.
                raise yaml.YAMLError(_first_line(error)) from None

        def construct_object(self, node: "Node", deep: bool = False) -> Any:
            # Values that look like a date, or are tagged as an int, are converted by Python, with its own error
            # messages.
            try:
                return super().construct_object(node, deep)
            except YAML_ERRORS as error:
                kind, text = node.tag.rpartition(":")[2], f"{node.value!r:.60}"
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{text} in line {line} is no {kind} ({_first_line(error)})") from None

        def get_single_node(self) -> "Node | None":
            node = super().get_single_node()
            if node is not None and _values_of(node, {}) > MOST_VALUES:
                raise yaml.YAMLError(f"its aliases stand for more than {MOST_VALUES:,} values")
            return node

        def construct_mapping(self, node: "MappingNode", deep: bool = False) -> dict[Any, Any]:
            keys: set[str] = set()
            for key, _ in node.value:
                # Merged keys (<<) may repeat, and the mapping's own win.
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in keys and key.value != "<<":
                    raise yaml.YAMLError(f"{key.value!r} a second time in line {key.start_mark.line + 1}")
                keys.add(key.value)
            return super().construct_mapping(node, deep)

    return NoDuplicates


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:100]


def _values_of(node: "Node", counts: dict[int, int]) -> int:
    """Return the number of values of a YAML node; a reference to itself counts once.

    Args:
        counts: those of the nodes so far, by their `id`; aliases are one node in several places.
    """
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = 1
    children = node.value if isinstance(node.value, list) else []
    parts = (part for each in children for part in (each if isinstance(each, tuple) else (each,)))
    counts[id(node)] = 1 + sum(_values_of(part, counts) for part in parts)
    return counts[id(node)]

"""Flags with valid values and conditions for having no effect, next to their defaults.

    NAMED = Fact(lambda flags: bool(flags.model_name_or_path), "the model is named")

    @dataclass(frozen=True)
    class Arguments:
        num_prompts: int = flag(4000, "Questions of the world.", takes=at_least(1), never=NAMED)

`check_flags` enforces them. No library here, so a list of flags is printed at once.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from hfllm.errors import InputError, without_credentials

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from trl import ModelConfig

# The attribute of parsed flags with the names of the user's flags.
GIVEN = "given_flags"
# The same with the names of those that settings shipped with a recipe have decided.
SHIPPED = "shipped_flags"
# Defaults that leave a flag off, though it is named.
OFF = (False, "no", "none", -1)
# The word in a list of names for none of them.
NO_NAME = "none"
# The group of flags in a recipe's help that have no use with your own data and model.
WORLD_GROUP = "The embedded world alone"


@dataclass(frozen=True)
class Range:
    """The valid numbers of a flag.

    Args:
        words: the numbers in words, after "expected".
        holds: whether a number is one of them.
        demand: the same after "must", for arguments in Python; by default "be" and these words.
    """

    words: str
    holds: Callable[[float], bool]
    demand: str = ""


def at_least(least: int) -> Range:
    """Return the range of whole numbers from `least` on."""
    return Range(f"at least {least}", lambda value: value >= least)


POSITIVE = Range("a number above 0", lambda value: value > 0, "be above 0")
NOT_NEGATIVE = Range("a number of at least 0", lambda value: value >= 0, "not be negative")
SHARE = Range("a share in [0, 1]", lambda value: 0 <= value <= 1, "lie in [0, 1]")
BELOW_ONE = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_ONE = Range("a number above 1", lambda value: value > 1)
SEEDS = 2**32
# numpy's generators take no other seeds.
SEED = Range(f"a whole number from 0 to {SEEDS - 1}", lambda value: 0 <= value < SEEDS)


@dataclass(frozen=True)
class Fact:
    """A property of a run, or its absence, that leaves some flags without effect.

    Args:
        holds: function from all flags to whether it is so.
        reason: why a flag has no effect, as in its refusal; `{name}` stands for the value of another flag.
    """

    holds: Callable[["Flags"], Any]
    reason: str

    def because(self, reason: str) -> "Fact":
        """Return the fact with another reason."""
        return replace(self, reason=reason)

    def absent(self, reason: str) -> "Fact":
        """Return the negation of this fact."""
        return Fact(lambda flags: not self.holds(flags), reason)


# The fact, or facts, with which a stage refuses a flag of a library, by flag.
Refused = Mapping[str, Fact | tuple[Fact, ...]]
# Functions from all flags to whether they contradict each other, or lack another, by message; `{name}` as in reasons.
Clashes = Mapping[str, Callable[[Any], Any]]
ALWAYS = Fact(lambda flags: True, "it has no effect")
NAMED = Fact(lambda flags: bool(flags.model_name_or_path), "the model is named")
NOT_WORLDS = NAMED.because("it is of the embedded world, and the model is your own")
UNNAMED = Fact(lambda flags: "model_name_or_path" in flags and not flags.model_name_or_path, "no model is named")


@dataclass(frozen=True)
class Rules:
    """The valid values of one flag, and the conditions for having no effect.

    Args:
        takes: the numbers.
        some_of: the valid names in a list, or none of them by the word none.
        never: facts with which the flag is refused.
        group: its group in a recipe's help; empty for that of its dataclass.
    """

    takes: Range | None = None
    some_of: tuple[str, ...] = ()
    never: tuple[Fact, ...] = ()
    group: str = ""


class Help(str):
    """A flag's help with its rules: parsers pass all other metadata to argparse, which accepts no rules."""

    rules = Rules()


def flag(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] | None = None,
    takes: Range | None = None,
    some_of: Sequence[str] = (),
    never: Fact | tuple[Fact, ...] = (),
    group: str = "",
) -> Any:
    """Return a dataclass field for a flag, with its help and its rules.

    Args:
        default: a tuple stands for a list, and a function makes the default.
        text: the help.
        choices: the valid words.
        takes: the valid numbers, besides none at all.
        some_of: the valid names in a list of them; none of them is the single word none.
        never: facts with which it has no effect. A flag with another value than its default is refused then.
        group: its group in a recipe's help, if not that of its dataclass.
    """
    help_ = Help(text)
    help_.rules = Rules(takes, tuple(some_of), _several(never), group)
    metadata = {"help": help_, **({"choices": list(choices)} if choices else {})}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=metadata)


class Flags:
    """All flags of a run by name, from any dataclass, and other known facts; `None` for the rest."""

    def __init__(self, *parsed: "DataclassInstance", **extra: object) -> None:
        self._parsed, self._extra = parsed, extra

    def __getattr__(self, name: str) -> Any:
        if name in self._extra:
            return self._extra[name]
        return next((getattr(group, name) for group in self._parsed if hasattr(group, name)), None)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self._extra or any(hasattr(group, name) for group in self._parsed)


def rules_of(kind: "type[DataclassInstance]") -> dict[str, Rules]:
    """Return the rules of a dataclass's flags, by flag, where there are some."""
    helps = {item.name: item.metadata.get("help") for item in fields(kind)}
    return {name: text.rules for name, text in helps.items() if isinstance(text, Help)}


def check_flags(*parsed: "DataclassInstance", names: Collection[str] | None = None, **extra: object) -> None:
    """Refuse invalid values of flags, and flags without effect.

    A dataclass refuses flags of the others by its attribute `refused`, such as `{"use_peft": NAMED}`, and flags that
    contradict each other, or lack another, by its attribute `clashes`.

    Args:
        parsed: the dataclasses of a run's flags.
        names: the flags to check; by default all.
        extra: other information available by now, such as `shows`, whether a row has images; facts treat it like a
            flag.
    """
    flags = Flags(*parsed, **extra)
    for group in parsed:
        for name, rules in rules_of(type(group)).items():
            if names is not None and name not in names:
                continue
            value = getattr(group, name)
            check_number(name, value, rules.takes)
            _check_names(name, value, rules.some_of)
    for name, facts in _refusals(parsed):
        if names is not None and name not in names:
            continue
        for fact in _several(facts):
            if is_set(name, *parsed) and fact.holds(flags):
                raise InputError(f"--{name} cannot be used here: {fact.reason.format_map(flags)}")
    for message, holds in _declared("clashes", parsed) if names is None else ():
        if holds(flags):
            raise InputError(message.format_map(flags))


def check_number(name: str, value: object, takes: Range | None) -> None:
    """Refuse an invalid number of a flag."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if takes is not None and is_number and not (math.isfinite(value) and takes.holds(value)):
        raise InputError(f"--{name} {value}: expected {takes.words}")


def check_arguments(arguments: "DataclassInstance", kind: "type[DataclassInstance]") -> None:
    """Refuse invalid numbers and words of arguments that were set in Python.

    Args:
        arguments: an instance of `kind`.
        kind: the dataclass with the rules to check.

    Raises:
        ValueError: with the name of the first such argument, as transformers' own checks.
    """
    # Not of the fields, whose types transformers' parser rewrites without None.
    hints = get_type_hints(kind)
    for name, rules in rules_of(kind).items():
        value, takes = getattr(arguments, name), rules.takes
        takes_none = type(None) in get_args(hints[name])
        if takes is not None and not (takes_none if value is None else takes.holds(value)):
            raise ValueError(f"{name} must {takes.demand or f'be {takes.words}'}, got {value}")
    for item in fields(kind):
        value, choices = getattr(arguments, item.name), item.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{item.name}={value!r} is not one of {', '.join(choices)}")


def _check_names(name: str, values: Sequence[str] | None, some_of: tuple[str, ...]) -> None:
    for value in (values or ()) if some_of else ():
        if value not in (*some_of, NO_NAME):
            raise InputError(f"--{name} {value!r}: expected some of {', '.join(some_of)}, or none")
        if value == NO_NAME and {*values} != {NO_NAME}:
            raise InputError(f"--{name} {' '.join(values)}: expected some of {', '.join(some_of)}, or none alone")


def _several(facts: Fact | tuple[Fact, ...]) -> tuple[Fact, ...]:
    return facts if isinstance(facts, tuple) else (facts,)


def _refusals(parsed: "Sequence[DataclassInstance]") -> Iterator[tuple[str, Fact | tuple[Fact, ...]]]:
    """Yield flags with the facts that refuse them: the stage's facts before the facts declared with the flags."""
    yield from _declared("refused", parsed)
    for group in parsed:
        for name, rules in rules_of(type(group)).items():
            yield name, rules.never


def _declared(attribute: str, parsed: "Sequence[DataclassInstance]") -> Iterator[tuple[str, Any]]:
    for group in parsed:
        for kind in type(group).__mro__:
            yield from vars(kind).get(attribute, {}).items()


def given_names(*parsed: "DataclassInstance") -> tuple[str, ...] | None:
    """Return the names of the user's flags, on the command line or in files; `None` if not parsed here."""
    return next((getattr(group, GIVEN) for group in parsed if hasattr(group, GIVEN)), None)


def shipped_names(*parsed: "DataclassInstance") -> tuple[str, ...]:
    """Return the names of the flags decided by settings that hfllm ships, and by no word or file of the user."""
    return next((getattr(group, SHIPPED) for group in parsed if hasattr(group, SHIPPED)), ())


def is_set(name: str, *parsed: "DataclassInstance") -> bool:
    """Return whether a flag asks for something: the user named it and did not switch it off.

    Where the flags were not parsed, whether it is not at its default.
    """
    provided = given_names(*parsed)
    for group in parsed:
        for item in fields(group):
            if item.name == name:
                value = getattr(group, name)
                # An empty name cancels a value from a file of flags.
                if value in (None, "", []):
                    return False
                is_other = value != (item.default if item.default is not MISSING else item.default_factory())
                if provided is None:
                    return is_other
                return bool({name, f"no_{name}"} & {*provided}) and (is_other or value not in OFF)
    return False


# ---- copies of arguments, with changes ----


Arguments = TypeVar("Arguments")


def changed(arguments: Arguments, **changes: object) -> Arguments:
    """Return a copy of `arguments` with these fields changed.

    For the arguments of trainers: `dataclasses.replace` would run `__post_init__` again, on values already processed.

    Raises:
        AttributeError: for a field that `arguments` does not have.
    """
    derived = copy(arguments)
    for name, value in changes.items():
        getattr(arguments, name)
        object.__setattr__(derived, name, value)
    return derived


def without_nested_secrets(arguments: Arguments) -> Arguments:
    """Return a copy of a trainer's `arguments` with hidden credentials of flags such as model_init_kwargs.

    A trainer writes its arguments into training_args.bin, into every checkpoint, and to its trackers.
    """
    nested = {name: value for name, value in vars(arguments).items() if isinstance(value, Mapping | list | tuple)}
    hidden = {name: without_credentials(value) for name, value in nested.items()}
    # A value without credentials stays the same object, possibly known to an engine.
    return changed(arguments, **{name: value for name, value in hidden.items() if value != nested[name]})


# ---- flags as words of a command line ----


# The flags of your model for all runs, and the flags of an adapter in addition to `--lora_...`.
HOLD_FOR_ALL = (
    *("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit"),
    *("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)
ADAPTER = ("use_peft", "use_rslora", "use_dora")


def flags_for_all(model_args: "ModelConfig", without: Sequence[str] = ()) -> list[str]:
    """Return the flags of the user's model for all runs, without those that a run's own settings set."""
    return given_words(model_args, without, HOLD_FOR_ALL)


def flags_of_adapter(model_args: "ModelConfig") -> list[str]:
    """Return the flags of the adapter trained by the first run and continued by the others."""
    if not model_args.use_peft:
        return []
    # Each run sets the task of its own adapter.
    lora = (each.name for each in fields(model_args) if each.name.startswith("lora_"))
    return given_words(model_args, ("lora_task_type",), (*ADAPTER, *lora))


def given_words(
    group: "DataclassInstance", without: Sequence[str] = (), only: Sequence[str] | None = None
) -> list[str]:
    """Return the flags of a parsed group with values other than their defaults, as words of a command line.

    Args:
        without: flags to leave out.
        only: the flags to return; by default all.
    """
    words: list[str] = []
    for each in fields(group):
        value = getattr(group, each.name)
        is_selected = each.init and each.name not in without and (only is None or each.name in only)
        if is_selected and value is not None and value != each.default and value != []:
            words += [f"--{each.name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words

"""Flags hold to what they declare: the mechanism on a small recipe, and every rule of every recipe once."""

import importlib
import math
import pkgutil
import re
import string
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest

from hfllm.errors import InputError
from hfllm.flags import (
    ALWAYS,
    GIVEN,
    NAMED,
    POSITIVE,
    UNNAMED,
    Clashes,
    Fact,
    Flags,
    Refused,
    at_least,
    check_flags,
    flag,
    is_set,
    rules_of,
)
from hfllm.runs.recipes import load_recipe

SHOWS = Fact(lambda flags: flags.shows, "the rows have pictures")


@dataclass
class Library:
    model_name_or_path: str | None = None
    use_peft: bool = False
    checkpointing: bool = True
    strategy: str = "no"


@dataclass(frozen=True)
class Base:
    refused: ClassVar[Refused] = {"strategy": ALWAYS.because("it is measured at the end")}
    clashes: ClassVar[Clashes] = {"--stage {stage!r} needs --parts": lambda flags: not flags.parts}


@dataclass(frozen=True)
class Arguments(Base):
    """A small recipe's flags."""

    num_prompts: int = flag(40, "Prompts.", takes=at_least(1), never=NAMED)
    temperature: float = flag(1.0, "Of the samples.", takes=POSITIVE)
    controls: list[str] | None = flag(None, "Controls.", some_of=("shuffled", "plain"))
    parts: list[str] = flag(("layer", "kind"), "Parts.")
    stage: str = flag("rl", "The last stage.", choices=["sl", "rl"])
    judge: bool = flag(
        False, "Judge.", never=(UNNAMED, Fact(lambda flags: flags.stage == "sl", "--stage {stage} needs no judge"))
    )
    freeze: bool = flag(False, "Freeze.", never=SHOWS)

    refused: ClassVar[Refused] = {"use_peft": UNNAMED.because("the model is made here")}


def as_parsed(*names, **values):
    """The flags as if the user had named these."""
    groups = Arguments(**{k: v for k, v in values.items() if k in Arguments.__dataclass_fields__}), Library()
    for name in values.keys() & vars(groups[1]).keys():
        setattr(groups[1], name, values[name])
    for group in groups:
        object.__setattr__(group, GIVEN, (*names, *values))
    return groups


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"num_prompts": 0}, "--num_prompts 0: expected at least 1"),
        ({"temperature": math.nan}, "--temperature nan: expected a number above 0"),
        ({"temperature": math.inf}, "--temperature inf: expected a number above 0"),
        ({"controls": ["plan"]}, "--controls 'plan': expected some of shuffled, plain, or none"),
        ({"controls": ["plain", "none"]}, "--controls plain none: expected some of shuffled, plain, or none alone"),
        ({"num_prompts": 4, "model_name_or_path": "m"}, "--num_prompts cannot be used here: the model is named"),
        ({"judge": True}, "--judge cannot be used here: no model is named"),
        ({"judge": True, "model_name_or_path": "m", "stage": "sl"}, "--stage sl needs no judge"),
        ({"use_peft": True}, "--use_peft cannot be used here: the model is made here"),
        # Of a dataclass that it comes from.
        ({"strategy": "steps"}, "--strategy cannot be used here: it is measured at the end"),
        ({"parts": []}, "--stage 'rl' needs --parts"),
    ],
)
def test_what_is_declared_is_refused(values, complaint):
    with pytest.raises(InputError) as error:
        check_flags(*as_parsed(**values))
    assert complaint in str(error.value)


def test_what_has_an_effect_is_taken():
    check_flags(*as_parsed(num_prompts=1, temperature=0.5, controls=["shuffled"], parts=["layer"], stage="sl"))
    check_flags(*as_parsed(controls=["none"], judge=True, use_peft=True, model_name_or_path="m"))
    assert Arguments().parts == ["layer", "kind"] and Arguments().parts is not Arguments().parts


def test_facts_that_are_not_known_yet_refuse_nothing():
    parsed = as_parsed(freeze=True)
    check_flags(*parsed)
    check_flags(*parsed, shows=False)
    with pytest.raises(InputError, match="--freeze cannot be used here: the rows have pictures"):
        check_flags(*parsed, shows=True)
    # All flags that a clash is about are known where all are checked.
    check_flags(*as_parsed(parts=[]), names=["parts"])
    # A model that no dataclass here could name is not one that is not named.
    check_flags(replace(parsed[0], judge=True))


def test_a_flag_is_set_when_the_user_asks_for_something_by_it():
    assert is_set("num_prompts", *as_parsed(num_prompts=40)), "named, though at its default"
    assert not is_set("use_peft", *as_parsed(use_peft=False)) and not is_set("strategy", *as_parsed(strategy="no"))
    assert is_set("checkpointing", *as_parsed("no_checkpointing", checkpointing=False))
    settings = replace(as_parsed()[0], num_prompts=7), as_parsed()[1]
    object.__setattr__(settings[0], GIVEN, ())
    assert not is_set("num_prompts", *settings), "a default of the recipe's settings"
    assert not is_set("model_name_or_path", *as_parsed(model_name_or_path=""))
    assert is_set("num_prompts", Arguments(num_prompts=7)) and not is_set("num_prompts", Arguments())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pretrain", ["--objective", "causal", "--packing", "false"]),
        ("federated", ["--aggregation", "mean", "--clip_norm", "1", "--learner", "sft"]),
        ("federated", ["--min_organisations", "1", "--clip_norm", "1", "--noise_multiplier", "1"]),
        ("scaling_laws", ["--dataset_name", "world", "--probe", "true", "--probe_shots", "1"]),
        ("vision", ["--num_rl_prompts", "0", "--use_peft", "false"]),
        ("evaluate", ["--num_shots", "0", "--pretrain_config", ""]),
    ],
)
def test_values_that_fit_are_taken(recipe, words):
    check_flags(*load_recipe(recipe).parse(words))


@pytest.mark.parametrize(
    ("recipe", "words", "reason"),
    [
        ("scaling_laws", ["--dataset_name", "world", "--max_samples", "5"], "the world is as large as the runs need"),
        ("scaling_laws", ["--runs", "f.csv", "--dataset_config", "en"], "it is for the grid, which --runs replaces"),
        ("distill", ["--sequence_level", "--temperature", "2"], "--sequence_level learns only from answers"),
    ],
)
def test_a_stage_has_the_first_word(recipe, words, reason):
    with pytest.raises(InputError, match=reason):
        check_flags(*load_recipe(recipe).parse(words))


def recipe_arguments():
    """Every dataclass of flags with rules, by its module and name."""
    import hfllm

    found = {}
    for room in ("hfllm.stages", "hfllm.data", "hfllm.scaling", "hfllm.trainers"):
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            if not module.name.endswith(("flags", "options", "loading", "planner", "learning_rate", "rows")) and (
                room != "hfllm.stages"
            ):
                continue
            for name, kind in vars(importlib.import_module(module.name)).items():
                if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__") and rules_of(kind):
                    found[f"{kind.__module__}.{name}"] = kind
    assert hfllm and len(found) > 30
    return found.values()


def other_value(item):
    """A value of a flag that is not its default."""
    if choices := item.metadata.get("choices"):
        return next(choice for choice in choices if choice != item.default)
    if item.metadata["help"].rules.some_of:
        return [item.metadata["help"].rules.some_of[0]]
    if isinstance(item.default, bool):
        return not item.default
    kinds = {"int": 1_000_003, "float": 0.123, "str": "other"}
    kind = str(item.type)
    return ["other"] if "list" in kind else next((value for name, value in kinds.items() if name in kind), "other")


def test_every_range_of_every_recipe_is_held():
    count = 0
    for kind in recipe_arguments():
        for name, takes in ((name, rules.takes) for name, rules in rules_of(kind).items() if rules.takes):
            count += 1
            for value in (next(each for each in (-2, 0, 2, 10**12, 0.5) if not takes.holds(each)), math.nan):
                with pytest.raises(InputError, match=f"--{name} .*: expected {takes.words[:8]}"):
                    check_flags(with_value(kind(), name, value))
    assert count > 100


def test_every_fact_of_every_recipe_refuses(monkeypatch):
    count = 0
    for kind in recipe_arguments():
        for item in fields(kind):
            text = item.metadata.get("help")
            for fact in getattr(getattr(text, "rules", None), "never", ()):
                count += 1
                parsed = with_value(kind(), item.name, other_value(item))
                with monkeypatch.context() as patch:
                    for base in (base for base in kind.__mro__ if "refused" in vars(base)):
                        patch.setattr(base, "refused", {})
                    held = replace(fact, holds=lambda flags: True)
                    patch.setattr(text, "rules", replace(text.rules, takes=None, never=(held,)))
                    with pytest.raises(InputError) as error:
                        check_flags(parsed)
                reason = fact.reason.format_map(Flags(parsed))
                assert reason and str(error.value) == f"--{item.name} cannot be used here: {reason}"
    assert count > 100


def test_every_clash_of_every_recipe_names_flags_that_there_are():
    others = {"model_name_or_path", "attn_implementation", "world_size", "ptx_coef"}
    count = 0
    for kind in recipe_arguments():
        for message in vars(kind).get("clashes", {}):
            count += 1
            names = {re.match(r"\w+", name)[0] for _, name, _, _ in string.Formatter().parse(message) if name}
            assert names - others <= {*dir(kind())}, message
    assert count > 30


def with_value(group, name, value):
    """A copy with this value, whatever the dataclass thinks of it."""
    copied = object.__new__(type(group))
    for key, each in {**vars(group), name: value}.items():
        object.__setattr__(copied, key, each)
    return copied

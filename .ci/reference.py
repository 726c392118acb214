"""Write docs/reference/flags.md from what the flags declare. Usage: reference.py, seconds; without torch.

`tests/test_docs.py` shows that the page is current.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hfllm.flags import Fact, Refused, Rules, rules_of  # noqa: E402
from hfllm.runs.recipes import load_recipe, recipe_names  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "flags.md"
HEAD = """# Flags of every recipe

Written by `python .ci/reference.py` from the flags' own declarations: edit those, not this page. It holds what hfllm
adds. Each recipe also takes the flags of the class of transformers or TRL that its section names (learning rates,
batches, saving), and `hfllm RECIPE --help_all` prints all of them with the defaults of a run.

Flags that several recipes share stand once, at the end, under the class that declares them.

"Refused" says when a flag has no effect: a run that names it then ends with one line, before any work. Lists
below a table say which flags contradict each other, or lack another, in the words of that line.
"""


def page() -> str:
    """Return the text of the page: every recipe, then the flags that several recipes share."""
    kinds = {name: load_recipe(name).main.__annotations__["script_args"] for name in recipe_names()}
    owners = Counter(owner for kind in kinds.values() for owner in {owner_of(kind, item) for item in fields(kind)})
    shared = [owner for owner, count in owners.items() if count > 1]
    lines = [HEAD]
    for name, kind in kinds.items():
        lines += section(name, kind, shared)
    for owner in sorted(shared, key=lambda kind: kind.__name__):
        users = [name for name, kind in kinds.items() if owner in kind.__mro__]
        lines += [f"## {owner.__name__}\n\n{summary(owner.__doc__)} Flags of {', '.join(users)}.\n"]
        lines += table(owner, [item for item in fields(owner) if owner_of(owner, item) is owner])
    return "\n".join(lines).rstrip() + "\n"


def owner_of(kind: type, item: Field) -> type:
    """Return the class that declares a flag, with its default."""
    return next(parent for parent in kind.__mro__ if item.name in vars(parent).get("__annotations__", {}))


def summary(text: str) -> str:
    """Return the first paragraph of a docstring."""
    return " ".join(text.split("\n\n")[0].split())


def section(recipe: str, kind: type, shared: list[type]) -> Iterator[str]:
    """Yield the lines of one recipe: a table of its flags, the flags of libraries that it refuses, and clashes."""
    module = load_recipe(recipe)
    yield f"## {recipe}\n\n{summary(module.__doc__)}\n"
    types = module.main.__annotations__
    more = [f"`{types[name]}`".replace('"', "") for name in ("training_args", "model_args") if name in types]
    items = {item: owner_of(kind, item) for item in fields(kind)}
    more += [
        f"[{each.__name__}](#{each.__name__.lower()})" for each in dict.fromkeys(items.values()) if each in shared
    ]
    if more:
        yield f"It also takes the flags of {', '.join(more)}.\n"
    if own := [item for item, owner in items.items() if owner not in shared]:
        yield from table(kind, own)
    refusals = [(name, facts) for parent in kind.__mro__ for name, facts in refused_by(parent).items()]
    for name, facts in sorted(refusals, key=lambda each: each[0]):
        reasons = facts if isinstance(facts, tuple) else (facts,)
        yield f"- `--{name}` is refused: {'; '.join(reason_of(fact) for fact in reasons)}"
    clashes = [message for parent in kind.__mro__ for message in vars(parent).get("clashes", {})]
    for message in clashes:
        yield f"- Refused: {re.sub(r'{[^}]*}', '...', message)}"
    if refusals or clashes:
        yield ""


def table(kind: type, items: list[Field]) -> Iterator[str]:
    """Yield the table of some flags of a class."""
    rules = rules_of(kind)
    yield "| flag | default | meaning | values | refused |\n| --- | --- | --- | --- | --- |"
    for item in items:
        refused = "; ".join(reason_of(fact) for fact in rules.get(item.name, Rules()).never)
        meaning = item.metadata.get("help", "").replace("%%", "%")
        cells = f"`--{item.name}`", default_of(item), meaning, values_of(item, rules), refused
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
    yield ""


def refused_by(kind: type) -> Refused:
    """Return the flags of other classes that a class itself refuses."""
    return vars(kind).get("refused", {})


def default_of(item: Field) -> str:
    """Return a flag's default in words; a value of this machine would make another page elsewhere."""
    value = item.default_factory() if item.default is MISSING else item.default
    if value is None or value == "" or value == []:
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def values_of(item: Field, rules: dict[str, Rules]) -> str:
    """Return the valid values of a flag in words, empty where its type says all."""
    rule = rules.get(item.name, Rules())
    if choices := item.metadata.get("choices"):
        return ", ".join(f"`{each}`" for each in choices)
    if rule.some_of:
        return f"some of {', '.join(f'`{each}`' for each in rule.some_of)}, or `none`"
    return rule.takes.words if rule.takes else ""


def reason_of(fact: Fact) -> str:
    """Return why a flag is refused; a flag whose value stands in the message is named instead."""
    return re.sub(r"\{(\w+)[^}]*\}", r"`--\1`", fact.reason)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))

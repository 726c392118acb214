"""Measure the structure of the package and the words of its texts. Usage: house.py [ROOT], seconds.

`tests/test_architecture.py` takes its graph of imports from here and holds the limits.
"""

import ast
import gc
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Objects that hold all flags of a run.
FLAG_OBJECTS = {"script_args", "model_args", "training_args"}
ERRORS = {"InputError", "ValueError", "TypeError", "SystemExit"}
WORDS = ("what", "that", "those", "which", "each", "place")
PARTICIPLES = {"told", "said", "asked", "found", "given", "made", "kept", "wanted", "shown", "known", "seen", "taken"}


class House:
    """The modules of a checkout's package, and what each imports.

    Args:
        root: the checkout.
        package: the folder of the package in it.
    """

    def __init__(self, root: Path = ROOT, package: str = "hfllm") -> None:
        self.root, self.package = root, root / package

    @cached_property
    def modules(self) -> dict[str, Path]:
        """Every module of the package and its file."""
        names = {}
        for path in sorted(self.package.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return names

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """The syntax tree of each module."""
        # Millions of small objects that live on: to look through them for garbage takes twice the time of parsing.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}
        finally:
            if was_enabled:
                gc.enable()

    def imports(self, path: Path, typing: bool = False) -> set[str]:
        """Return every module that a file imports, wherever in it.

        `from package import module` names the module, `from module import name` the module of the name.

        Args:
            typing: count those for type checking only as well.
        """
        statements = self._import_statements(path)
        found = set()
        for node, is_typing in statements:
            if is_typing and not typing:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = path.relative_to(self.root).parts[: -node.level]
                    base = ".".join([*parts, *([base] if base else [])])
                wholes = {f"{base}.{alias.name}" for alias in node.names}
                found |= {whole if whole in self.modules else base for whole in wholes}
        return found

    @cache  # noqa: B019 - a house lives as long as the run
    def _import_statements(self, path: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
        """Return the imports of a file, and whether each is for type checking only."""
        tree = self.trees.get(self._names.get(path)) or ast.parse(path.read_text(encoding="utf-8"))
        return [*_imports(tree, False)]

    @cached_property
    def _names(self) -> dict[Path, str]:
        return {path: name for name, path in self.modules.items()}

    def arrows(self, typing: bool = False) -> dict[str, set[str]]:
        """Return what each module imports of the package."""
        return {name: self.imports(path, typing) & self.modules.keys() for name, path in self.modules.items()}

    def behind(self, path: Path) -> int:
        """Return the lines of the package that a file imports or names in a text, directly or through others."""
        todo, seen = [path], set()
        while todo:
            path = todo.pop()
            names = self.imports(path) & self.modules.keys()
            if path != self.package / "__init__.py":
                names |= self.named_in_texts(path)
            todo += [self.modules[name] for name in names - seen]
            seen |= names
        return sum(len(_lines(self.modules[name])) for name in seen)

    def named_in_texts(self, path: Path) -> set[str]:
        """Return the modules that texts such as "hfllm.trainers.ppo.config.PPOConfig" name, to be imported later."""
        found = set()
        for text in re.findall(rf"""["']({self.package.name}(?:\.\w+)+)""", path.read_text(encoding="utf-8")):
            while text not in self.modules:
                text = text.rpartition(".")[0]
            found.add(text)
        return found

    def table(self) -> dict[str, float]:
        """Return the figures of the structure."""
        files = [name for name, path in self.modules.items() if path.stem != "__init__"]
        arrows, code, refusing = self.arrows(), 0, 0
        for name, path in self.modules.items():
            lines = code_lines(path, self.trees[name])
            code += len(lines)
            refusing += len(lines & refusal_lines(self.trees[name]))
        found = {
            "files": len(files),
            "arrows": sum(len(arrows[name] & {*files}) for name in files),
            "circles": len(circles(arrows)),
            "circles, with type-only imports": len(circles(self.arrows(typing=True))),
            "lines": sum(len(_lines(path)) for path in self.modules.values()),
            "lines of code": code,
            "share of code that refuses (%)": round(100 * refusing / code, 1),
            "functions with whole flag objects": sum(1 for tree in self.trees.values() for _ in flag_functions(tree)),
        }
        for recipe in ("rlhf", "push"):
            found[f"lines behind {recipe}.py"] = self.behind(self.root / "recipes" / f"{recipe}.py")
        return found

    def words(self) -> dict[str, float]:
        """Return how often words stand in docstrings and comments, and kinds of identifiers, per 1,000."""
        prose = Counter()
        for name, path in self.modules.items():
            prose.update(re.findall(r"[a-z']+", prose_of(path, self.trees[name]).lower()))
        names = Counter(each for tree in self.trees.values() for each in bound_names(tree))
        shares = {f"word {word!r}": 1000 * prose[word] / prose.total() for word in WORDS}
        shares["names that are participles"] = 1000 * sum(names[each] for each in PARTICIPLES) / names.total()
        shares["names place, places"] = 1000 * (names["place"] + names["places"]) / names.total()
        return {name: round(share, 1) for name, share in shares.items()}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other (Tarjan's strongly connected components of two or more)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in arrows.get(name, ()):
            if target not in order:
                visit(target)
            if target in stack:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append({*stack[at:]})
            del stack[at:]

    for name in arrows:
        if name not in order:
            visit(name)
    return found


def code_lines(path: Path, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code: no blank lines, comments or docstrings."""
    texts = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(_lines(path), 1)
    return {number for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in texts}


def refusal_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that only refuse input: errors, what leads to nothing else, and checks."""
    refusing: dict[int, bool] = {}

    def refuses(node: ast.AST) -> bool:
        if isinstance(node, ast.Raise):
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            return getattr(called, "id", "") in ERRORS
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return _is_check(getattr(node.value.func, "id", getattr(node.value.func, "attr", "")))
        if isinstance(node, (ast.If, ast.For)):
            return all([refuses(child) for child in (*node.body, *node.orelse)])
        return isinstance(node, ast.FunctionDef) and _is_check(node.name)

    for node in ast.walk(tree):
        refusing[id(node)] = refuses(node)
    return {line for node in ast.walk(tree) if refusing[id(node)] for line in range(node.lineno, node.end_lineno + 1)}


def flag_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions that take an object of all flags."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            if FLAG_OBJECTS & {argument.arg for argument in arguments}:
                yield node


def prose_of(path: Path, tree: ast.Module) -> str:
    """Return the docstrings and comments of a file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n".join([*texts, *(line.strip()[2:] for line in _lines(path) if line.strip().startswith("# "))])


def bound_names(tree: ast.Module) -> Iterator[str]:
    """Yield the name of each variable that is set, argument, function and class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def _is_check(name: str) -> bool:
    # The whole word: a checkpoint or a checksum is no check.
    return re.match(r"_?(check|refuse)(_|$)", name) is not None


def _imports(node: ast.AST, is_typing: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield the imports below a node; they are statements, so expressions are not looked through."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, is_typing
        elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            is_for_types = isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"
            yield from _imports(child, is_typing or is_for_types)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    house = House(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
    for name, figure in {**house.table(), **house.words()}.items():
        print(f"{name:40} {figure:>10,}")

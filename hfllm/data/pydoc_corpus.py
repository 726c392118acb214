"""A real corpus without a download: the documentation of the running Python.

Docstrings are read from the standard library's source without importing it, since some modules have side effects when
imported (`import this` prints, `antigravity` opens a browser). The language reference's topics come from
`pydoc_data.topics`, which is one large dictionary. The texts are under the PSF License, version 2.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

LICENSE = "PSF-2.0"
# Not documentation: tests, and third-party code that installers add.
LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data")


def pydoc_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every distinct docstring and topic, in the order of their names.

    Names are like `argparse.ArgumentParser.parse_args` and `topics.BOOLEANS`. They depend only on the Python build,
    not on what has been imported or installed.
    """
    seen: set[str] = set()
    for name, text in chain(_topics(), _docstrings()):
        if text and text not in seen:
            seen.add(text)
            yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics.{name}", topics[name].strip()


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in LEFT_OUT for part in parts):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old code need no report
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _of_node(tree, module)


def _of_node(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the docstring of a module, class or function, then those of its members."""
    text = ast.get_docstring(node)
    if text:
        yield name, text.strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of_node(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            for inner in ast.walk(child):
                if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _of_node(inner, f"{name}.{inner.name}")

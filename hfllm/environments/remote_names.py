"""Names of another process: run in a session whose `__ask__` runs code in the other one. Standard library only.

A test that calls a function of a program does not run in the program's process: arguments go there as Python writes
them, and results come back as literals. So no program passes a test by an object that equals all others, by another
meaning of a built-in function, or by ending it, and it reads of the test what it gets as arguments alone.
"""

import ast
import builtins
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

# What runs code there, and returns `V` with the value of its last line, or `E` with its error: the names of the
# error's classes in a line, and the message.
Ask = Callable[[str], str]
_numbers = itertools.count()
# Run there first: what is sent is of the plain kinds that literals have, as far as its values are.
PREPARE = """
def __plain__(value):
    kinds = [kind for kind in (dict, list, tuple, set, frozenset) if isinstance(value, kind)]
    if kinds and kinds[0] is dict:
        return {__plain__(key): __plain__(each) for key, each in value.items()}
    if kinds:
        return {frozenset: set}.get(kinds[0], kinds[0])(map(__plain__, value))
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value
"""
OPERATORS = {
    **{"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@"},
    **{"and": "&", "or": "|", "xor": "^", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
}


class Remote:
    """A value that no literal can be, by the code that has it there.

    What is done with it is done there: a call, attributes, items, its length, its text and its truth, and an operation
    with another such value. Whether it equals a literal, or contains one, is decided here.
    """

    def __init__(self, ask: Ask, code: str):
        self.__dict__.update(_ask=ask, _code=code)

    def __repr__(self) -> str:
        return self._code

    def __call__(self, /, *args: object, **kwargs: object) -> Any:
        name = f"_given{next(_numbers)}"
        _asked(self._ask, f"{name} = ({code_of(args)}, {code_of(kwargs)})")
        result = self._fetched(f"{self._code}(*{name}[0], **{name}[1])")
        for place, value in [*enumerate(args), *kwargs.items()]:
            where = f"{name}[{int(isinstance(place, str))}][{place!r}]"
            _take_over(value, lambda where=where: self._fetched(where))
        return result

    def _fetched(self, code: str) -> Any:
        return _fetched(self._ask, code)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._fetched(f"{self._code}.{name}")

    def __setattr__(self, name: str, value: object) -> None:
        _asked(self._ask, f"{self._code}.{name} = {code_of(value)}")

    def __getitem__(self, key: object) -> Any:
        return self._fetched(f"{self._code}[{code_of(key)}]")

    def __setitem__(self, key: object, value: object) -> None:
        _asked(self._ask, f"{self._code}[{code_of(key)}] = {code_of(value)}")

    def __delitem__(self, key: object) -> None:
        _asked(self._ask, f"del {self._code}[{code_of(key)}]")

    def __iter__(self) -> Iterator[Any]:
        name = f"_each{next(_numbers)}"
        _asked(self._ask, f"{name} = iter({self._code})")
        while True:
            try:
                yield self._fetched(f"next({name})")
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._fetched(f"next({self._code})")

    def __contains__(self, value: object) -> bool:
        return any(each == value for each in self)

    def __len__(self) -> int:
        return self._fetched(f"len({self._code})")

    def __bool__(self) -> bool:
        return self._fetched(f"bool({self._code})") is True

    def __str__(self) -> str:
        return str(self._fetched(f"str({self._code})"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._fetched(f"{self._code} == {other._code}") is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._code)


def _operation(symbol: str) -> Callable[[Remote, object], Any]:
    def operate(self: Remote, other: object) -> Any:
        return (
            self._fetched(f"{self._code} {symbol} {code_of(other)}") if isinstance(other, Remote) else NotImplemented
        )

    return operate


for _name, _symbol in OPERATORS.items():
    setattr(Remote, f"__{_name}__", _operation(_symbol))


def code_of(value: object) -> str:
    """Return code that has a value there."""
    if isinstance(value, float):
        return f"float({str(value)!r})"
    if isinstance(value, list | set | frozenset | tuple):
        name = next(kind.__name__ for kind in (list, set, frozenset, tuple) if isinstance(value, kind))
        return f"{name}([{', '.join(map(code_of, value))}])"
    if isinstance(value, dict):
        return f"dict([{', '.join(f'({code_of(key)}, {code_of(each)})' for key, each in value.items())}])"
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return f"__import__('numpy').array({code_of(value.tolist())})"
    if getattr(builtins, getattr(value, "__name__", ""), None) is value and value is not None:
        return value.__name__
    return repr(value)


def _asked(ask: Ask, code: str) -> str:
    """Return what the last line of code is there, or raise its error here, as the nearest built-in one."""
    reply = ask(code)
    if reply[:1] == "V":
        return reply[1:]
    names, _, message = reply[1:].partition("\n")
    error: Exception = RuntimeError(message)
    for kind in reversed([getattr(builtins, name, None) for name in names.split()]):
        # Some, as UnicodeDecodeError, need more than a message: the next class is as near.
        with suppress(TypeError):
            error = kind(message) if isinstance(kind, type) and issubclass(kind, Exception) else error
    raise error


def _fetched(ask: Ask, code: str) -> Any:
    """Return a value from there: as it is, or where no literal can be it, by its name there."""
    name = f"_value{next(_numbers)}"
    text = _asked(ask, f"{name} = {code}\n__plain__({name})")
    if not text:
        return None
    try:
        return ast.literal_eval(_Numbers().visit(ast.parse(text, mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Remote(ask, name)


class _Numbers(ast.NodeTransformer):
    """Reads `inf` and `nan`, which are no literals."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def _take_over(value: object, changed: Callable[[], object]) -> None:
    """Let an argument be as the call has left it."""
    if isinstance(value, list):
        new = changed()
        value[:] = new if isinstance(new, list) else value
    elif isinstance(value, dict | set):
        new = changed()
        if isinstance(new, dict if isinstance(value, dict) else set):
            value.clear()
            value.update(new)


def remote_names(ask: Ask, test: str, names: dict[str, object]) -> int:
    """Add the names that a test uses and does not define itself to the names that it has; return how many are there.

    Built-in functions are the test's own, whatever the program calls by their names, and so are modules of Python of
    which it uses attributes.
    """
    tree, count = ast.parse(test), 0
    modules = {node.value.id for node in ast.walk(tree) if _is_of_module(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id in modules and node.id not in names:
                names[node.id] = importlib.import_module(node.id)
            elif not (node.id in names or hasattr(builtins, node.id)):
                names[node.id] = Remote(ask, node.id)
            count += isinstance(names.get(node.id), Remote)
    names["isinstance"] = _is_instance
    return count


def _is_of_module(node: ast.AST) -> bool:
    is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return is_attribute and node.value.id in sys.stdlib_module_names


def _is_instance(value: object, kind: Any) -> bool:
    """As the built-in function; of a class there it asks there. It is the function of this file's names too."""
    if type(kind) is Remote:
        return type(value) is Remote and value._fetched(f"isinstance({value._code}, {kind._code})") is True
    return builtins.isinstance(value, kind)

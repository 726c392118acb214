"""Names of another process: run in a session whose `__ask__` runs code in the other one. Standard library only.

A test that calls a function of a program does not run in the program's process: arguments go there as Python writes
them, and results come back as literals. So no program can fool its test by an object that equals all others or by
another meaning of a built-in function, and none can end the test or read it.
"""

import ast
import builtins
import itertools
from collections.abc import Callable, Iterator
from typing import Any

# What runs code there, and returns `V` with the value of its last line, or `E` with its error.
Ask = Callable[[str], str]
_numbers = itertools.count()


class Remote:
    """A value that no literal can be, by the code that has it there.

    Its call, attributes, items, length and text are those of the value. It equals itself alone.
    """

    def __init__(self, ask: Ask, code: str):
        self.__dict__.update(_ask=ask, _code=code)

    # A value within the arguments of a call is its own code.
    def __repr__(self) -> str:
        return self._code

    def __call__(self, *args: object, **kwargs: object) -> Any:
        name = f"_given{next(_numbers)}"
        _asked(self._ask, f"{name} = ({args!r}, {kwargs!r})")
        result = _fetched(self._ask, f"{self._code}(*{name}[0], **{name}[1])")
        for index, value in enumerate(args):
            _take_over(value, lambda index=index: _fetched(self._ask, f"{name}[0][{index}]"))
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _fetched(self._ask, f"{self._code}.{name}")

    def __getitem__(self, key: object) -> Any:
        return _fetched(self._ask, f"{self._code}[{key!r}]")

    def __contains__(self, value: object) -> bool:
        return _fetched(self._ask, f"{value!r} in {self._code}") is True

    def __len__(self) -> int:
        return _fetched(self._ask, f"len({self._code})")

    def __iter__(self) -> Iterator[Any]:
        return iter(_fetched(self._ask, f"list({self._code})"))

    def __str__(self) -> str:
        return str(_fetched(self._ask, f"str({self._code})"))


def _asked(ask: Ask, code: str) -> str:
    """Return what the last line of code is there, or raise its error here."""
    reply = ask(code)
    if reply[:1] == "V":
        return reply[1:]
    name, _, message = reply[1:].partition(": ")
    kind = getattr(builtins, name, None)
    is_error = isinstance(kind, type) and issubclass(kind, Exception)
    raise kind(message) if is_error else RuntimeError(reply[1:])


def _fetched(ask: Ask, code: str) -> Any:
    """Return a value from there: as it is, or where no literal can be it, by its name there."""
    name = f"_value{next(_numbers)}"
    text = _asked(ask, f"{name} = {code}\n{name}")
    # Numbers of NumPy are numbers.
    if text.startswith("np."):
        text = _asked(ask, f"{name}.item()")
    if text in ("nan", "inf", "-inf", ""):
        return float(text) if text else None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return Remote(ask, name)


def _take_over(value: object, changed: Callable[[], object]) -> None:
    """Let an argument be as the call has left it."""
    if isinstance(value, list):
        new = changed()
        value[:] = new if isinstance(new, list) else value
    elif isinstance(value, dict | set):
        new = changed()
        if isinstance(new, type(value)):
            value.clear()
            value.update(new)


def remote_names(ask: Ask, test: str, names: dict[str, object]) -> None:
    """Add the names that a test uses and does not define itself to the names that it has.

    Built-in functions are the test's own, whatever the program calls by their names.
    """
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            is_own = node.id in names or hasattr(builtins, node.id)
            names.update({} if is_own else {node.id: Remote(ask, node.id)})

"""Tools that come with the package: a calculator, look-ups in a table and in passages, and Python."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import TypeVar

from hfllm.environments.python_tool import python, python_within
from hfllm.environments.retrieval import retrieval_over
from hfllm.errors import InputError

__all__ = ["calculator", "lookup_in", "python", "python_within", "retrieval_over"]

Value = TypeVar("Value")
LONGEST_EXPRESSION, MOST_BITS = 200, 4096
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """Work out a sum, such as 12 * (3 + 4).

    Args:
        expression: numbers with + - * / // % ** and parentheses.
    """
    # Names, calls and anything else that Python could run are not among what is read.
    expression = str(expression)
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{expression!r} is no sum") from None
    if isinstance(value, float):
        # 0.1 + 0.2 is 0.3, and 6 / 2 is 3; with all the digits that a float is sure of.
        return f"{value:.15g}" if not value.is_integer() or abs(value) >= 1e15 else str(int(value))
    return str(value)


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * max(math.log2(abs(left) or 1), 0) > MOST_BITS:
            raise ValueError("the result is too large")
        value = OPERATORS[type(node.op)](left, right)
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are understood")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError("the result is too large")
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("the result is no number")
    return value


def lookup_in(table: Mapping[str, Mapping[str, object]]) -> Callable[[str, str], str]:
    """Return a tool `lookup(key, attribute)` over a table, such as `{"owl": {"color": "gray"}}`.

    Letter case and spaces around a word do not matter. What the table lacks is told, with what it has.

    Raises:
        InputError: for something else than such a table, and for words in it that differ in case or spaces alone.
    """
    if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
        raise InputError(f'lookup_in: expected a table such as {{"owl": {{"color": "gray"}}}}, got {str(table)[:80]}')
    rows = _by_plain_word({key: _by_plain_word(row) for key, row in table.items()})

    def lookup(key: str, attribute: str) -> str:
        """Look up what is known of something.

        Args:
            key: its name.
            attribute: what to look up of it.
        """
        row = rows.get(_plain(key))
        if row is None:
            raise LookupError(f"nothing is known of {key!r}")
        if _plain(attribute) not in row:
            raise LookupError(f"{attribute!r} is not known; there are: {', '.join(row)}")
        return str(row[_plain(attribute)])

    return lookup


def _by_plain_word(row: Mapping[str, Value]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for word, value in row.items():
        if _plain(word) in found:
            raise InputError(f"lookup_in: {word!r} comes twice, where letter case and spaces around it do not matter")
        found[_plain(word)] = value
    return found


def _plain(word: str) -> str:
    return str(word).strip().casefold()

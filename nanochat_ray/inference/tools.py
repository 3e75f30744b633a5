"""The calculator that a model calls between python_start and python_end. It walks an AST and executes nothing."""

import ast
import math
import operator
import re
from typing import Any

MAX_LENGTH = 512  # characters of an expression
MAX_DEPTH = 100  # nested operations
MAX_BITS = 1024  # of an integer: the range of floats

OPERATORS: dict = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")


def calculate(expression: str) -> str | None:
    """The value of an expression as Python writes it (12/4 is 3.0), or None for anything that is not arithmetic.

    Allowed: numbers (1,234 too), + - * / // % **, minus, parentheses, and 'text'.count('t') on string literals.
    Never raises; time and memory are bounded by the limits above.
    """
    if len(expression) > MAX_LENGTH:
        return None
    if "'" not in expression and '"' not in expression:
        expression = THOUSANDS.sub(lambda number: number[0].replace(",", ""), expression)
    try:
        return repr(_evaluate(ast.parse(expression.strip(), mode="eval").body, MAX_DEPTH))
    except (ValueError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
        return None


def _evaluate(node: ast.expr, depth: int) -> Any:
    """The value of a node, an int or a float. Raises ValueError or ArithmeticError if it has none."""
    if depth == 0:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant():
            value: Any = node.value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, depth - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = _evaluate(left, depth - 1), _evaluate(right, depth - 1)
            if isinstance(op, ast.Pow) and type(a) is type(b) is int and b * (abs(a).bit_length() - 1) > MAX_BITS:
                raise ValueError("too large a power")  # fail before computing it
            value = OPERATORS[type(op)](a, b)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError("not arithmetic")
    # Allow only finite numbers of bounded size, also between operations: no text, bool, complex or infinity.
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("not a number")
    if type(value) is int and value.bit_length() > MAX_BITS:
        raise ValueError("too large")
    return value

"""Sums as Detectron2's configs hold them, "[[x, x * 2**(1.0/3)] for x in [32, 64]]", worked out without ``eval``."""

import ast
import operator
from typing import Any

from fpn_d2.errors import UserError

_LONGEST = 2000  # characters
_MOST_STEPS = 100_000
_LARGEST = 1e18
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # fmt: skip
_FUNCTIONS = {"int": int, "float": float, "round": round, "abs": abs, "range": range, "tuple": tuple, "list": list}


def arithmetic(text: str) -> Any:
    """Work out numbers, text, lists, tuples, + - * / // % **, int(), float(), round(), abs(), range(), and lists made
    by "for x in" one of these.

    Example:
        >>> arithmetic("[x * 2**(1 / 2) for x in (2, 4)]")
        [2.8284271247461903, 5.656854249492381]

    Raises:
        UserError: It is something else, or takes too long.
    """
    try:
        if len(text) > _LONGEST:
            raise UserError(f"it has more than {_LONGEST} characters")
        work = _Sum()
        value = work.value(ast.parse(text.strip(), mode="eval").body, {})
        return work.items(value) if isinstance(value, range) else value
    except UserError as error:
        raise UserError(f"{text!r:.100} is not worked out: {error}") from None
    except (ArithmeticError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{text!r:.100} cannot be worked out: {str(error):.200}") from None


class _Sum:
    def __init__(self) -> None:
        self._steps = 0

    def value(self, node: ast.AST, names: dict[str, Any]) -> Any:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise UserError("it takes too many steps")
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            values = [self.value(part, names) for part in node.elts]
            return tuple(values) if isinstance(node, ast.Tuple) else values
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_number(self.value(node.operand, names)))
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._combined(node, names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._called(node, names)
        if isinstance(node, ast.ListComp) and len(node.generators) == 1:
            return self._for_each(node, names)
        raise UserError(f"{ast.unparse(node)[:100]!r} is no sum of numbers")

    def _combined(self, node: ast.BinOp, names: dict[str, Any]) -> float:
        left, right = (_number(self.value(side, names)) for side in (node.left, node.right))
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise UserError("a power beyond 64")
        return _number(_OPERATORS[type(node.op)](left, right))

    def _called(self, node: ast.Call, names: dict[str, Any]) -> Any:
        name = node.func.id
        if name not in _FUNCTIONS:
            raise UserError(f"it calls {name[:100]!r}")
        arguments = [self.value(argument, names) for argument in node.args]
        if name in ("tuple", "list"):
            return _FUNCTIONS[name](self.items(arguments[0])) if arguments else _FUNCTIONS[name]()
        if name != "range" and len(arguments) != 1:
            raise UserError(f"{name}() takes one number")
        return _FUNCTIONS[name](*map(_number, arguments))

    def _for_each(self, node: ast.ListComp, names: dict[str, Any]) -> list:
        loop = node.generators[0]
        if loop.ifs or loop.is_async or not isinstance(loop.target, ast.Name):
            raise UserError("it is no plain 'for x in'")
        items = self.items(self.value(loop.iter, names))
        # Numbers only: lists of one list twice, and so on, would grow out of all bounds.
        return [self.value(node.elt, {**names, loop.target.id: _number(item)}) for item in items]

    def items(self, value: Any) -> list:
        if not isinstance(value, list | tuple | range):
            raise UserError("it goes through what is no list")
        if len(value) > _MOST_STEPS:
            raise UserError("it takes too many steps")
        self._steps += len(value)
        return list(value)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or abs(value) > _LARGEST:
        raise UserError(f"{value!r:.100} is no number that can be reckoned with")
    return value

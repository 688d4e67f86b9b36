"""Conditions on a sample's json, as users write them: `similarity > 0.3 and punsafe < 0.5 and "cat" in caption`.

Python's own parser reads them, and only the few kinds of node below are let through: comparisons, and/or/not,
arithmetic, constants, names. Nothing is ever evaluated as Python. Names are keys of the json; `json["any key"]` is
for those that are no names. What has no value (an absent key, null, a comparison of text with a number) is unknown,
and so is what depends on it; an unknown sample is not taken. `key is None` asks for absence.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ldmscale.errors import ConfigError

Record = Mapping[str, Any]
_Term = Callable[[Record], Any]

_LONGEST = 4000  # characters
_LISTED = "comparisons, and/or/not, in, + - * /, numbers, text, names of json keys"

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Condition:
    """A parsed condition: `condition(record)` is True, False, or None for unknown.

    Attributes:
        text: as it was written.
        keys: the json keys that it asks for.

    Raises:
        ConfigError: if it is no such condition; says what is not allowed.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.keys: set[str] = set()
        if len(text) > _LONGEST:
            raise ConfigError(f"data.filter has {len(text)} characters; at most {_LONGEST} are read")
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self._term = self._parse(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"data.filter={text!r} is no condition ({error}); write for example "
                "data.filter='similarity > 0.3 and width >= 256'"
            ) from None

    def __call__(self, record: Record) -> bool | None:
        value = self._term(record)
        return None if value is None else bool(value)

    def __reduce__(self) -> tuple[type[Condition], tuple[str]]:
        return Condition, (self.text,)

    def _parse(self, node: ast.expr) -> _Term:
        if isinstance(node, ast.BoolOp):
            return _joined([self._parse(value) for value in node.values], isinstance(node.op, ast.And))
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            inner = self._parse(node.operand)
            work = operator.not_ if isinstance(node.op, ast.Not) else operator.neg
            return lambda record: _known(work, inner(record))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return self._two(_ARITHMETIC[type(node.op)], node.left, node.right, numbers=True)
        if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str, type(None))):
            constant = node.value
            return lambda record: constant
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = [self._parse(part) for part in node.elts]
            return lambda record: [part(record) for part in parts]
        if isinstance(node, ast.Name):
            return self._key(node.id)
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
            and isinstance(node.slice, ast.Constant)
            and isinstance(node.slice.value, str)
        ):
            return self._key(node.slice.value)
        raise ValueError(f"{ast.unparse(node)!r} is not allowed in it; allowed are {_LISTED}")

    def _key(self, key: str) -> _Term:
        self.keys.add(key)
        return lambda record: record.get(key)

    def _compare(self, node: ast.Compare) -> _Term:
        terms, left = [], node.left
        for kind, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(kind, (ast.Is, ast.IsNot)):
                if not (isinstance(right, ast.Constant) and right.value is None):
                    raise ValueError("'is' asks only for None; compare values by ==")
                terms.append(_absent(self._parse(left), isinstance(kind, ast.Is)))
            else:
                terms.append(self._two(_COMPARISONS[type(kind)], left, right))
            left = right
        return terms[0] if len(terms) == 1 else _joined(terms, every=True)

    def _two(
        self, work: Callable[[Any, Any], Any], left: ast.expr, right: ast.expr, *, numbers: bool = False
    ) -> _Term:
        one, other = self._parse(left), self._parse(right)

        def term(record: Record) -> Any:
            a, b = one(record), other(record)
            if numbers and not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
                return None  # also keeps text from being multiplied to gigabytes
            return _known(work, a, b)

        return term


def _joined(terms: list[_Term], every: bool) -> _Term:
    def term(record: Record) -> bool | None:
        unknown = False
        for each in terms:
            value = each(record)
            if value is None:
                unknown = True
            elif bool(value) is not every:
                return not every  # settled, whatever the rest is
        return None if unknown else every

    return term


def _absent(inner: _Term, wanted: bool) -> _Term:
    return lambda record: (inner(record) is None) is wanted


def _known(work: Callable[..., Any], *values: Any) -> Any:
    """What `work` makes of values that are all known; None where one is not, or they do not go together."""
    if any(value is None for value in values):
        return None
    try:
        return work(*values)
    except (TypeError, ValueError, ArithmeticError):
        return None

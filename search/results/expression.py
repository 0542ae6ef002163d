"""Conditions on the rows of a table, such as "top1 >= 0.9 and macs <= 0.5*dense": parsed into a tree, never run as Python.

Python's parser reads the text, and only the nodes listed in `_Evaluator` are computed, column by column. Names with other
characters than letters, digits and `_` stand in backticks: `weight_bits/conv1`.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import did_you_mean

MAX_LENGTH, MAX_DEPTH = 4_000, 50
"""Of a condition: characters, and levels of nesting."""

DENSE = "dense"
"""In a comparison: the dense model's value of the column that is compared."""

EXAMPLE = "for example \"top1 >= 0.9 and macs <= 0.5*dense and budget == 'phone'\""

_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_TRUTH, _NUMBER, _TEXT, _NOTHING = "a truth value", "a number", "a text", "None"


def matching_rows(condition: str, table: pandas.DataFrame, dense: Mapping[str, pandas.Series]) -> pandas.Series:
    """Return for every row whether it satisfies the condition; comparisons with missing values are false.

    Args:
        condition: comparisons (<, <=, >, >=, ==, !=, in, not in) of columns, numbers and texts in quotes, joined by `and`, `or`,
            `not`; sums and products of numbers; columns of truth values alone; `None` for a missing value.
        table: the rows.
        dense: {column: value of the dense model, in every row}.
    Raises:
        InputError: if it is no such condition, or names an unknown column; with the place.
    """
    tree, names = _parse(condition)
    found, kind = _Evaluator(condition, names, table, dense).value(tree.body, 0)
    if kind != _TRUTH:
        raise _error(condition, tree.body, f"must be a condition, but is {kind}")
    return pandas.Series(np.broadcast_to(np.asarray(found, bool), len(table)), table.index)


def _parse(condition: str) -> tuple[ast.Expression, dict[str, str]]:
    """Return the tree, and {identifier: name} of the names in backticks."""
    if len(condition) > MAX_LENGTH:
        raise InputError(f"The condition has {len(condition):,} characters; at most {MAX_LENGTH:,} are read.")
    names: dict[str, str] = {}

    def identifier(quoted: re.Match[str]) -> str:
        name = f"_{len(names)}".ljust(len(quoted[0]), "_")  # of the same length, so that places stay right
        names[name] = quoted[1]
        return name

    text = re.sub(r"`([^`]+)`", identifier, condition)
    try:
        return ast.parse(text, mode="eval"), names
    except SyntaxError as error:
        where = error.offset or len(text) + 1
        problem = f"cannot be read (character {where}): {error.msg}"
        raise InputError(f"The condition {_short(condition)} {problem}. Compare columns with values, {EXAMPLE}.") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deeply for Python's parser
        raise InputError(f"The condition {_short(condition)} cannot be read: {error or type(error).__name__}.") from None


class _Evaluator:
    """Computes nodes: each `value` is (a column or one value, its kind)."""

    def __init__(self, condition: str, names: Mapping[str, str], table: pandas.DataFrame, dense: Mapping[str, pandas.Series]):
        self._condition, self._names, self._table, self._dense = condition, names, table, dense
        self._compared: pandas.Series | None = None  # values of `dense` in the comparison that is being computed

    def value(self, node: ast.expr, depth: int) -> tuple[Any, str]:
        if depth > MAX_DEPTH:
            raise InputError(f"The condition is nested more than {MAX_DEPTH} levels deep.")
        depth += 1
        match node:
            case ast.BoolOp():
                parts = [self._of_kind(part, _TRUTH, depth) for part in node.values]
                join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                return join.reduce([np.broadcast_to(part, len(self._table)) for part in parts]), _TRUTH
            case ast.UnaryOp(op=ast.Not()):
                return np.logical_not(self._of_kind(node.operand, _TRUTH, depth)), _TRUTH
            case ast.UnaryOp(op=ast.USub()):
                return -self._of_kind(node.operand, _NUMBER, depth), _NUMBER
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                left, right = (self._of_kind(side, _NUMBER, depth) for side in (node.left, node.right))
                with np.errstate(all="ignore"):
                    return _ARITHMETIC[type(node.op)](np.asarray(left, float), np.asarray(right, float)), _NUMBER
            case ast.Compare():
                return self._comparison(node, depth), _TRUTH
            case ast.Name():
                return self._column(node)
            case ast.Constant():
                return self._constant(node)
        raise self._wrong(node, "is not allowed in a condition")

    def _of_kind(self, node: ast.expr, kind: str, depth: int) -> Any:
        found, its = self.value(node, depth)
        if its != kind:
            raise self._wrong(node, f"must be {kind}, but is {its}")
        return found

    def _constant(self, node: ast.Constant) -> tuple[Any, str]:
        value = node.value
        if value is None:
            return None, _NOTHING
        if isinstance(value, bool):
            return value, _TRUTH
        if isinstance(value, str):
            return value, _TEXT
        if isinstance(value, int | float) and abs(value) < 1e300:
            return float(value), _NUMBER
        raise self._wrong(node, "is not allowed in a condition")

    def _column(self, node: ast.Name) -> tuple[Any, str]:
        name = self._names.get(node.id, node.id)
        if name == DENSE and self._compared is not None:
            return self._compared.to_numpy(float), _NUMBER
        if name == DENSE:
            raise self._wrong(node, f"stands for the dense value of the one column that it is compared with, {EXAMPLE}")
        check_column(name, self._table, self._place(node))
        column = self._table[name]
        if pandas.api.types.is_bool_dtype(column):
            return column.to_numpy(bool), _TRUTH
        if pandas.api.types.is_numeric_dtype(column):
            return column.to_numpy(float), _NUMBER
        return column.astype(object).where(column.notna(), None).to_numpy(object), _TEXT

    def _comparison(self, node: ast.Compare, depth: int) -> Any:
        before, self._compared = self._compared, self._dense_of(node)
        result: Any = True
        left = node.left
        for operation, right in zip(node.ops, node.comparators, strict=True):
            result = np.logical_and(result, self._compare(left, operation, right, depth))
            left = right
        self._compared = before
        return result

    def _dense_of(self, node: ast.Compare) -> pandas.Series | None:
        names = {self._names.get(inner.id, inner.id) for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if DENSE not in names:
            return None
        columns = sorted(names - {DENSE})
        if len(columns) != 1:
            raise self._wrong(node, f"must compare `dense` with one column, {EXAMPLE}")
        check_column(columns[0], self._table, self._place(node))
        if columns[0] not in self._dense:
            known = ", ".join(self._dense)
            raise self._wrong(node, f"asks for the dense value of `{columns[0]}`, but only these have one: {known}")
        return self._dense[columns[0]]

    def _compare(self, left: ast.expr, operation: ast.cmpop, right: ast.expr, depth: int) -> Any:
        found, kind = self.value(left, depth)
        if isinstance(operation, ast.In | ast.NotIn):
            return self._contained(found, kind, right, depth, isinstance(operation, ast.NotIn))
        if type(operation) not in _COMPARISONS:
            raise self._wrong(left, "is compared with `is`: write ==")
        other, its = self.value(right, depth)
        equality = isinstance(operation, ast.Eq | ast.NotEq)
        if equality and _NOTHING in (kind, its):
            missing = pandas.isna(found if its == _NOTHING else other)
            return missing if isinstance(operation, ast.Eq) else np.logical_not(missing)
        if kind != its:
            raise self._wrong(right, f"is {its}, but is compared with {kind}")
        if kind == _TEXT and not equality:
            raise self._wrong(right, "is a text: compare it with ==, != or in")
        with np.errstate(invalid="ignore"):
            return _COMPARISONS[type(operation)](found, other)

    def _contained(self, found: Any, kind: str, right: ast.expr, depth: int, negated: bool) -> Any:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self._wrong(right, "must be a list such as ('phone', 'watch')")
        result: Any = False
        for element in right.elts:
            result = np.logical_or(result, found == self._of_kind(element, kind, depth))
        return np.logical_not(result) if negated else result

    def _place(self, node: ast.expr) -> str:
        return f"in {_short(self._condition)}, character {node.col_offset + 1}"

    def _wrong(self, node: ast.expr, problem: str) -> InputError:
        return _error(self._condition, node, problem)


def check_column(name: str, table: pandas.DataFrame, place: str) -> None:
    """Raise InputError unless the table has the column; `place` says where it was named."""
    if name not in table:
        known = [str(column) for column in table]
        facts = [column for column in known if "/" not in column]
        choices = f", and {len(known) - len(facts)} choices such as `{known[-1]}`" if len(facts) < len(known) else ""
        raise InputError(
            f"There is no column `{name}` ({place}).{did_you_mean(name, known)} Columns: {', '.join(facts)}{choices}."
        )


def _error(condition: str, node: ast.expr, problem: str) -> InputError:
    end = node.end_col_offset or math.inf
    text = condition.encode()[node.col_offset : int(min(end, node.col_offset + 60))].decode(errors="replace")
    return InputError(f"`{text}` {problem} (in {_short(condition)}, character {node.col_offset + 1}).")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:197] + "...")

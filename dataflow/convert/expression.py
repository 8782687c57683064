"""Filter expressions such as `label in (1, 2) and len(text) > 10`, evaluated on whole record batches.

The language is a small part of Python's: names of fields, numbers, strings, `True`, `False`, `None`, comparisons, `in`,
`and`, `or`, `not`, `+ - * /` and `len`. It is parsed by Python and evaluated by Arrow; no Python of the user's runs.
A comparison with a missing value is neither true nor false, and what is not true is not kept; `x is None` asks for it.
A field whose name is no Python name is written `field("a b")`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from connectors.errors import BadInputError

__all__ = ["Expression", "compare", "constant", "length"]

_COMPARE = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_ARITHMETIC = {
    ast.Add: "add_checked",
    ast.Sub: "subtract_checked",
    ast.Mult: "multiply_checked",
    ast.Div: "divide",
}
_LENGTHS = (
    (pa.types.is_string, pc.utf8_length),
    (pa.types.is_large_string, pc.utf8_length),
    (pa.types.is_binary, pc.binary_length),
    (pa.types.is_large_binary, pc.binary_length),
    (pa.types.is_list, pc.list_value_length),
    (pa.types.is_large_list, pc.list_value_length),
    (pa.types.is_fixed_size_list, pc.list_value_length),
)


@dataclass(frozen=True, slots=True)
class Expression:
    """One filter; immutable and picklable.

    Attributes:
        text: As the user wrote it.
    """

    text: str

    def fields(self, names: list[str]) -> list[str]:
        """Return the fields that it looks at, and so those that have to be read.

        Args:
            names: Fields that there are.

        Raises:
            BadInputError: It is no such expression, or names another field; says which part.
        """
        found = dict.fromkeys(self._names(self._parse()))
        for name in found:
            if name not in names:
                raise BadInputError(f"the filter {self.text!r} asks for {name!r}; there are {', '.join(names)}")
        return list(found)

    def mask(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Return what is to be kept, bool per row.

        Raises:
            BadInputError: The types do not fit, or the result is no truth value.
        """
        try:
            result = self._evaluate(self._parse(), batch)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            schema = batch.schema
            types = (f"{name!r} is {schema.field(name).type}" for name in self.fields(schema.names))
            reasons = "; ".join([str(error), *types])
            raise BadInputError(f"the filter {self.text!r} cannot be evaluated: {reasons}") from error
        if isinstance(result, pa.Scalar):
            result = pa.repeat(result, batch.num_rows)
        if not pa.types.is_boolean(result.type):
            raise BadInputError(f"the filter {self.text!r} gives {result.type} and not true or false")
        mask: npt.NDArray[np.bool_] = pc.fill_null(result, False).to_numpy(zero_copy_only=False)
        return mask

    def _parse(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise BadInputError(f"the filter {self.text!r} is no expression: {error}") from error

    def _names(self, node: ast.expr) -> list[str]:
        """Return names of fields below a node, and insist that everything there is part of the language."""
        match node:
            case ast.Name(id=name):
                return [name]
            case ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=str(name))], keywords=[]):
                return [name]
            case ast.Constant(value=value) if value is None or isinstance(value, (bool, int, float, str)):
                return []
            case ast.Compare(ops=[ast.Is() | ast.IsNot()], left=left, comparators=[ast.Constant(value=None)]):
                return self._names(left)
            case ast.Compare(ops=[ast.In() | ast.NotIn()], left=left, comparators=[ast.Tuple() | ast.List() as many]):
                if all(isinstance(value, ast.Constant) for value in many.elts):
                    return self._names(left)
            case ast.Compare(ops=ops, left=left, comparators=others) if all(type(op) in _COMPARE for op in ops):
                return [name for part in (left, *others) for name in self._names(part)]
            case ast.BoolOp(values=values):
                return [name for part in values for name in self._names(part)]
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                return self._names(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._names(left) + self._names(right)
            case ast.Call(func=ast.Name(id="len"), args=[operand], keywords=[]):
                return self._names(operand)
        raise BadInputError(f"the filter {self.text!r} has a part that filters lack: {ast.unparse(node)}")

    def _evaluate(self, node: ast.expr, batch: pa.RecordBatch) -> Any:
        match node:
            case ast.Name(id=name):
                return _plain(batch.column(name))
            case ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=name)]):
                return _plain(batch.column(str(name)))
            case ast.Constant(value=value):
                return constant(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return constant(-value)
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op], left=left):
                missing = pc.is_null(self._evaluate(left, batch))
                return missing if isinstance(op, ast.Is) else pc.invert(missing)
            case ast.Compare(ops=[ast.In() | ast.NotIn() as op], left=left, comparators=[many]):
                values = self._evaluate(left, batch)
                options = pa.array([ast.literal_eval(value) for value in many.elts], values.type)  # type: ignore[attr-defined]
                inside = pc.if_else(pc.is_null(values), None, pc.is_in(values, options))
                return inside if isinstance(op, ast.In) else pc.invert(inside)
            case ast.Compare(ops=ops, left=left, comparators=others):
                sides = [self._evaluate(part, batch) for part in (left, *others)]
                pairs = zip(ops, sides, sides[1:], strict=False)
                return _fold("and_kleene", [compare(_COMPARE[type(op)], a, b) for op, a, b in pairs])
            case ast.BoolOp(op=op, values=values):
                parts = [self._evaluate(part, batch) for part in values]
                return _fold("and_kleene" if isinstance(op, ast.And) else "or_kleene", parts)
            case ast.UnaryOp(op=op, operand=operand):
                value = self._evaluate(operand, batch)
                return pc.invert(value) if isinstance(op, ast.Not) else pc.negate_checked(value)
            case ast.BinOp(left=left, op=op, right=right):
                sides = [self._evaluate(left, batch), self._evaluate(right, batch)]
                if isinstance(op, ast.Div):  # as in Python, and not as between integers
                    sides = [pc.cast(side, pa.float64(), safe=False) for side in sides]
                return pc.call_function(_ARITHMETIC[type(op)], sides)
            case ast.Call(args=[operand]):
                return length(self._evaluate(operand, batch))
        raise AssertionError(node)


def length(values: Any) -> Any:
    """Return the length of every text, binary or list.

    Raises:
        TypeError: Values of another type.
    """
    for fits, measure in _LENGTHS:
        if fits(values.type):
            return measure(values)
    raise TypeError(f"{values.type} has no length")


def constant(value: Any) -> pa.Scalar:
    """Return a value as Arrow has it; integers from 2^63 on are unsigned.

    Raises:
        OverflowError: An integer of more than 64 bits.
    """
    unsigned = isinstance(value, int) and value >= 1 << 63
    return pa.scalar(value, pa.uint64()) if unsigned else pa.scalar(value)


def compare(function: str, left: Any, right: Any) -> Any:
    """Compare numbers of any size, and all else: Arrow alone fails where their common type is too narrow for one."""
    kinds, types = (left.type, right.type), pa.types
    if pa.uint64() in kinds and any(map(types.is_signed_integer, kinds)):
        left, right = (pc.cast(side, pa.decimal128(20, 0)) for side in (left, right))
    elif any(map(types.is_integer, kinds)) and any(map(types.is_floating, kinds)):
        left, right = (pc.cast(side, pa.float64(), safe=False) for side in (left, right))
    return pc.call_function(function, [left, right])


def _plain(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _fold(function: str, parts: list[Any]) -> Any:
    result = parts[0]
    for part in parts[1:]:
        result = pc.call_function(function, [result, part])
    return result

"""Functions of the user's, named as `module:function` so that every process of a conversion finds them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pyarrow as pa
import xxhash

from connectors.errors import BadInputError
from dataflow.formats.fields import tensor_values

__all__ = ["Function", "batch_to_rows"]


@dataclass(frozen=True, slots=True)
class Function:
    """A function by its name; picklable, loaded where it is called.

    Attributes:
        name: `module:function`.
        folders: Where this process looks for modules; others look there after their own places.
    """

    name: str
    folders: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path), repr=False)

    @classmethod
    def of(cls, function: str | Callable[..., Any]) -> Function:
        """Name a function, given as text or as itself.

        Raises:
            BadInputError: Other processes could not import it.
        """
        if not isinstance(function, str):
            name = f"{function.__module__}:{function.__qualname__}"
            if "<" in name or function.__module__ == "__main__":
                raise BadInputError(
                    f"{name} cannot be imported by the processes of a conversion: put it at the top of a module"
                )
            function = name
        found = cls(function)
        found.load()
        return found

    def load(self) -> Callable[..., Any]:
        """Return the function.

        Raises:
            BadInputError: There is no such module or function.
        """
        module, _, name = self.name.partition(":")
        sys.path.extend(folder for folder in self.folders if folder not in sys.path)
        try:
            function = import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInputError(f"{self.name!r} is not a function that can be imported: {error}") from error
        if not callable(function):
            raise BadInputError(f"{self.name!r} is a {type(function).__name__} and not a function")
        return function

    def identity(self) -> str:
        """Name what the function does, as far as its own module says: a change of its text is another function."""
        try:
            source = inspect.getsource(sys.modules[self.load().__module__])
        except (OSError, TypeError, KeyError):
            source = ""
        return f"{self.name} {xxhash.xxh3_128_hexdigest(source.encode())}"


def batch_to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return samples as user functions see them: plain Python values, media as encoded bytes, tensors as arrays.

    Raises:
        BadInputError: Python has no such value, such as a `datetime` with nanoseconds; names the field.
    """
    columns = [_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(name: str, column: Any) -> Sequence[Any]:
    if isinstance(column.type, pa.FixedShapeTensorType):
        return tensor_values(column)
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError) as error:
        raise BadInputError(f"field {name!r} has a value that a function cannot be given: {error}") from error

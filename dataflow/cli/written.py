"""Options that people write in their own way and that mean a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import click

__all__ = ["Written"]

T = TypeVar("T")


class Written(click.ParamType[T], Generic[T]):
    """A type of option.

    Args:
        name: What help texts call it.
        parse: Turns the text into its value; `ValueError` says what is wrong with it.
    """

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """See click; a default is its value already."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

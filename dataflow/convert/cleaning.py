"""A list of cleaning rules: read from TOML or flags, checked against the source, applied in order to batches.

    [[rule]]
    rule = "missing"
    field = "age"
    fill = "median"

    [[rule]]
    rule = "range"
    field = "age"
    min = 0
    max = 120

A rule judges only what the ones before it have left; `duplicates` comes last, wherever it stands.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from connectors.errors import BadInputError, NotFoundError
from dataflow.convert.rules import RULES, Duplicates, Facts, Rule, Undecodable

if TYPE_CHECKING:
    import os

    import numpy.typing as npt
    import pyarrow as pa

__all__ = ["Cleaned", "Cleaning", "parse_rule", "read_rules"]


class Cleaned(NamedTuple):
    """What rules made of a batch.

    Attributes:
        batch: All samples, with the changes.
        dropped_by: int16 per sample: the rule that drops it, -1 for none.
        changed: Per rule how many samples it changed.
    """

    batch: pa.RecordBatch
    dropped_by: npt.NDArray[np.int16]
    changed: list[int]


@dataclass(frozen=True, slots=True)
class Cleaning:
    """Rules in the order of their application; `duplicates` apart.

    Attributes:
        rules: Over single fields.
        duplicates: Which fields make samples equal; None where duplicates may stay.
    """

    rules: tuple[Rule, ...]
    duplicates: Duplicates | None

    @classmethod
    def of(cls, rules: Iterable[Rule | Duplicates], schema: pa.Schema) -> Cleaning:
        """Check rules against the fields that there are.

        Raises:
            BadInputError: A field does not exist, or does not fit its rule.
        """
        single: list[Rule] = []
        duplicates: Duplicates | None = None
        for rule in rules:
            for name in rule.fields if isinstance(rule, Duplicates) else [rule.field]:
                if name not in schema.names:
                    raise BadInputError(f"rule {rule.name} asks for {name!r}; there are {', '.join(schema.names)}")
            if not isinstance(rule, Duplicates):
                rule.check(schema.field(rule.field))
                single.append(rule.fit(schema.field(rule.field)) if isinstance(rule, Undecodable) else rule)
            elif duplicates is not None:
                raise BadInputError("there can be one rule duplicates only")
            else:
                duplicates = Duplicates(rule.fields or tuple(schema.names))
        return cls(tuple(single), duplicates)

    @property
    def labels(self) -> list[str]:
        """Names of the rules for people, in order."""
        labels = [f"{rule.name} {rule.field}" for rule in self.rules]
        return [*labels, f"duplicates {','.join(self.duplicates.fields)}"] if self.duplicates else labels

    @property
    def fields(self) -> list[str]:
        """What has to be read to judge."""
        names = [rule.field for rule in self.rules] + list(self.duplicates.fields if self.duplicates else ())
        return list(dict.fromkeys(names))

    @property
    def measured(self) -> list[str]:
        """Fields whose distribution has to be known first."""
        return list(dict.fromkeys(rule.field for rule in self.rules if rule.measures))

    def judge(self, batch: pa.RecordBatch, facts: dict[str, Facts]) -> Cleaned:
        """Apply all rules but `duplicates`."""
        dropped_by = np.full(batch.num_rows, -1, np.int16)
        changed = []
        for number, rule in enumerate(self.rules):
            place = batch.schema.get_field_index(rule.field)
            verdict = rule.judge(batch.column(place), facts.get(rule.field, {}))
            left = dropped_by < 0
            changed.append(int((verdict.change & left).sum()))
            dropped_by[verdict.drop & left] = number
            if verdict.column is not None:
                batch = batch.set_column(place, batch.schema.field(place), verdict.column)
        return Cleaned(batch, dropped_by, changed)

    def change(self, batch: pa.RecordBatch, facts: dict[str, Facts]) -> pa.RecordBatch:
        """Apply only what changes values, to samples that have been judged."""
        present = tuple(rule for rule in self.rules if rule.changes and rule.field in batch.schema.names)
        return Cleaning(present, None).judge(batch, facts).batch


def read_rules(path: str | os.PathLike[str]) -> list[Rule | Duplicates]:
    """Read rules from a TOML file: tables `[[rule]]` with the key `rule` and the rule's own.

    Raises:
        NotFoundError: There is no such file.
        BadInputError: It is no TOML, or holds something else.
    """
    try:
        content = tomllib.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputError(f"{path} cannot be read as TOML: {error}") from error
    tables = content.get("rule")
    if content.keys() != {"rule"} or not isinstance(tables, list) or not all(isinstance(row, dict) for row in tables):
        raise BadInputError(f"{path} must consist of tables [[rule]], got {', '.join(content) or 'nothing'}")
    return [_rule(row, str(path)) for row in tables]


def parse_rule(text: str) -> Rule | Duplicates:
    """Read a rule such as `range field=age min=0 max=120`.

    Raises:
        BadInputError: It is none.
    """
    try:
        name, *settings = shlex.split(text)
        row = dict(setting.split("=", 1) for setting in settings)
    except ValueError as error:
        raise BadInputError(f"{text!r} is not a rule; write range field=age min=0 max=120") from error
    values = {key: value if key in ("field", "fields") else _value(value) for key, value in row.items()}
    return _rule({"rule": name} | values, repr(text))


def _rule(row: dict[str, Any], where: str) -> Rule | Duplicates:
    name = row.get("rule")
    kind: Any = RULES.get(str(name))
    if kind is None:
        raise BadInputError(f"{where} has the rule {name!r}; there are {', '.join(RULES)}")
    settings = {key: value for key, value in row.items() if key != "rule"}
    if kind is Duplicates and "fields" in settings:
        named = settings["fields"]
        if not isinstance(named, str | list):
            raise BadInputError(f"fields of rule {name} of {where} must be a list of names, got {named!r}")
        settings["fields"] = tuple(named.split(",") if isinstance(named, str) else named)
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := settings.keys() - known.keys():
        unknown_names = ", ".join(sorted(unknown))
        raise BadInputError(f"rule {name} of {where} has the settings {', '.join(known)}, not {unknown_names}")
    if "field" in known and not isinstance(settings.get("field"), str):
        raise BadInputError(f"rule {name} of {where} needs the name of the field that it looks at: field=NAME")
    for key in ("min", "max", "limit", "factor"):
        if key in settings and (isinstance(settings[key], bool) or not isinstance(settings[key], int | float)):
            raise BadInputError(f"{key} of rule {name} of {where} must be a number, got {settings[key]!r}")
    rule: Rule | Duplicates = kind(**settings)
    return rule


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

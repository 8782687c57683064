"""Cleaning rules: what each drops and changes, and how they are read."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from connectors.errors import BadInputError, NotFoundError
from dataflow.convert import convert, parse_rule, read_rules
from dataflow.convert.cleaning import Cleaning
from dataflow.convert.rules import Duplicates, Iqr, Length, Missing, Range, Zscore
from dataflow.formats import image_field
from dataflow.formats.fields import media_field
from dataflow.testing.media import encode_audio, encode_video, frames, sound


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side)).save(file, "png")
    return file.getvalue()


WHOLE = png(9)
FIELDS = {
    "n": (pa.int64(), [1, 2, 3, None, 100]),
    "x": (pa.float64(), [0.0, float("nan"), 1.0, None, -9.0]),
    "s": (pa.string(), ["", " \t", "a\x00b", None, "good\n"]),
    "many": (pa.list_(pa.int64()), [[], [1], [1, 2], None, [3]]),
}
SCHEMA = pa.schema([*(pa.field(name, kind) for name, (kind, _) in FIELDS.items()), image_field("photo")])
BATCH = pa.record_batch(
    [
        *(pa.array(values, kind) for kind, values in FIELDS.values()),
        pa.array([WHOLE, WHOLE[:-30], b"no", WHOLE, WHOLE[:40]], pa.binary()),
    ],
    schema=SCHEMA,
)
FACTS = {
    "n": {"mean": 4.4, "deviation": 2.0, "median": 2.6, "lower": 1.0, "upper": 3.0},
    "x": {"mean": 0.0, "deviation": 2.0, "median": 0.0, "lower": 0.0, "upper": 1.0},
}


@pytest.mark.parametrize(
    ("rule", "dropped"),
    [
        ("missing field=n", [3]),
        ("missing field=x", [1, 3]),
        ("missing field=s", [3]),
        ("range field=n min=2", [0]),
        ("range field=n max=3", [4]),
        ("range field=x min=-1 max=0.5", [2, 4]),
        ("zscore field=n", [4]),
        ("zscore field=x limit=4", [4]),
        ("iqr field=n factor=0.5", [4]),
        ("iqr field=x factor=100", []),
        ("length field=s min=1", [0]),
        ("length field=many max=1", [2]),
        ("empty field=s", [0, 1]),
        ("control field=s", [2]),
        ("undecodable field=photo", [1, 2, 4]),
    ],
)
def test_a_rule_drops_what_it_says(rule: str, dropped: list[int]) -> None:
    cleaned = Cleaning.of([parse_rule(rule)], SCHEMA).judge(BATCH, FACTS)
    assert np.flatnonzero(cleaned.dropped_by == 0).tolist() == dropped
    assert repr(cleaned.batch.to_pydict()) == repr(BATCH.to_pydict())
    assert cleaned.changed == [0]


@pytest.mark.parametrize(
    ("rule", "field", "values", "changed"),
    [
        ("missing field=n fill=7", "n", [1, 2, 3, 7, 100], 1),
        ("missing field=n fill=mean", "n", [1, 2, 3, 4, 100], 1),
        ("missing field=n fill=median", "n", [1, 2, 3, 3, 100], 1),
        ("missing field=x fill=0.5", "x", [0.0, 0.5, 1.0, 0.5, -9.0], 2),
        ("missing field=s fill=none", "s", ["", " \t", "a\x00b", "none", "good\n"], 1),
        ("control field=s action=strip", "s", ["", " \t", "ab", None, "good\n"], 1),
    ],
)
def test_a_rule_changes_what_it_says(rule: str, field: str, values: list, changed: int) -> None:
    cleaning = Cleaning.of([parse_rule(rule)], SCHEMA)
    cleaned = cleaning.judge(BATCH, FACTS)
    assert cleaned.batch.column(field).to_pylist() == values
    assert cleaned.changed == [changed]
    assert (cleaned.dropped_by < 0).all()
    assert repr(cleaning.change(BATCH, FACTS).to_pydict()) == repr(cleaned.batch.to_pydict())
    assert cleaning.change(BATCH.select(["many"]), FACTS).equals(BATCH.select(["many"]))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("range field=u min=6", [2**63, 2**64 - 1, None]),
        ("range field=u max=9223372036854775808", [5, 2**63, None]),
        ("range field=u max=5.5", [5, None]),
        ("zscore field=u limit=1", [2**63, None]),
        ("iqr field=u", [5, 2**63, 2**64 - 1, None]),
        ("missing field=u fill=median", [5, 2**63, 2**64 - 1, 2**63]),
    ],
)
def test_rules_hold_for_integers_of_any_size(tmp_path: Path, rule: str, kept: list[int | None]) -> None:
    values = [5, 2**63, 2**64 - 1, None]
    pq.write_table(pa.table({"u": pa.array(values, pa.uint64())}), tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "out", rules=[parse_rule(rule)])
    with pa.ipc.open_file(tmp_path / "out" / "shard-00000.arrow") as shard:
        assert shard.read_all().column("u").to_pylist() == kept


def test_a_rule_sees_what_the_ones_before_it_left() -> None:
    rules = map(parse_rule, ["range field=n min=2", "missing field=n fill=500", "range field=n max=50"])
    cleaned = Cleaning.of(rules, SCHEMA).judge(BATCH, {})
    assert cleaned.dropped_by.tolist() == [0, -1, -1, 2, 2]
    assert cleaned.changed == [0, 1, 0]


def test_rules_are_read_from_toml(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(
        """
        [[rule]]
        rule = "missing"
        field = "n"
        fill = "median"
        [[rule]]
        rule = "range"
        field = "n"
        min = 0
        [[rule]]
        rule = "duplicates"
        fields = ["n", "s"]
        """
    )
    rules = read_rules(tmp_path / "rules.toml")
    assert rules == [Missing("n", "median"), Range("n", min=0), Duplicates(("n", "s"))]
    assert Cleaning.of(rules, SCHEMA).labels == ["missing n", "range n", "duplicates n,s"]
    assert Cleaning.of(rules, SCHEMA).measured == ["n"]


def test_rules_are_read_from_text() -> None:
    assert parse_rule("zscore field=n limit=2.5") == Zscore("n", 2.5)
    assert parse_rule("iqr field='a b'") == Iqr("a b")
    assert parse_rule("length field=s min=3 max=9") == Length("s", 3, 9)
    assert parse_rule("duplicates fields=n,s") == Duplicates(("n", "s"))
    assert parse_rule("range field=3 max=5") == Range("3", max=5)
    assert parse_rule("duplicates fields=3") == Duplicates(("3",))
    assert Cleaning.of([parse_rule("duplicates")], SCHEMA).duplicates == Duplicates(tuple(SCHEMA.names))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing field=n",
        "range",
        "range field",
        "range field=n",
        "range field=n min=5 max=1",
        "range field=n min=low",
        "range field=n max=99999999999999999999",
        "range field=s min=1",
        "range field=other min=1",
        "range field=n min=1 step=2",
        "zscore field=n limit=0",
        "iqr field=s",
        "length field=n min=1",
        "empty field=n",
        "control field=s action=burn",
        "undecodable field=s",
        "undecodable field=s kind=image",
        "undecodable field=photo kind=smell",
        "missing field=n fill=lots",
        "missing field=n fill=1.5",
        "missing field=n fill=99999999999999999999",
        "missing field=s fill=mean",
        "duplicates fields=other",
        "range field='n",
    ],
)
def test_senseless_rules_are_refused(text: str) -> None:
    with pytest.raises(BadInputError):
        Cleaning.of([parse_rule(text)], SCHEMA)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("range", "rule range of 'range' needs the name of the field that it looks at: field=NAME"),
        ("range field=n step=2 by=1", "has the settings field, min, max, not by, step"),
        ("duplicates field=n", "has the settings fields, not field"),
    ],
)
def test_a_rule_without_its_field_or_with_another_setting_is_told_so(text: str, said: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(said)):
        parse_rule(text)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("kind", "whole"),
    [("audio", encode_audio(sound(0))), ("video", encode_video(frames(3))), ("image", WHOLE)],
    ids=["audio", "video", "image"],
)
def test_media_that_cannot_be_decoded_are_dropped(kind: str, whole: bytes, declared: bool) -> None:
    other = {"audio": WHOLE}.get(kind, encode_audio(sound(0)))
    field = media_field("x", kind).with_nullable(True) if declared else pa.field("x", pa.binary())
    batch = pa.record_batch([pa.array([whole, whole[:-40], b"", other, None], pa.binary())], schema=pa.schema([field]))
    rule = parse_rule("undecodable field=x" + ("" if declared else f" kind={kind}"))
    cleaned = Cleaning.of([rule], batch.schema).judge(batch, {})
    assert cleaned.dropped_by.tolist() == [-1, 0, 0, 0, -1]


def test_a_decoder_that_is_not_installed_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        Cleaning.of([parse_rule("undecodable field=x")], pa.schema([media_field("x", "audio")]))


def test_two_rules_about_duplicates_are_refused() -> None:
    with pytest.raises(BadInputError, match="one rule duplicates"):
        Cleaning.of([Duplicates(), Duplicates()], SCHEMA)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "rule = 3",
        "[[rule]\n",
        "[[rules]]\nrule = 'empty'",
        "[[rule]]\nfield = 'n'",
        "[[rule]]\nrule = 'duplicates'\nfields = 3",
    ],
)
def test_files_that_hold_no_rules_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rules.toml").write_text(content)
    with pytest.raises(BadInputError, match=r"rules\.toml"):
        read_rules(tmp_path / "rules.toml")
    with pytest.raises(NotFoundError):
        read_rules(tmp_path / "none.toml")

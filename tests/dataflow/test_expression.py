"""Filter expressions: what they keep is what Python would, and nothing of the user's runs."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.convert.expression import Expression

BATCH = pa.record_batch(
    {
        "n": pa.array([0, 1, 2, 3, None], pa.int64()),
        "x": pa.array([0.5, 1.5, -2.0, None, 4.0]),
        "s": pa.array(["", "a", "bb", None, "ccc"]),
        "b": pa.array([b"", b"12", None, b"4", b"5"]),
        "many": pa.array([[], [1], [1, 2], None, [3]]),
        "flag": pa.array([True, False, True, None, False]),
        "a b": pa.array([1, 2, 3, 4, 5]),
    }
)


def kept(text: str) -> list[int]:
    expression = Expression(text)
    expression.fields(BATCH.schema.names)
    return [row for row, keep in enumerate(expression.mask(BATCH)) if keep]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n == 1", [1]),
        ("n != 1", [0, 2, 3]),
        ("1 <= n < 3", [1, 2]),
        ("n in (1, 3)", [1, 3]),
        ("n not in [1, 3]", [0, 2]),
        ("n is None", [4]),
        ("n is not None", [0, 1, 2, 3]),
        ("not n == 1", [0, 2, 3]),
        ("n > 1 or s == 'a'", [1, 2, 3]),
        ("n > 0 and x > 0", [1]),
        ("n is None or n > 2", [3, 4]),
        ("len(s) > 1", [2, 4]),
        ("len(b) == 2", [1]),
        ("len(many) == 1", [1, 4]),
        ("flag", [0, 2]),
        ("not flag", [1, 4]),
        ("n / 2 == 0.5", [1]),
        ("n * 2 + 1 == 5", [2]),
        ("x < -1", [2]),
        ("-n == -3", [3]),
        ("field('a b') >= 4", [3, 4]),
        ("'a' == s", [1]),
        ("True", [0, 1, 2, 3, 4]),
        ("None", []),
    ],
)
def test_what_is_true_is_kept(text: str, rows: list[int]) -> None:
    if text == "None":
        with pytest.raises(BadInputError, match="not true or false"):
            kept(text)
        return
    assert kept(text) == rows


@given(st.integers(-5, 5), st.integers(-5, 5), st.lists(st.integers(-5, 5), min_size=1))
def test_expressions_agree_with_python(low: int, high: int, values: list[int]) -> None:
    text = f"{low} <= v <= {high} or not (v + 1) * 2 > {high} and v != {low}"
    mask = Expression(text).mask(pa.record_batch({"v": values}))
    assert mask.tolist() == [bool(eval(text, {"v": v})) for v in values]


LARGE = [0, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]


@given(st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), st.sampled_from([-(2**63), -1, *LARGE]))
def test_integers_of_any_size_compare_as_in_python(symbol: str, other: int) -> None:
    mask = Expression(f"v {symbol} {other}").mask(pa.record_batch({"v": pa.array(LARGE, pa.uint64())}))
    assert mask.tolist() == [eval(f"{value} {symbol} {other}") for value in LARGE]


def test_numbers_of_any_types_compare() -> None:
    batch = pa.record_batch({"u": pa.array(LARGE, pa.uint64()), "i": pa.array([1, -1, 2**62, 0, 5]), "b": [1.5] * 5})
    assert Expression("u > i").mask(batch).tolist() == [False, True, True, True, True]
    assert Expression("i > b").mask(batch).tolist() == [False, False, True, False, True]
    assert Expression("u / 2 > 1.5").mask(batch).tolist() == [False, True, True, True, True]


def test_only_what_is_looked_at_has_to_be_read() -> None:
    assert Expression("len(s) > 1 and n == 2 and n < 5").fields(BATCH.schema.names) == ["s", "n"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n ==", "is no expression"),
        ("n = 1", "is no expression"),
        ("missing == 1", "asks for 'missing'"),
        ("__import__('os').system('x')", "has a part that filters lack"),
        ("n.__class__", "has a part that filters lack"),
        ("[n for n in s]", "has a part that filters lack"),
        ("n if n else s", "has a part that filters lack"),
        ("n in (s, 2)", "has a part that filters lack"),
        ("n in 'abc'", "has a part that filters lack"),
        ("n ** 2 == 4", "has a part that filters lack"),
        ("len(n) == 1", "cannot be evaluated"),
        ("s > 3", "cannot be evaluated: .*; 's' is string$"),
        ("n > 99999999999999999999", "cannot be evaluated"),
        ("n in (1, 99999999999999999999)", "cannot be evaluated"),
        (r"s == '\ud800'", "cannot be evaluated"),
        ("n", "not true or false"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        kept(text)

"""Counting how deep JSON lines are nested."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.formats import json_records
from dataflow.formats.json_records import MAX_DEPTH, line_too_deep

VALUES = st.recursive(
    st.none() | st.text(st.sampled_from('[]{}"\\\\ a\n'), max_size=8) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", '"', "{", "\\\\"]), inner),
    max_leaves=12,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(st.lists(st.dictionaries(st.sampled_from("ab"), VALUES), max_size=8), st.integers(1, 6), st.data())
def test_the_first_line_that_is_too_deep_is_found(records: list[dict], limit: int, data: st.DataObject) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
    size_bytes = data.draw(st.integers(1, 40))
    lines = "".join(json.dumps(record) + end for record in records).encode()
    deep = [number for number, record in enumerate(records) if depth_of(record) > limit]
    expected = deep[0] * end.count("\n") + 1 if deep else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "MAX_DEPTH", limit)
        patch.setattr(json_records, "_CHUNK_BYTES", size_bytes)
        assert line_too_deep(memoryview(lines)) == expected


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_an_object_over_many_lines_is_counted_whole(depth: int) -> None:
    records = b'{"a":1}\n' + b'{"a":\n' * depth + b"1" + b"}\n" * depth
    assert line_too_deep(memoryview(records)) == (None if depth == MAX_DEPTH else depth + 1)


def test_lines_of_many_brackets_are_not_deep() -> None:
    boxes = json.dumps({"boxes": [[0, 1, 2, 3]] * 500, "code": "{[" * 500 + '\\"'}).encode()
    assert line_too_deep(memoryview(b"\n".join([boxes] * 10))) is None

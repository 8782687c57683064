"""What a column sees of an Arrow array, also of a part of one."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.dataset.columns import column_of

KINDS = {
    pa.bool_(): st.booleans(),
    pa.int16(): st.integers(-300, 300),
    pa.float64(): st.integers(-9, 9).map(float),
    pa.timestamp("s"): st.integers(0, 9).map(lambda second: np.datetime64(second, "s")),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(data=st.data())
def test_values_and_their_absence_are_seen_at_any_offset(kind, data):
    values = data.draw(st.lists(st.none() | KINDS[kind], max_size=30))
    start = data.draw(st.integers(0, len(values)))
    part = values[start : start + data.draw(st.integers(0, 30))]
    seen = column_of(pa.field("x", kind), encoded=False).prepare(pa.array(values, kind).slice(start, len(part)))
    valid = [value is not None for value in part]
    assert len(seen.values) == len(part)
    assert (seen.valid is None and all(valid)) or seen.valid.tolist() == valid
    known = [value for value in part if value is not None]
    assert (seen.values[np.array(valid, bool)] == np.array(known, seen.values.dtype)).all()


@pytest.mark.parametrize("kind", [pa.list_(pa.bool_()), pa.large_list(pa.bool_())], ids=str)
@given(data=st.data())
def test_lists_of_booleans_are_seen_at_any_offset(kind, data):
    values = data.draw(st.lists(st.none() | st.lists(st.booleans(), max_size=9), max_size=9))
    start = data.draw(st.integers(0, len(values)))
    part = values[start:]
    seen = column_of(pa.field("x", kind), encoded=False).prepare(pa.array(values, kind).slice(start))
    spans = seen.spans(np.arange(len(part)))
    assert [None if span is None else seen.data[slice(*span)].tolist() for span in spans] == part


@given(data=st.data())
def test_rows_of_fixed_width_are_seen_at_any_offset_and_absent_with_any_of_their_values(data):
    kind, row = pa.list_(pa.int16(), 2), st.lists(st.none() | st.integers(0, 9), min_size=2, max_size=2)
    rows = data.draw(st.lists(st.none() | row, max_size=9))
    start = data.draw(st.integers(0, len(rows)))
    part = [[None] * 2 if row is None else row for row in rows[start:]]
    for field, array in ((pa.field("x", kind), pa.array(rows, kind)), tensors_of(rows)):
        seen = column_of(field, encoded=False).prepare(array.slice(start))
        valid = [None not in row for row in part]
        assert (seen.valid is None and all(valid)) or seen.valid.tolist() == valid
        assert seen.values[valid].tolist() == [row for row in part if None not in row]


@pytest.mark.parametrize("permutation", [[0, 1, 2], [0, 2, 1], [1, 2, 0], [2, 0, 1]])
def test_axis_i_of_a_tensor_is_stored_axis_number_permutation_i(permutation):
    kind = pa.fixed_shape_tensor(pa.int16(), (2, 3, 4), permutation=permutation)
    values = np.arange(5 * 24, dtype=np.int16)
    array = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, 24))
    seen = column_of(pa.field("x", kind), encoded=False).prepare(array).values
    assert np.array_equal(seen, values.reshape(5, 2, 3, 4).transpose(0, *(axis + 1 for axis in permutation)))


def tensors_of(rows):
    """A field of tensors with two values each, and its array."""
    kind = pa.fixed_shape_tensor(pa.int16(), (2,))
    return pa.field("x", kind), pa.ExtensionArray.from_storage(kind, pa.array(rows, kind.storage_type))


PROGRAM = """
import sys
import numpy as np
import pyarrow as pa
from dataflow.dataset.columns import column_of

class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name != "pandas"

sys.meta_path.insert(0, Watch())
batch = pa.ipc.open_file(sys.argv[1]).get_batch(0)
for field, array in zip(batch.schema, batch.columns):
    column_of(field, encoded=False).prepare(array)
"""


def test_nobody_waits_for_pandas_to_see_booleans_and_nulls(tmp_path):
    values = {"bit": [True, None], "text": ["a", None], "list": [[1, 2], None], "number": [1.0, None]}
    batch = pa.RecordBatch.from_pydict(values)
    with pa.ipc.new_file(tmp_path / "batch", batch.schema) as writer:
        writer.write(batch)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "batch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

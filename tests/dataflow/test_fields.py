"""What an Arrow type is in numpy, without the help of pandas, which older pyarrow asks for it."""

import re

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from dataflow.formats.fields import numpy_dtype, value_dtype

_NUMBERS = ["bool", "float16", "float32", "float64"] + [
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
]


@pytest.mark.parametrize("name", _NUMBERS)
def test_numbers_keep_their_bytes(name: str) -> None:
    assert numpy_dtype(pa.from_numpy_dtype(name)) == np.dtype(name)
    assert value_dtype(pa.fixed_shape_tensor(pa.from_numpy_dtype(name), (2, 3))) == np.dtype(name)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_keep_their_unit(unit: str) -> None:
    assert numpy_dtype(pa.timestamp(unit, "Europe/Berlin")) == np.dtype(f"datetime64[{unit}]")
    assert numpy_dtype(pa.duration(unit)) == np.dtype(f"timedelta64[{unit}]")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.binary(), pa.decimal128(10, 2), pa.date32(), pa.list_(pa.int8())], ids=str
)
def test_what_numpy_has_no_type_for_is_none(kind: pa.DataType) -> None:
    assert numpy_dtype(kind) is None


def test_a_tensor_that_numpy_cannot_hold_is_refused_by_name() -> None:
    kind = pa.fixed_shape_tensor(pa.decimal128(10, 2), (2,))
    with pytest.raises(BadInputError, match=re.escape("numpy has no type for decimal128(10, 2)")):
        value_dtype(kind)

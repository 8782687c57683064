"""From decoded blocks to the columns of a batch, one small class per kind of field.

`prepare` looks at one field of one decoded block and keeps views; `gather` collects rows of many blocks into a batch.
Rows of fixed width are gathered by numpy from wherever they lie; where they are wide they are joined in the order of
the batch, which moves every byte once. Fields of variable size become lists, one object per sample.

What a column holds never depends on how samples lie in blocks: numpy arrays that own their memory and can be written
to, `str`, `bytes`, or plain Python objects for nested types.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from connectors.errors import BadInputError, CorruptError
from dataflow.dataset.rows import address_of, rows_at
from dataflow.formats.fields import field_kind, numpy_dtype
from dataflow.media.pictures import CHANNELS, UNDECODABLE, target_mode

__all__ = ["Allocate", "Column", "Joins", "Selection", "column_of", "is_rowwise"]

Allocate: TypeAlias = Callable[[str, tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]


@runtime_checkable
class Joins(Protocol):
    """An `Allocate` that also takes large `bytes` as they lie in their blocks."""

    def join(self, parts: list[memoryview | None]) -> Any:
        """Return what stands for the list of `bytes`, after copying the parts; None where that is not worth while."""
        ...


# Joining looks at each row from Python; above this width that costs less than the temporary of a gather does.
WIDE_ROW_BYTES = 8192
# Up to here offsets are cheaper looked up one by one than by three calls of numpy.
_FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class Selection:
    """What a batch consists of, grouped by block.

    Attributes:
        samples: int64, the sample numbers in the order of the batch.
        blocks: What `Column.prepare` made of each block involved, by field.
        rows: int64, the row inside its block of every sample, block by block.
        owners: int64, for each entry of `rows` the number of its block among `blocks`.
        bounds: Where in `rows` each block's part begins, and the number of samples at the end.
        places: int64, for each entry of `rows` its place in the batch; None where both orders are the same.
        uri_of: Returns the URI of the shard or file that holds a sample: for messages.
    """

    samples: npt.NDArray[np.int64]
    blocks: list[dict[str, Any]]
    rows: npt.NDArray[np.int64]
    owners: npt.NDArray[np.int64]
    bounds: list[int]
    places: npt.NDArray[np.int64] | None
    uri_of: Callable[[int], str]

    def parts(self, name: str) -> Iterator[tuple[Any, int, int]]:
        """Yield what was prepared of the field `name` for each block, and the block's bounds."""
        for block, start, stop in zip(self.blocks, self.bounds, self.bounds[1:], strict=False):
            yield block[name], start, stop

    def sample_at(self, position: int) -> int:
        """Return the number of the sample whose row is `rows[position]`."""
        return int(self.samples[position if self.places is None else self.places[position]])

    def reordered(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring an array of one value per sample from block order to the order of the batch."""
        if self.places is None:
            return values
        ordered = np.empty_like(values)
        ordered[self.places] = values
        return ordered

    def scatter(self, values: list[Any]) -> list[Any]:
        """Bring one value per sample from block order to the order of the batch."""
        if self.places is None:
            return values
        ordered = [None] * len(values)
        for place, value in zip(self.places.tolist(), values, strict=True):
            ordered[place] = value
        return ordered


class Column(Protocol):
    """How one field travels from blocks to a batch. Pure and thread-safe."""

    @property
    def name(self) -> str:
        """Name of the field."""
        ...

    def prepare(self, array: pa.Array) -> Any:
        """Return what `gather` needs of one block's array: views of it, nothing copied."""
        ...

    def gather(self, selection: Selection, allocate: Allocate) -> npt.NDArray[Any] | list[Any]:
        """Return the column of a batch; an array comes from `allocate`, and what stands for `bytes` where it `Joins`.

        Raises:
            BadInputError: A fixed-width value is null; names field and sample.
            CorruptError: A media file or a text cannot be decoded; names field and sample.
        """
        ...


class _Values(NamedTuple):
    """Fixed-width values of one block, one row per sample.

    Attributes:
        values: As they are handed out: `(samples, *shape)`.
        address: Where they lie, row after row as stored.
        valid: None where none is null.
    """

    values: npt.NDArray[Any]
    address: int
    valid: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class FixedColumn:
    """Numbers, booleans, times, and tensors of one shape: one array per batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None

    def prepare(self, array: pa.Array) -> _Values:
        """View the values as an array of `(samples, *shape)`; booleans are unpacked from bits."""
        valid = None
        if array.null_count:
            valid = _flat(array.is_valid(), _BOOL)
        length = len(array)
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if pa.types.is_fixed_size_list(array.type):
            width = array.type.list_size
            array = array.values.slice(array.offset * width, length * width)
            if array.null_count:  # a row may also lack some of its values
                whole = _flat(array.is_valid(), _BOOL).reshape(length, width).all(axis=1)
                valid = np.asarray(whole if valid is None else valid & whole)
        values = _flat(array, self.dtype)
        address = address_of(values)
        values = self._permuted(values.reshape(length, *self._stored_shape))
        return _Values(values, address, valid)

    def gather(self, selection: Selection, allocate: Allocate) -> npt.NDArray[Any]:
        """Copy the rows, and cast them where the array that is given has a wider type."""
        out = allocate(self.name, (len(selection.samples), *self.shape), self.dtype)
        blocks: list[_Values] = [block[self.name] for block in selection.blocks]
        for number, block in enumerate(blocks):
            if block.valid is not None:
                self._insist_on_values(block.valid, selection, *selection.bounds[number : number + 2])
        row_bytes = self.dtype.itemsize * math.prod(self.shape)
        if row_bytes > WIDE_ROW_BYTES and out.size:
            self._join_rows(blocks, selection, out)
        elif out.size:
            firsts = np.array([block.address for block in blocks])
            addresses = firsts[selection.owners] + selection.rows * row_bytes
            rows = rows_at(selection.reordered(addresses), row_bytes).view(self.dtype)
            out[...] = self._permuted(rows.reshape(-1, *self._stored_shape))
        return out

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        if self.permutation is None:
            return self.shape
        return tuple(self.shape[axis] for axis in np.argsort(self.permutation))

    def _permuted(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return stored if self.permutation is None else stored.transpose(0, *(axis + 1 for axis in self.permutation))

    def _join_rows(self, blocks: list[_Values], selection: Selection, out: npt.NDArray[Any]) -> None:
        """Write the rows one after the other, each once. They are arrays: a number is no wide row."""
        places = zip(selection.owners.tolist(), selection.rows.tolist(), strict=True)
        rows = [blocks[owner].values[row] for owner, row in places]
        np.concatenate(selection.scatter(rows), out=out.reshape(-1, *self.shape[1:]))

    def _insist_on_values(self, valid: npt.NDArray[np.bool_], selection: Selection, start: int, stop: int) -> None:
        missing = np.flatnonzero(~valid[selection.rows[start:stop]])
        if len(missing):
            raise BadInputError(
                f"field {self.name!r} of sample {selection.sample_at(start + int(missing[0]))} is null, and an array "
                "has no place for that: fill or drop missing values when converting, or leave the field out by columns="
            )


@dataclass(frozen=True, slots=True)
class _Varying:
    """Values of variable size of one block: sample `r` is `data[offsets[r]:offsets[r + 1]]`."""

    offsets: npt.NDArray[Any]
    data: Any  # memoryview, or an array of the values of lists
    valid: npt.NDArray[np.bool_] | None

    def spans(self, rows: npt.NDArray[np.int64]) -> list[tuple[int, int] | None]:
        """Return first and last offset of each row, None for nulls."""
        offsets, valid = self.offsets, self.valid
        if len(rows) <= _FEW_ROWS:
            return [
                (int(offsets[row]), int(offsets[row + 1])) if valid is None or valid[row] else None
                for row in rows.tolist()
            ]
        spans = list(zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True))
        if valid is None:
            return spans  # type: ignore[return-value]
        return [span if is_valid else None for span, is_valid in zip(spans, valid[rows].tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class VaryingColumn:
    """Strings, binaries and flat lists: a list of `str`, `bytes` or arrays; null is None.

    Attributes:
        make: Turns the slice of one sample into its value.
    """

    name: str
    make: Callable[[Any], Any]

    def prepare(self, array: pa.Array) -> _Varying:
        """View offsets and data."""
        kind = array.type
        wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) or pa.types.is_large_list(kind)
        valid = _flat(array.is_valid(), _BOOL) if array.null_count else None
        buffer = array.buffers()[1]
        if buffer is None or not buffer.size:  # Arrow allows no offsets at all in an empty array
            return _Varying(np.zeros(len(array) + 1, np.int64), memoryview(b""), valid)
        dtype = np.dtype(np.int64 if wide else np.int32)
        offsets = np.frombuffer(buffer, dtype, len(array) + 1, array.offset * dtype.itemsize)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return _Varying(offsets, self._list_values(array.values), valid)
        data = array.buffers()[2]
        return _Varying(offsets, memoryview(b"") if data is None else memoryview(data).cast("B"), valid)

    def gather(self, selection: Selection, allocate: Allocate) -> list[Any]:
        """Make one value per sample."""
        parts: list[Any] = []
        for prepared, start, stop in selection.parts(self.name):
            data, spans = prepared.data, prepared.spans(selection.rows[start:stop])
            parts += [None if span is None else data[span[0] : span[1]] for span in spans]
        parts, make = selection.scatter(parts), self.make
        if make is bytes and isinstance(allocate, Joins) and (joined := allocate.join(parts)) is not None:
            return joined
        try:
            return [None if part is None else make(part) for part in parts]
        except UnicodeDecodeError as error:
            sample = int(selection.samples[parts.index(error.object)])
            uri = selection.uri_of(sample)
            message = f"field {self.name!r} of sample {sample} is no UTF-8: {error}; in {uri}"
            raise CorruptError(message, uri=uri) from error

    def _list_values(self, values: pa.Array) -> npt.NDArray[Any]:
        if values.null_count:
            raise BadInputError(f"field {self.name!r} has nulls inside its lists: fill or drop them when converting")
        dtype = numpy_dtype(values.type)
        assert dtype is not None  # else it would be another kind of column
        return _flat(values, dtype)


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """Encoded images, decoded: one uint8 array where all of the batch agree in shape, else a list of arrays."""

    name: str

    def prepare(self, array: pa.Array) -> _Varying:
        """View the encoded bytes."""
        return VaryingColumn(self.name, bytes).prepare(array)

    def gather(self, selection: Selection, allocate: Allocate) -> npt.NDArray[Any] | list[Any]:
        """Decode every image, straight into the batch where headers promise one shape."""
        files: list[Any] = []
        for prepared, start, stop in selection.parts(self.name):
            spans = prepared.spans(selection.rows[start:stop])
            files += [None if span is None else prepared.data[span[0] : span[1]] for span in spans]
        files = selection.scatter(files)
        images = [self._open(file, place, selection) for place, file in enumerate(files)]
        shapes = {_shape(image) for image in images}
        out: Any = [None] * len(images)
        if len(shapes) == 1 and (shape := shapes.pop()) is not None:
            out = allocate(self.name, (len(images), *shape), np.dtype(np.uint8))
        for place, image in enumerate(images):
            if image is not None:
                out[place] = self._pixels(image, place, selection)
        return out  # type: ignore[no-any-return]

    def _open(self, file: memoryview | None, place: int, selection: Selection) -> Image.Image | None:
        if file is None:
            return None
        try:
            return Image.open(io.BytesIO(file))
        except UnidentifiedImageError as error:  # its text is about the object that holds the bytes
            raise self._undecodable("Pillow does not know what it is", place, selection) from error
        except UNDECODABLE as error:
            raise self._undecodable(error, place, selection) from error

    def _pixels(self, image: Image.Image, place: int, selection: Selection) -> npt.NDArray[np.uint8]:
        try:
            target = target_mode(image)
            return np.array(image if target == image.mode else image.convert(target))
        except UNDECODABLE as error:
            raise self._undecodable(error, place, selection) from error

    def _undecodable(self, reason: object, place: int, selection: Selection) -> CorruptError:
        sample = int(selection.samples[place])
        uri = selection.uri_of(sample)
        message = f"field {self.name!r} of sample {sample} is not a readable image: {reason}; in {uri}"
        return CorruptError(message, uri=uri)


@dataclass(frozen=True, slots=True)
class ObjectColumn:
    """Everything else (structs, maps, nested lists, decimals): Python objects as pyarrow makes them."""

    name: str

    def prepare(self, array: pa.Array) -> pa.Array:
        """Keep the array."""
        return array

    def gather(self, selection: Selection, allocate: Allocate) -> list[Any]:
        """Take the rows and convert them."""
        values: list[Any] = []
        for array, start, stop in selection.parts(self.name):
            taken = array.take(pa.array(selection.rows[start:stop]))
            try:
                values += taken.to_pylist()
            except (ValueError, OverflowError) as error:  # a time that Python lacks
                raise BadInputError(f"field {self.name!r} has a value that is no Python object: {error}") from error
        return selection.scatter(values)


_BOOL = np.dtype(np.bool_)


def _shape(image: Image.Image | None) -> tuple[int, ...] | None:
    if image is None:
        return None
    try:
        channels = CHANNELS[target_mode(image)]
    except ValueError:
        return None  # decoding says what is wrong
    return (image.height, image.width) if channels == 1 else (image.height, image.width, channels)


def _flat(array: pa.Array, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """View a primitive array, whatever lies at its nulls; booleans are unpacked from bits.

    Arrow's own `to_numpy` first imports pandas, if that is installed: 0.3 s in every worker.
    """
    start, length, buffer = array.offset, len(array), array.buffers()[1]
    if not length or buffer is None:
        return np.zeros(length, dtype)
    if dtype != np.bool_:
        return np.frombuffer(buffer, dtype, length, start * dtype.itemsize)
    packed = np.frombuffer(buffer, np.uint8)[start // 8 :]
    return np.unpackbits(packed, count=start % 8 + length, bitorder="little")[start % 8 :].view(np.bool_)


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def is_rowwise(column: Column) -> bool:
    """Whether a sample's place in a gathered column does not depend on the other samples of the batch."""
    return not isinstance(column, ImageColumn)  # it stacks what is of one shape


def column_of(field: pa.Field, *, encoded: bool) -> Column:
    """Return how a field travels; an `encoded` image as the bytes of its file."""
    name, kind, types = field.name, field.type, pa.types
    if field_kind(field) == "image" and not encoded:
        return ImageColumn(name)
    if isinstance(kind, pa.FixedShapeTensorType):
        return _tensor_column(name, kind)
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_string(kind) or types.is_large_string(kind):
        return VaryingColumn(name, _text)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return VaryingColumn(name, bytes)
    if (types.is_list(kind) or types.is_large_list(kind)) and numpy_dtype(kind.value_type) is not None:
        return VaryingColumn(name, np.array)
    if types.is_fixed_size_list(kind) and (dtype := numpy_dtype(kind.value_type)) is not None:
        return FixedColumn(name, dtype, (kind.list_size,))
    if (dtype := numpy_dtype(kind)) is not None:
        return FixedColumn(name, dtype, ())
    return ObjectColumn(name)


def _tensor_column(name: str, kind: Any) -> FixedColumn:
    dtype = numpy_dtype(kind.value_type)
    if dtype is None:
        raise BadInputError(f"field {name!r} is a tensor of {kind.value_type}, which numpy cannot hold")
    permutation = None if kind.permutation is None else tuple(kind.permutation)
    shape = tuple(kind.shape) if permutation is None else tuple(kind.shape[axis] for axis in permutation)
    return FixedColumn(name, dtype, shape, permutation)

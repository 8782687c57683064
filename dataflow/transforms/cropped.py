"""Boxes of n-d arrays, cut while they are read: what lies outside is not fetched where the format allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from connectors.errors import BadInputError, ChangedError
from dataflow.dataset.batch import Batch, Sample
from dataflow.formats.fields import tensor_field, value_dtype
from dataflow.formats.pieces import CroppableSource, read_blocks
from dataflow.observe.stages import stage
from dataflow.transforms.draws import Draws
from dataflow.transforms.epoch import current_epoch

if TYPE_CHECKING:
    from cache.access import BlockReader
    from dataflow.dataset.columns import Allocate
    from dataflow.dataset.dataset import Dataset
    from dataflow.formats.pieces import CropPlan
    from dataflow.index import Index

__all__ = ["ArrayCrop", "CroppedDataset"]


@dataclass(frozen=True, slots=True)
class ArrayCrop:
    """A box of an array field.

    Attributes:
        field: The field, a tensor.
        shape: Number of places along every axis.
        start: `random` (every box inside the array is equally likely), `center`, or the first place along every axis.

    Raises:
        BadInputError: A value is out of range.
    """

    field: str
    shape: tuple[int, ...]
    start: Literal["random", "center"] | tuple[int, ...] = "random"

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise BadInputError(f"a box has a size along every axis, got {self.shape}")
        if isinstance(self.start, str):
            if self.start not in ("random", "center"):
                raise BadInputError(f'start must be "random", "center" or places, got {self.start!r}')
        elif len(self.start) != len(self.shape) or min(self.start) < 0:
            raise BadInputError(f"start must be {len(self.shape)} places, got {self.start}")

    def check(self, schema: pa.Schema) -> None:
        """Refuse a dataset that such boxes cannot be cut from.

        Raises:
            BadInputError: There is no such field, it is no array, or the box reaches over its edge.
        """
        if self.field not in schema.names:
            raise BadInputError(f"there is no field {self.field!r} to crop; there are {', '.join(schema.names)}")
        kind: Any = schema.field(self.field).type
        if not isinstance(kind, pa.FixedShapeTensorType) or kind.permutation is not None:
            raise BadInputError(f"field {self.field!r} is {kind}, and boxes are cut from tensors of one shape")
        first = (0,) * len(self.shape) if isinstance(self.start, str) else self.start
        ends = [place + size for place, size in zip(first, self.shape, strict=True)]
        if len(ends) != len(kind.shape) or any(end > size for end, size in zip(ends, kind.shape, strict=True)):
            raise BadInputError(f"a box {self.shape} at {first} does not lie inside {self.field!r} of {kind.shape}")

    def places(self, whole: Sequence[int], draws: Draws) -> list[tuple[int, ...]]:
        """Return where the box of every sample begins in an array of the shape `whole`."""
        if not isinstance(self.start, str):
            return [self.start] * len(draws)
        spare = np.subtract(whole, self.shape)
        if self.start == "center":
            return [tuple((spare // 2).tolist())] * len(draws)
        # A stream of its own, so that transforms with the same seed draw something else.
        seeds = [draws.seed_at(place) for place in range(len(draws))]
        return [tuple(np.random.Generator(np.random.Philox(seed)).integers(spare + 1).tolist()) for seed in seeds]


class CroppedDataset:
    """A dataset that reads boxes of some arrays; give it to a `DataLoader` instead of the dataset.

    A random box is a function of (seed, epoch, number of the sample), as for transforms; fields of one shape that are
    cut to one shape, such as a volume and its mask, get the same box. Of zarr arrays only the chunks that a box touches
    are read, of large native tensors without compression only its rows and what little lies between them; anything else
    is read whole and cut. Plans announce the other fields only: boxes are fetched when they are asked for.

    Args:
        dataset: What to read; this uses it and its reader, and closes neither.
        crops: One per field; other fields stay as they are.
        seed: Any integer; the same on every rank.

    Raises:
        BadInputError: A crop does not fit the dataset, or two are of one field.
    """

    def __init__(self, dataset: Dataset, crops: Sequence[ArrayCrop], *, seed: int = 0) -> None:
        names = [crop.field for crop in crops]
        if not names or len(set(names)) < len(names):
            raise BadInputError(f"a cropped dataset needs crops of different fields, got {names}")
        for crop in crops:
            crop.check(dataset.schema)
        self._shapes = {name: tuple(dataset.schema.field(name).type.shape) for name in names}
        self._schema = pa.schema([_cropped(field, crops) for field in dataset.schema])
        self._source = dataset.source
        self._rest = dataset.select([name for name in dataset.schema.names if name not in names])
        self._crops = tuple(crops)
        self._whole = {crop.field: dataset.select([crop.field]) for crop in crops if not self._reads_boxes(crop)}
        self._seed = seed
        self._versions: dict[int, str] = {}

    @property
    def schema(self) -> pa.Schema:
        """Fields of a sample."""
        return self._schema

    @property
    def fingerprint(self) -> str:
        """That of the dataset: crops change no order."""
        return self._rest.fingerprint

    @property
    def index(self) -> Index:
        """Where the samples lie, and what is read of the fields that are not cropped."""
        return self._rest.index

    @property
    def buffer_bytes(self) -> int:
        """Limit on the decoded blocks of other fields that each process keeps."""
        return self._rest.buffer_bytes

    @property
    def reader(self) -> BlockReader:
        """Where bytes come from."""
        return self._rest.reader

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, number: int) -> Sample:
        """Return one sample; `IndexError` when it is out of range."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Return many samples, in the order asked."""
        return Batch(self.get_batch(numbers), len(numbers))

    def __repr__(self) -> str:
        return f"CroppedDataset({self._rest!r}, {', '.join(map(repr, self._crops))})"

    def get_batch(
        self, numbers: Sequence[int] | npt.NDArray[np.integer[Any]], allocate: Allocate | None = None
    ) -> dict[str, npt.NDArray[Any] | list[Any]]:
        """Return the columns of some samples, as `Dataset.get_batch` does; all boxes are fetched by one request.

        Raises:
            IndexError: A number is out of range.
            DataError: The bytes could not be had, or are damaged.
        """
        give = allocate or _allocate
        columns = self._rest.get_batch(numbers, allocate)  # says what is wrong with the numbers
        samples = np.asarray(numbers, np.int64).reshape(-1)
        samples = np.where(samples < 0, samples + len(self), samples)
        draws = Draws(self._seed, current_epoch(), samples)
        plans: list[tuple[CropPlan, npt.NDArray[Any]]] = []
        for crop in self._crops:
            dtype = value_dtype(self._schema.field(crop.field).type)
            out = give(crop.field, (len(samples), *crop.shape), dtype)
            columns[crop.field] = out
            places = crop.places(self._shapes[crop.field], draws)
            if crop.field in self._whole:
                self._cut(crop, samples, places, out)
                continue
            source: Any = self._source
            plans += [
                (source.crop(crop.field, int(sample), start, crop.shape, self._version_of), out[place])
                for place, (sample, start) in enumerate(zip(samples, places, strict=True))
            ]
        self._read(plans)
        return {name: columns[name] for name in self._schema.names}

    def _read(self, plans: list[tuple[CropPlan, npt.NDArray[Any]]]) -> None:
        refs = {ref: None for plan, _ in plans for ref in plan.refs}
        if not plans:
            return
        found = dict(zip(refs, read_blocks(self.reader, list(refs)), strict=True))
        with stage("decode"):
            for plan, out in plans:
                plan.assemble([found[ref].view for ref in plan.refs], out)

    def _cut(
        self, crop: ArrayCrop, samples: npt.NDArray[np.int64], places: Sequence[tuple[int, ...]], out: npt.NDArray[Any]
    ) -> None:
        """Read samples whole, one at a time since they may be large, and cut their boxes."""
        whole = self._whole[crop.field]
        for place, (sample, start) in enumerate(zip(samples, places, strict=True)):
            box = tuple(slice(first, first + size) for first, size in zip(start, crop.shape, strict=True))
            out[place] = whole.get_batch([int(sample)])[crop.field][0][box]

    def _reads_boxes(self, crop: ArrayCrop) -> bool:
        source = self._source
        return isinstance(source, CroppableSource) and source.can_crop(crop.field, crop.shape)

    def _version_of(self, shard: int) -> str:
        """Return the version that the store has for a shard, which must be as long as the index says."""
        if shard not in self._versions:
            index = self.index
            uri = index.shard_uri(shard)
            meta = self.reader.head(uri)
            if meta.size_bytes != int(index.shards.size_bytes[shard]):
                raise ChangedError(
                    f"{uri} has {meta.size_bytes} bytes, the index says {index.shards.size_bytes[shard]}", uri=uri
                )
            self._versions[shard] = meta.version
        return self._versions[shard]


def _cropped(field: pa.Field, crops: Sequence[ArrayCrop]) -> pa.Field:
    crop = next((crop for crop in crops if crop.field == field.name), None)
    if crop is None:
        return field
    cropped = tensor_field(field.name, value_dtype(field.type), crop.shape)
    return cropped.with_nullable(field.nullable).with_metadata(field.metadata)


def _allocate(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:  # noqa: ARG001
    return np.empty(shape, dtype)

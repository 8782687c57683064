"""Python objects as the source of a conversion: iterables, sequences, PyTorch datasets of either style.

What they give is written to native shards in a temporary folder first, one sample after the other, so that a conversion
can do with it whatever it does with any source. Such a conversion cannot be resumed: an iterable has one end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from connectors.errors import BadInputError, DataError
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.fields import image_field, inferred_field
from dataflow.media.pictures import target_mode

__all__ = ["name_of", "spool"]

# Samples that decide over the fields.
SAMPLES_TO_INFER = 256


def spool(source: Any, folder: str, schema: pa.Schema | None) -> None:
    """Write what `source` gives as a native dataset.

    A mapping is a sample; the items of a tuple or list are its fields `0`, `1` and so on; anything else is its field
    `data`. Tensors and arrays keep type and shape, Pillow images are stored as PNG.

    Args:
        source: An iterable, or an object with `__len__` and `__getitem__`, whose numbers are asked for in order.
        folder: Where to write.
        schema: Fields of the samples; by default those of the first ones.

    Raises:
        BadInputError: It is neither, gives nothing while no schema is given, or samples do not fit the schema.
        DataError: It raised something; names the sample.
    """
    samples = _samples(source)
    first = list(itertools.islice(samples, SAMPLES_TO_INFER))
    if schema is None:
        schema = _infer(first, source)
    with ShardWriter(folder, schema) as writer:
        for sample in itertools.chain(first, samples):
            writer.write(sample)


def name_of(source: Any) -> str:
    """Return what lineage and errors call such a source."""
    kind = type(source)
    return f"python:{kind.__module__}.{kind.__qualname__}"


def _samples(source: Any) -> Iterator[dict[str, Any]]:
    if not hasattr(source, "__iter__") and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        given: Iterator[Any] = (source[number] for number in range(len(source)))
    elif isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | Mapping):
        given = iter(source)
    else:
        raise BadInputError(f"a {type(source).__name__} is no source of samples: give a URL, an iterable or a Dataset")
    for number in itertools.count():
        try:
            sample = next(given)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{name_of(source)} failed on sample {number}: {type(error).__name__}: {error}") from error
        yield _fields(sample)


def _fields(sample: Any) -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return {str(name): _value(value) for name, value in sample.items()}
    if isinstance(sample, tuple | list):
        return {str(place): _value(value) for place, value in enumerate(sample)}
    return {"data": _value(sample)}


def _value(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return _Picture(value)
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__array__"):  # also tensors, without an import of theirs
        array = np.asarray(value)
        return array if array.ndim else array.item()
    return value


class _Picture(np.ndarray):
    """The pixels of an image: told from other arrays, and stored as PNG."""

    def __new__(cls, image: Image.Image) -> _Picture:
        try:
            return np.asarray(image.convert(target_mode(image))).view(cls)
        except ValueError as error:
            raise BadInputError(f"an image of Pillow cannot be stored as one: {error}, as the array of it") from error


def _infer(samples: list[dict[str, Any]], source: Any) -> pa.Schema:
    if not samples:
        raise BadInputError(f"{name_of(source)} gives no samples, so their fields are unknown: give a schema")
    names = samples[0].keys()
    for number, sample in enumerate(samples):
        if sample.keys() != names:
            raise BadInputError(
                f"sample {number} of {name_of(source)} has the fields {list(sample)}, the first one {list(names)}; "
                "every sample needs all of them"
            )
    return pa.schema([_field(name, [sample[name] for sample in samples]) for name in names])


def _field(name: str, values: list[Any]) -> pa.Field:
    if all(isinstance(value, _Picture) for value in values):
        return image_field(name)
    try:
        return inferred_field(name, values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise BadInputError(f"field {name!r} has values that Arrow has no type for: {error}; give a schema") from error

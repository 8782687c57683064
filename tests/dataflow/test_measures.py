from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from dataflow.dataset import open_dataset, read_measure
from dataflow.formats.arrow import ShardWriter


def test_numbers_are_read_and_texts_and_lists_are_counted(tmp_path: Path) -> None:
    schema = pa.schema([("size", pa.int32()), ("text", pa.string()), ("tokens", pa.list_(pa.int32()))])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=4096) as writer:
        for number in range(5000):
            text = None if number == 4999 else "x" * (number % 7)
            writer.write({"size": number, "text": text, "tokens": [1] * (number % 5)})
    dataset = open_dataset(tmp_path / "set", cache=None)
    assert read_measure(dataset, "size").tolist() == list(range(5000))
    assert np.array_equal(read_measure(dataset, "tokens"), np.arange(5000) % 5)
    with pytest.raises(BadInputError, match="'text' is no measure of samples 4096 to 4999"):
        read_measure(dataset, "text")
    with pytest.raises(BadInputError, match="no field 'depth'; the dataset has size, text, tokens"):
        read_measure(dataset, "depth")
    dataset.reader.close()

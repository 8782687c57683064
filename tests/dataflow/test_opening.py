"""What opening a dataset asks for: the same few requests, however large it is."""

import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from cache.access import open_reader
from connectors.errors import CorruptError
from dataflow.dataset import Dataset
from dataflow.formats import open_source
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.manifest import INDEX_NAME, MANIFEST_NAME
from dataflow.formats.destination import Destination
from dataflow.testing.readers import CountingReader

pytestmark = pytest.mark.usefixtures("kept_scans")

SCHEMA = pa.schema([("n", pa.int64())])


def write(url: str, count: int) -> None:
    with ShardWriter(url, SCHEMA, block_size_bytes=64, shard_size_bytes=500) as writer:
        for number in range(count):
            writer.write({"n": number})


def opened(url: str) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(url, None))
    return Dataset(open_source(url, reader), reader, buffer_bytes=1 << 20), reader


def read(url: str, reader: CountingReader) -> int:
    """Return how many bytes were read."""
    with Destination(url) as destination:
        sizes = destination.sizes()
    return sum(sizes[uri.removeprefix(f"{url}/")] for uri in reader.objects)


def test_a_native_dataset_opens_by_manifest_and_index_alone_however_many_shards_it_has() -> None:
    for count in (20, 2000):
        url = f"memory://{uuid.uuid4().hex}/set"
        write(url, count)
        dataset, reader = opened(url)
        assert len(dataset.index.shards) > count // 50
        assert reader.objects == [f"{url}/{MANIFEST_NAME}", f"{url}/{INDEX_NAME}"]
        assert (reader.heads, reader.listed, reader.requests) == ([], [], [])
        manifest = dataset.source.manifest  # type: ignore[attr-defined]
        assert read(url, reader) == manifest.index.size_bytes + len(manifest.to_json())
        assert len(dataset) == count


def test_the_next_opening_on_this_machine_reads_the_manifest_alone() -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    write(url, 500)
    first, _ = opened(url)
    second, reader = opened(url)
    assert reader.objects == [f"{url}/{MANIFEST_NAME}"]
    assert (reader.heads, reader.listed, reader.requests) == ([], [], [])
    assert second.fingerprint == first.fingerprint
    assert [sample["n"] for sample in second] == list(range(500))


def test_a_kept_index_that_is_damaged_is_fetched_again(kept_scans: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    write(url, 50)
    opened(url)
    (kept,) = kept_scans.iterdir()
    good = kept.read_bytes()
    kept.write_bytes(good[:-1] + b"x")
    dataset, reader = opened(url)
    assert reader.objects == [f"{url}/{MANIFEST_NAME}", f"{url}/{INDEX_NAME}"]
    assert "is fetched again" in caplog.text
    assert len(dataset) == 50
    assert kept.read_bytes() == good


def test_a_damaged_index_is_not_kept(kept_scans: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    write(url, 50)
    with Destination(url) as destination:
        destination.put(INDEX_NAME, [b"something"])
    with pytest.raises(CorruptError, match="is not the index"):
        opened(url)
    assert not kept_scans.exists()


def test_the_index_of_a_local_dataset_is_mapped_and_not_copied(tmp_path: Path) -> None:
    url = (tmp_path / "set").as_uri()
    write(url, 500)
    dataset, reader = opened(url)
    assert reader.objects == [f"{url}/{MANIFEST_NAME}"]
    for vector in (dataset.index.blocks.offset, dataset.index.blocks.first_sample, dataset.index.shards.size_bytes):
        assert not vector.flags.owndata
        assert not vector.flags.writeable


def test_a_manifest_cannot_name_an_index_elsewhere(tmp_path: Path) -> None:
    write(str(tmp_path / "set"), 5)
    path = tmp_path / "set" / MANIFEST_NAME
    path.write_text(path.read_text().replace(f'"{INDEX_NAME}"', f'"../{INDEX_NAME}"'))
    with pytest.raises(CorruptError, match="outside of the dataset"):
        opened((tmp_path / "set").as_uri())


PROGRAM = """
import sys

looked_for = set()

class Watch:
    def find_spec(self, name, path=None, target=None):
        looked_for.add(name)

sys.meta_path.insert(0, Watch())
from dataflow import open_dataset
numbers = open_dataset(sys.argv[1]).__getitems__([30, 7]).columns["n"]
print(numbers.tolist(), "dataflow" in looked_for, "pandas" in looked_for)
"""


def test_nobody_waits_for_pandas_to_open_and_read_a_native_dataset(tmp_path: Path) -> None:
    write(str(tmp_path / "set"), 50)
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path / "set")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.stderr, ended.stdout) == ("", "[30, 7] True False\n")

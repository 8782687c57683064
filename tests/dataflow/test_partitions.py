"""Fields that stand in the names of folders, against pyarrow, which writes and reads such folders."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pads
import pytest

from cache.access import open_reader
from connectors.errors import BadInputError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats import open_source
from dataflow.formats.pieces import decode_block, fetch_blocks, selected
from dataflow.indexing import build_index

CITIES = ["Köln/Deutz", "a=b", "two words", None]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def table() -> pa.Table:
    numbers = range(40)
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "text": [f"t{number}" for number in numbers],
            "year": [2000 + number % 3 for number in numbers],
            "city": [CITIES[number % 4] for number in numbers],
        }
    )


def written(folder: Path, form: str) -> list[dict]:
    pads.write_dataset(
        table(), folder, format=form, partitioning=["year", "city"], partitioning_flavor="hive", max_rows_per_group=4
    )
    return table().to_pylist()


def in_order(rows: object) -> list[dict]:
    return sorted((dict(row) for row in rows), key=lambda row: row["number"])


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_fields_of_folders_are_read_and_converted(tmp_path: Path, form: str) -> None:
    expected = written(tmp_path / "in", form)
    dataset = open_dataset(tmp_path / "in")
    assert dataset.schema.names == ["number", "text", "year", "city"]
    assert dataset.schema.field("year").type == pa.int64()
    assert dataset.schema.field("city").type == pa.string()
    assert in_order(dataset) == expected
    convert(tmp_path / "in", tmp_path / "out", verify=True)
    assert in_order(open_dataset(tmp_path / "out")) == expected


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_every_format_of_tables_has_them(tmp_path: Path, suffix: str) -> None:
    for year in (2025, 2026):
        path = tmp_path / f"year={year}" / f"part.{suffix}"
        path.parent.mkdir()
        path.write_text('{"a":1}\n{"a":2}\n')
    assert [row["year"] for row in open_dataset(tmp_path)] == [2025, 2025, 2026, 2026]


def test_a_field_of_the_files_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "a=7").mkdir()
    (tmp_path / "a=7" / "x.jsonl").write_text('{"a":1}\n')
    assert list(open_dataset(tmp_path)) == [{"a": 1}]


def test_folders_may_lack_a_field_and_numbers_have_18_digits_at_most(tmp_path: Path) -> None:
    for folder in ("a=x", f"a=2/b={10**18}", "plain"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.csv").write_text("n\n5\n")
    rows = [(row["a"], row["b"]) for row in open_dataset(tmp_path)]
    assert rows == [("2", str(10**18)), ("x", None), (None, None)]


def test_a_name_of_a_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a=1.csv").write_text("n\n5\n")
    assert open_dataset(tmp_path).schema.names == ["n"]


def test_a_field_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a=1" / "a=2").mkdir(parents=True)
    (tmp_path / "a=1" / "a=2" / "x.csv").write_text("n\n5\n")
    with pytest.raises(BadInputError, match="names the field 'a' twice"):
        open_dataset(tmp_path)


def test_chosen_fields_read_as_little_as_without_folders(tmp_path: Path) -> None:
    written(tmp_path, "parquet")
    url = f"file://{tmp_path}"
    reader = open_reader(url)
    source = open_source(url, reader)
    (pieces,) = fetch_blocks(reader, source.index, [0])
    whole = decode_block(source, 0, pieces)
    for names in (["city"], ["text", "year"], ["number"]):
        narrow = selected(source, names)
        (pieces,) = fetch_blocks(reader, narrow.index, [0])
        assert decode_block(narrow, 0, pieces).equals(whole.select(names))
        assert sum(piece.view.nbytes for piece in pieces) < int(source.index.blocks.length[0])
    reader.close()


def test_an_index_keeps_them(tmp_path: Path) -> None:
    expected = written(tmp_path, "csv")
    build_index(tmp_path)
    assert in_order(open_dataset(tmp_path)) == expected

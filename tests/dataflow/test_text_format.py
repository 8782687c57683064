"""JSON lines, CSV and plain text, plain and compressed."""

import csv
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectors.errors import BadInputError, ChangedError, CorruptError
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import text, unpacking
from dataflow.indexing import build_index

COMPRESSIONS = {"": None, ".bz2": "bz2", ".gz": "gzip", ".lz4": "lz4", ".zst": "zstd"}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 200)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = COMPRESSIONS.get(path.suffix)
    with pa.output_stream(path, compression=compression) as file:
        file.write(content.encode())
    return path


def rows(dataset: Dataset) -> list[dict]:
    return [
        {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
        for row in dataset
    ]


RECORDS = [{"number": number, "text": f"é\n{number}", "share": number / 2} for number in range(100)]


@pytest.mark.parametrize("packed", COMPRESSIONS)
def test_json_lines_come_back(tmp_path: Path, packed: str) -> None:
    for part in range(2):
        lines = "\n".join(json.dumps(record) for record in RECORDS[part::2])
        put(tmp_path / "set" / f"part-{part}.jsonl{packed}", lines + "\n" * part)
    dataset = open_dataset(tmp_path / "set")
    assert dataset.source.format == "jsonl"
    assert rows(dataset) == RECORDS[0::2] + RECORDS[1::2]
    assert dataset.index.num_blocks == 2 if packed else dataset.index.num_blocks > 10
    batch = dataset.get_batch([99, 0, 50])
    assert batch["number"].tolist() == [99, 0, 1]
    assert batch["text"] == ["é\n99", "é\n0", "é\n1"]


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_csv_comes_back_with_line_breaks_between_quotes(
    tmp_path: Path, packed: str, suffix: str, delimiter: str
) -> None:
    for part in range(2):
        path = tmp_path / "plain"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["number", "text", "share"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(RECORDS[part * 50 : part * 50 + 50])
        put(tmp_path / "set" / f"part-{part}{suffix}{packed}", path.read_text())
    dataset = open_dataset(tmp_path / "set")
    assert dataset.source.format == "csv"
    assert rows(dataset) == RECORDS
    assert dataset.index.num_blocks == 2 if packed else dataset.index.num_blocks > 6


@pytest.mark.parametrize("packed", COMPRESSIONS)
def test_lines_of_text_come_back_and_blank_ones_are_none(tmp_path: Path, packed: str) -> None:
    put(tmp_path / f"a.txt{packed}", "eins\r\n\n  \nzwei\n" + "x" * 500 + "\nende")
    assert [sample["text"] for sample in open_dataset(tmp_path)] == ["eins", "zwei", "x" * 500, "ende"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "i": st.none() | st.integers(-(2**53), 2**53),
                "f": st.none() | st.floats(allow_nan=False, allow_infinity=False),
                "s": st.none() | st.text(st.characters(codec="utf-8")),
                "b": st.none() | st.booleans(),
                "l": st.none() | st.lists(st.integers(-5, 5), max_size=3),
                "o": st.none() | st.fixed_dictionaries({"a": st.integers(0, 9)}),
            },
        ),
        max_size=40,
    )
)
def test_any_json_objects_come_back(tmp_path: Path, records: list[dict]) -> None:
    records = [{"key": number} | record for number, record in enumerate([{}, *records])]
    put(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == len(records)
    for field in dataset.schema:
        actual = [value for block in range(dataset.index.num_blocks) for value in decode(dataset, block, field.name)]
        expected = [record.get(field.name) for record in records]
        if field.name == "o" and pa.types.is_null(field.type):
            continue
        assert actual == expected, field


def decode(dataset: Dataset, block: int, name: str) -> list:
    data = dataset.reader.read_blocks([dataset.index.block_ref(block)])[0]
    return dataset.source.decode(block, data.view).column(name).to_pylist()


def test_a_field_that_widens_late_has_one_type_everywhere(tmp_path: Path) -> None:
    lines = [json.dumps({"x": 1, "when": "2020-01-01"})] * 100 + [json.dumps({"x": 1.5, "when": "soon", "late": 1})]
    put(tmp_path / "a.jsonl", "\n".join(lines))
    dataset = open_dataset(tmp_path, columns=["x", "when"])
    assert dataset.get_batch([0, 100])["x"].tolist() == [1.0, 1.5]
    assert dataset[0]["when"] == "2020-01-01"
    with pytest.raises(BadInputError, match="field 'late' of sample 3 is null"):
        open_dataset(tmp_path)[3]


LARGE = 2**64 - 1


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_integers_of_64_bits_stay_integers(tmp_path: Path, packed: str) -> None:
    hashes = [number * LARGE // 99 for number in range(100)]
    lines = [json.dumps({"hash": number, "x": {"l": [{"h": number}], "share": 0.5}}) for number in hashes]
    put(tmp_path / f"a.jsonl{packed}", "\n".join(lines))
    put(tmp_path / "z.jsonl", lines[1])
    dataset = open_dataset(tmp_path)
    assert dataset.schema.field("hash").type == pa.uint64()
    assert dataset.get_batch(range(101))["hash"].tolist() == [*hashes, hashes[1]]
    assert [sample["x"] for sample in dataset] == [json.loads(line)["x"] for line in [*lines, lines[1]]]
    convert(tmp_path, f"{tmp_path}-out", to="jsonl", verify=True)
    assert open_dataset(f"{tmp_path}-out").get_batch(range(101))["hash"].tolist() == [*hashes, hashes[1]]


def test_integers_of_64_bits_in_csv_stay_integers(tmp_path: Path) -> None:
    hashes = [number * LARGE // 99 for number in range(100)]
    put(tmp_path / "a.csv", "hash,share\n" + "".join(f"{number},1.5\n" for number in hashes))
    dataset = open_dataset(tmp_path)
    assert dataset.get_batch(range(100))["hash"].tolist() == hashes
    assert dataset.schema.field("share").type == pa.float64()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("pair", [(LARGE + 2, 1), (-(2**63) - 1, 1), (LARGE, -1), (2**128 - 1, 1), (10**400, 1)])
def test_integers_that_neither_64_bits_nor_floats_hold_are_refused(
    tmp_path: Path, suffix: str, pair: tuple[int, int]
) -> None:
    lines = [f'{{"n":{number}}}' for number in pair] if suffix == ".jsonl" else ["n", *map(str, pair)]
    put(tmp_path / f"a{suffix}", "\n".join(lines))
    with pytest.raises(BadInputError, match=rf"field 'n' of .*a{suffix} has the integer {pair[0]}: .* as text"):
        open_dataset(tmp_path)


def test_large_integers_beside_fractions_are_floats(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", f'{{"x":{10**20 + 1},"y":{10**20}}}\n{{"x":0.5,"y":1}}\n{{"x":1e300}}\n')
    dataset = open_dataset(tmp_path, columns=["x"])
    assert dataset.get_batch(range(3))["x"].tolist() == [1e20, 0.5, 1e300]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_large_numbers_with_an_exponent_are_floats(tmp_path: Path, suffix: str) -> None:
    numbers = ["1e23", "9.223372036854776e+18", "3"]
    lines = [f'{{"n":{number}}}' for number in numbers] if suffix == ".jsonl" else ["n", *numbers]
    put(tmp_path / f"a{suffix}", "\n".join(lines))
    assert open_dataset(tmp_path).get_batch(range(3))["n"].tolist() == list(map(float, numbers))


def test_a_negative_integer_in_another_block_than_large_ones_is_never_another_number(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", f'{{"n":{LARGE},"pad":"{"x" * 200}"}}\n{{"n":-5,"pad":""}}\n')
    dataset = open_dataset(tmp_path)
    assert dataset[0]["n"] == LARGE
    with pytest.raises(CorruptError, match=r"a\.jsonl .*uint64.*-5"):
        dataset[1]


@pytest.mark.parametrize(
    "lists",
    [
        [[None, 1], [2]],
        [[], [None, None, "2020-01-01"]],
        [[None, None], [None]],
        [[None, {"x": None}], [{"x": [None, None]}]],
    ],
)
def test_lists_that_begin_with_nulls_come_back(tmp_path: Path, lists: list) -> None:
    records = [{"l": items, "o": {"l": [items]}, "pad": "x" * 200} for items in lists]
    put(tmp_path / "apart.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    put(tmp_path / "together.jsonl.gz", "".join(json.dumps(record) + "\n" for record in records))
    dataset = open_dataset(tmp_path)
    assert [value for block in range(3) for value in decode(dataset, block, "l")] == lists * 2
    found = [value["l"] for block in range(3) for value in decode(dataset, block, "o")]
    assert found == [[items] for items in lists * 2]


@pytest.mark.parametrize("packed", ["", ".zst"])
@pytest.mark.parametrize("marks", ["[]", ('{"a":', "}")])
def test_deep_nesting_is_an_error_that_names_file_and_line(tmp_path: Path, marks: str, packed: str) -> None:
    deep = '{"x":' + 100_000 * marks[0] + "1" + 100_000 * marks[1] + "}\n"
    put(tmp_path / f"a.jsonl{packed}", '{"x":{}}\n' * 3 + deep + '{"x":{}}\n')
    with pytest.raises(BadInputError, match=rf"a\.jsonl{packed} is nested more than 64 levels deep in line 4 from"):
        open_dataset(tmp_path)


def test_a_deep_record_can_be_left_out(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", '{"x":1}\n' * 20 + '{"x":' * 10_000 + "1" + "}" * 10_000 + "\n" + '{"x":2}\n')
    result = convert(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert (result.num_samples, result.num_errors) == (21, 1)


@pytest.mark.parametrize(
    ("late", "kind"), [(b"12B", pa.string()), (b"true", pa.string()), (b"\xff", pa.binary()), (b"1.5", pa.float64())]
)
def test_a_csv_column_whose_later_values_are_no_numbers_is_text_everywhere(
    tmp_path: Path, late: bytes, kind: pa.DataType
) -> None:
    early = [b"%03d" % number for number in range(100)]
    (tmp_path / "a.csv").write_bytes(b"number,empty\n" + b"".join(value + b",\n" for value in [*early, late]))
    (tmp_path / "b.csv").write_bytes(b"number,empty\n007,\n")
    dataset = open_dataset(tmp_path, columns=["number"])
    assert dataset.schema.field("number").type == kind
    assert dataset.index.num_blocks > 2
    read = {pa.string(): bytes.decode, pa.binary(): bytes, pa.float64(): float}[kind]
    assert list(dataset.get_batch(range(102))["number"]) == [read(value) for value in [*early, late, b"007"]]


def test_a_csv_record_that_does_not_fit_is_a_bad_one_where_those_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.csv", "n,text\n" + "".join(f"{number},x\n" for number in range(100)) + "12B,y\n5,z\n")
    result = convert(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert (result.num_samples, result.num_errors) == (101, 1)


def test_records_that_disagree_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", '{"x": 1}\n' * 100 + '{"x": "one"}\n')
    with pytest.raises((BadInputError, CorruptError), match=r"a\.jsonl .*offset \d+"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("front", ["", "\ufeff \n ", '{"x": "' + "x" * 200 + '"}\n'])
def test_a_null_where_a_block_begins_is_an_error_and_not_the_end_of_the_process(tmp_path: Path, front: str) -> None:
    put(tmp_path / "a.jsonl", front + 'null\n{"x": "y"}\n')
    with pytest.raises(CorruptError, match=r"a\.jsonl cannot be parsed .* the first record is null, and no object"):
        open_dataset(tmp_path)
    convert(tmp_path, f"{tmp_path}-out", on_error="skip")
    assert open_dataset(f"{tmp_path}-out")[-1] == {"x": "y"}


@pytest.mark.parametrize("line", ['{"x": ', "[1]", "nonsense"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    put(tmp_path / "a.jsonl", '{"x": 1}\n' * 100 + line)
    with pytest.raises(CorruptError, match=r"a\.jsonl cannot be parsed as jsonl in the \d+ bytes from offset \d+"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_text_that_is_not_utf_8_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"x": "\x96"}\n1\n' if name == "a.csv" else b'{"x": "\x96"}\n')
    with pytest.raises(CorruptError, match=rf"{name} cannot be parsed"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("record", [b'{"\xe9": 1}', b'{"x": {"\xe9": 1}}', b'{"x": [{"y": {"\xe9": 1}}]}'])
def test_a_name_that_is_not_utf_8_is_named(tmp_path: Path, record: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(record + b"\n")
    with pytest.raises(CorruptError, match=r"a\.jsonl cannot be parsed"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_text_in_utf_16_is_refused_by_that_name(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes('\ufeff{"x": 1}\n{"x": 2}\n'.encode(encoding))
    with pytest.raises(CorruptError, match=rf"{name} cannot be parsed .*: it is in UTF-16, and UTF-8 is needed"):
        open_dataset(tmp_path)


def test_a_csv_row_of_another_length_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "a,b\n" + "1,2\n" * 100 + "1\n")
    with pytest.raises(CorruptError, match=r"a\.csv cannot be parsed as csv .*Expected 2 columns, got 1"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("front", ["\n", "\r\n\n", "\ufeff", "\ufeff\n"])
def test_blank_lines_and_a_mark_before_the_header_are_no_header(tmp_path: Path, front: str, packed: str) -> None:
    put(tmp_path / f"a.csv{packed}", front + "a,b\n" + "".join(f"x{number},{number}\n" for number in range(100)))
    assert rows(open_dataset(tmp_path)) == [{"a": f"x{number}", "b": number} for number in range(100)]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_mark_at_the_front_is_no_part_of_the_first_line(tmp_path: Path, packed: str) -> None:
    put(tmp_path / f"a.txt{packed}", "\ufeffone\r\n\ufefftwo\n" + "three\n" * 100)
    found = open_dataset(tmp_path).get_batch([0, 1, 101])["text"]
    assert found == ["one", "\ufefftwo", "three"]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("content", ["a,b\r1,2\r", "a,b\r1,2\r3,4\n", "a,b\r1,2\r3,4\n5,6\n"])
def test_lines_of_csv_that_end_in_cr_alone_are_refused(tmp_path: Path, content: str, packed: str) -> None:
    put(tmp_path / f"a.csv{packed}", content)
    with pytest.raises(BadInputError, match=rf"a\.csv{packed} end in CR alone"):
        open_dataset(tmp_path)


def test_cr_between_stray_quotes_of_a_csv_header_loses_nothing_in_silence(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", 'x"\r""\ninf')
    with pytest.raises(CorruptError, match=r"a\.csv has 1 records at offset 6, its scan found 2"):
        open_dataset(tmp_path)[0]


@pytest.mark.parametrize("content", ["a,b\r\r\n1,2\r\r\n", '"a","b"\r\n1,2\r\n', '"a","b"\n"1",2'])
def test_cr_before_lf_ends_a_line_of_csv(tmp_path: Path, content: str) -> None:
    put(tmp_path / "a.csv", content)
    assert rows(open_dataset(tmp_path)) == [{"a": 1, "b": 2}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "a,b,a\n1,2,3\n")
    with pytest.raises(BadInputError, match=r"a\.csv has two columns of one name, out of \['a', 'b', 'a'\]"):
        open_dataset(tmp_path)


def test_files_without_a_record_have_no_fields_to_convert(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.csv", "a,b\n")
    with pytest.raises(BadInputError, match="files without a record say nothing of theirs"):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(("names", "more"), [("size", ""), ("size,n", ",7")])
def test_a_quote_within_a_value_of_csv_is_a_character(tmp_path: Path, names: str, more: str) -> None:
    values = [f'{number}" nail' if number % 2 else f"{number}\nboxes" for number in range(200)]
    lines = [(f'"{value}"' if "\n" in value else value) + more + "\n" for value in values]
    put(tmp_path / "a.csv", names + "\n" + "".join(lines))
    dataset = open_dataset(tmp_path)
    assert dataset.index.num_blocks > 3
    assert dataset.get_batch(range(200))["size"] == values


def test_csv_files_with_other_headers_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "a,b\n1,2\n")
    put(tmp_path / "b.csv", "b,a\n2,1\n")
    with pytest.raises(BadInputError, match=r"b\.csv has the columns \['b', 'a'\], the files before it \['a', 'b'\]"):
        open_dataset(tmp_path)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff\n")
    with pytest.raises(CorruptError, match=r"a\.txt cannot be parsed as text"):
        open_dataset(tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl.gz", '{"x": 1}\n' * 100)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptError, match=r"a\.jsonl\.gz cannot be"):
        open_dataset(tmp_path)


def test_a_damaged_archive_that_is_tried_again_and_again_takes_no_memory(tmp_path: Path) -> None:
    packed = put(tmp_path / "a.jsonl.gz", '{"x": 1}\n' * 100).read_bytes()[:-10]
    tracemalloc.start()
    for _ in range(20):
        with suppress(CorruptError):
            unpacking.unpack(memoryview(packed), "file:///a.jsonl.gz")
    left_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left_bytes < 8 << 20


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "MAX_UNPACKED_BYTES", 100)
    put(tmp_path / "a.txt.gz", "x" * 101)
    with pytest.raises(BadInputError, match=r"a\.txt\.gz unpacks to more than 100 bytes"):
        open_dataset(tmp_path)


def test_a_record_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_RECORD_BYTES", 100)
    put(tmp_path / "a.txt", "x" * 150)
    with pytest.raises(BadInputError, match=r"a\.txt has a record of more than 100 bytes at offset 0"):
        open_dataset(tmp_path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(CorruptError, match=r"a\.csv is empty"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("packed", sorted(COMPRESSIONS.keys() - {""}))
def test_an_archive_of_nothing_adds_nothing(tmp_path: Path, suffix: str, packed: str) -> None:
    put(tmp_path / f"a{suffix}{packed}", "")
    put(tmp_path / f"b{suffix}{packed}", {".jsonl": '{"text":"x"}', ".csv": "text\nx", ".txt": "x"}[suffix])
    assert rows(open_dataset(tmp_path)) == [{"text": "x"}]


def test_a_single_file_is_a_dataset(tmp_path: Path) -> None:
    put(tmp_path / "my set.jsonl", '{"x": 1}\n')
    put(tmp_path / "other.jsonl", '{"y": 1}\n')
    assert open_dataset(tmp_path / "my set.jsonl")[0] == {"x": 1}


def test_a_file_that_changes_is_scanned_again_and_never_mixed(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "one\ntwo\n")
    before = open_dataset(tmp_path)
    assert len(before) == 2
    put(path, "one\ntwo\nthree\n")
    with pytest.raises(ChangedError, match=r"a\.txt"):
        before[0]
    assert len(open_dataset(tmp_path)) == 3


def test_text_converts_to_native_shards(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", "\n".join(json.dumps(record) for record in RECORDS))
    convert(tmp_path / "in", tmp_path / "out", shard_size_bytes=1000, block_size_bytes=500)
    assert rows(open_dataset(tmp_path / "out")) == RECORDS


def test_lines_in_files_called_json(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    put(tmp_path / "packed" / "part.00000-of-00010.json.gz", lines)
    assert rows(open_dataset(tmp_path / "packed")) == RECORDS
    plain = put(tmp_path / "plain" / "part.json", lines).parent
    with pytest.raises(BadInputError, match='`format="jsonl"`'):
        open_dataset(plain)
    assert rows(open_dataset(plain, format="jsonl")) == rows(open_dataset(plain / "part.json")) == RECORDS
    build_index(plain, format="jsonl")
    assert rows(open_dataset(plain)) == RECORDS


@pytest.mark.parametrize("form", [None, "jsonl"])
def test_json_beside_lines_describes_them(tmp_path: Path, form: str | None) -> None:
    put(tmp_path / "a.jsonl", '{"x":1}\n')
    put(tmp_path / "about.json", '{"y":1}\n')
    put(tmp_path / "about.json.gz", '{"y":1}\n')
    assert rows(open_dataset(tmp_path, format=form)) == [{"x": 1}]


@pytest.mark.parametrize("packed", COMPRESSIONS)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records_is_one_block(tmp_path: Path, packed: str, indent: int | None) -> None:
    records = [record | {"large": 2**63 + 1, "list": [None, {"n": record["number"]}]} for record in RECORDS]
    put(tmp_path / "in" / f"a.json{packed}", "\ufeff " + json.dumps(records, indent=indent))
    dataset = open_dataset(tmp_path / "in", format="jsonl")
    assert dataset.index.num_blocks == 1
    assert rows(dataset) == records
    convert(tmp_path / "in", tmp_path / "out", format="jsonl", verify=True)
    assert rows(open_dataset(tmp_path / "out")) == records


@pytest.mark.parametrize("array", ['[{"x":1},2]', '[{"x":1},null]', '[[{"x":1}]]', '[{"x":1}]{"x":2}', '[{"x":1}'])
def test_an_array_of_anything_else_is_refused(tmp_path: Path, array: str) -> None:
    put(tmp_path / "a.json", array)
    with pytest.raises(CorruptError, match=r"a\.json cannot be parsed"):
        open_dataset(tmp_path, format="jsonl")


def test_a_damaged_array_is_passed_over_whole(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.json", '[{"x":1},\n{"x":2},\n{"x":\n')
    put(tmp_path / "in" / "b.json", '[{"x":3}]')
    put(tmp_path / "in" / "c.json", "[]")
    convert(tmp_path / "in", tmp_path / "out", format="jsonl", on_error="skip")
    assert rows(open_dataset(tmp_path / "out")) == [{"x": 3}]


def test_an_array_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.json", '[{"x":1}]')
    monkeypatch.setattr(text, "MAX_UNPACKED_BYTES", 8)
    with pytest.raises(BadInputError, match=r"a\.json is an array of 9 bytes.*jq"):
        open_dataset(tmp_path, format="jsonl")

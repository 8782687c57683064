"""Indexes of files that have none: built once, in parallel, resumable; found without a listing, never if stale."""

import gzip
import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cache.access import open_reader
from connectors.errors import (
    BadInputError,
    ChangedError,
    CorruptError,
    DataError,
    NotFoundError,
    PermissionDeniedError,
)
from connectors.objects import ObjectMeta
from dataflow.cli.main import main
from dataflow.convert import convert
from dataflow.dataset import Dataset, open_dataset
from dataflow.formats import open_source
from dataflow.formats.destination import Destination
from dataflow.formats.place import Place
from dataflow.formats.sidecar import FileScan, Sidecar
from dataflow.formats.text import TextFormat
from dataflow.index.storage import SIDECAR_NAME
from dataflow.indexing import IndexProgress, build_index, building
from dataflow.indexing.scanning import cut_jobs
from dataflow.testing.readers import CountingReader

pytestmark = pytest.mark.usefixtures("kept_scans")

FILES = 5
ROWS = 40


def line(file: int, row: int) -> bytes:
    return json.dumps({"n": file * ROWS + row, "text": f"row {row}"}).encode() + b"\n"


def content(file: int) -> bytes:
    return b"".join(line(file, row) for row in range(ROWS))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    for file in range(FILES):
        (tmp_path / "set" / f"{file}.jsonl").write_bytes(content(file))
    return tmp_path / "set"


@pytest.fixture
def remote() -> str:
    url = f"memory://{uuid.uuid4().hex}/set"
    with Destination(url) as destination:
        for file in range(FILES):
            destination.put(f"{file}.jsonl", [content(file)])
    return url


def counted(url: str) -> tuple[Dataset, CountingReader]:
    reader = CountingReader(open_reader(url, None))
    return Dataset(open_source(url, reader), reader, buffer_bytes=1 << 20), reader


def numbers(dataset: Dataset) -> list[int]:
    return [int(sample["n"]) for sample in dataset]


def test_an_indexed_dataset_opens_without_a_listing_and_a_scan(remote: str) -> None:
    plain, listing = counted(remote)
    assert listing.listed
    build = build_index(remote)
    assert (build.beside, build.num_files, build.num_scanned, build.num_samples) == (True, FILES, FILES, FILES * ROWS)
    dataset, reader = counted(remote)
    # The manifest of a native dataset, which is not there, and the index.
    assert reader.objects == [f"{remote}/dataset.json", f"{remote}/{SIDECAR_NAME}"]
    assert len(reader.heads) == 1 + 4
    assert (reader.listed, reader.requests) == ([], [])
    assert dataset.fingerprint == plain.fingerprint == build.fingerprint
    assert numbers(dataset) == list(range(FILES * ROWS))


def test_an_index_is_fetched_once_by_all_jobs_of_a_machine(remote: str) -> None:
    build_index(remote)
    counted(remote)
    _, reader = counted(remote)
    assert reader.objects == [f"{remote}/dataset.json"]


def test_the_requests_of_opening_do_not_grow_with_the_number_of_files() -> None:
    seen = []
    for files in (8, 80):
        url = f"memory://{uuid.uuid4().hex}/set"
        with Destination(url) as destination:
            for file in range(files):
                destination.put(f"{file:03}.jsonl", [line(file, 0)])
        build_index(url)
        _, reader = counted(url)
        seen.append((len(reader.objects), len(reader.heads), len(reader.listed), len(reader.requests)))
    assert seen == [(2, 5, 0, 0)] * 2


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs of one file; the keys of the files that this process scans."""
    seen: list[str] = []
    original = TextFormat.scan_file

    def scan_file(self: TextFormat, where: Place, meta: ObjectMeta) -> FileScan:
        seen.append(meta.key)
        return original(self, where, meta)

    monkeypatch.setattr(TextFormat, "scan_file", scan_file)
    monkeypatch.setattr(building, "JOB_FILES", 1)
    return seen


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_index_does_not_depend_on_the_number_of_workers(place: Path, workers: int, tmp_path: Path) -> None:
    plain = build_index(place, out=tmp_path / "plain.arrow", workers=0)
    seen: list[IndexProgress] = []
    build = build_index(place, workers=workers, progress=seen.append)
    assert (place / SIDECAR_NAME).read_bytes() == (tmp_path / "plain.arrow").read_bytes()
    assert plain.fingerprint == build.fingerprint
    assert [state.files for state in seen] == list(range(FILES + 1))
    assert (seen[-1].size_bytes, seen[-1].samples) == (seen[-1].num_bytes, FILES * ROWS)


def test_a_build_that_broke_off_goes_on_where_it_was(place: Path, kept_scans: Path, scanned: list[str]) -> None:
    (place / "3.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(CorruptError, match=r"3\.jsonl"):
        build_index(place, workers=0)
    assert not (place / SIDECAR_NAME).exists()
    assert [path.suffix for path in kept_scans.iterdir()] == [".journal"]
    (place / "3.jsonl").write_bytes(content(3))
    scanned.clear()
    build = build_index(place, workers=0, resume=True)
    assert scanned == ["3.jsonl", "4.jsonl"]
    assert build.num_scanned == 2
    assert numbers(open_dataset(place)) == list(range(FILES * ROWS))
    assert list(kept_scans.iterdir()) == []


@pytest.mark.parametrize("left", [5, -7])
def test_a_journal_that_was_cut_off_is_believed_up_to_there(
    place: Path, kept_scans: Path, scanned: list[str], left: int
) -> None:
    (place / "3.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(CorruptError):
        build_index(place, workers=0)
    (journal,) = kept_scans.iterdir()
    journal.write_bytes(journal.read_bytes()[:left])
    (place / "3.jsonl").write_bytes(content(3))
    scanned.clear()
    build_index(place, workers=0, resume=True)
    assert scanned == [f"{file}.jsonl" for file in range(FILES)][0 if left > 0 else 2 :]
    assert numbers(open_dataset(place)) == list(range(FILES * ROWS))


def test_resume_scans_what_is_new_and_without_it_everything(place: Path, scanned: list[str]) -> None:
    build_index(place, workers=0)
    (place / "5.jsonl").write_bytes(content(5))
    scanned.clear()
    grown = build_index(place, workers=0, resume=True)
    assert scanned == ["5.jsonl"]
    assert (grown.num_files, grown.num_scanned) == (6, 1)
    assert build_index(place, workers=0).num_scanned == 6
    assert numbers(open_dataset(place)) == list(range(6 * ROWS))


def set_times(index: Path, *, older: list[Path], newer: list[Path]) -> None:
    """Make folders older and newer than an index, whatever the steps of the clock are."""
    put_ns = index.stat().st_ctime_ns
    for folders, ns in ((older, put_ns - 1), (newer, put_ns + 1)):
        for folder in folders:
            os.utime(folder, ns=(ns, ns))


@pytest.mark.parametrize("name", ["5.jsonl", "below/5.jsonl", "below/more/5.jsonl"])
@pytest.mark.parametrize("beside", [True, False])
def test_files_that_were_added_are_left_out_and_said_so(
    place: Path, name: str, beside: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [place, place / "below"]
    (place / "below").mkdir()
    (place / "4.jsonl").rename(place / "below" / "4.jsonl")
    out = None if beside else tmp_path / "elsewhere.arrow"
    build_index(place, out=out)
    changed = place if name == "5.jsonl" else place / "below"
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_bytes(content(5))
    (place / name).with_name("notes.md").write_text("no data")
    folders.remove(changed)
    set_times(out or place / SIDECAR_NAME, older=folders, newer=[changed])
    assert numbers(open_dataset(place, index=out)) == list(range(FILES * ROWS))
    assert f"1 files at {place.as_uri()} were added" in caplog.text
    assert f"({name}, ...) and are left out: run `dataflow index --resume`" in caplog.text
    build_index(place, out=out, resume=True)
    caplog.clear()
    assert sorted(numbers(open_dataset(place, index=out))) == list(range(6 * ROWS))
    assert not caplog.text


def test_pictures_that_were_added_to_a_folder_are_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(b"1")
    build_index(tmp_path / "set")
    (tmp_path / "set" / "cat" / "2.png").write_bytes(b"2")
    set_times(tmp_path / "set" / SIDECAR_NAME, older=[tmp_path / "set"], newer=[tmp_path / "set" / "cat"])
    assert len(open_dataset(tmp_path / "set")) == 1
    assert "(cat/2.png, ...) and are left out" in caplog.text


def test_a_folder_that_has_not_changed_is_not_listed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(place)
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    set_times(place / SIDECAR_NAME, older=[place], newer=[])
    open_dataset(place)
    assert not listed
    set_times(place / SIDECAR_NAME, older=[], newer=[place])
    open_dataset(place)
    assert listed == [place]


def test_an_index_that_does_not_hold_is_said_so_and_brought_up_to_date(
    place: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    build_index(place, workers=0)
    (place / "0.jsonl").write_bytes(content(9))
    scanned.clear()
    first = numbers(open_dataset(place))
    assert "is out of date (0.jsonl has changed)" in caplog.text
    assert scanned == ["0.jsonl"]
    assert first[:ROWS] == list(range(9 * ROWS, 10 * ROWS))
    assert numbers(open_dataset(place)) == first
    assert scanned == ["0.jsonl"]
    (place / "4.jsonl").unlink()
    assert numbers(open_dataset(place)) == first[:-ROWS]


def test_what_changed_beyond_the_files_that_are_looked_at_is_found_when_it_is_read() -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    with Destination(url) as destination:
        for file in range(30):
            destination.put(f"{file:02}.jsonl", [line(file, 0)])
        build_index(url)
        destination.put("01.jsonl", [line(1, 1)])
        dataset = open_dataset(url)
        assert dataset[0]["n"] == 0
        with pytest.raises(ChangedError, match=r"01\.jsonl"):
            dataset[1]


def test_an_index_of_another_copy_is_not_believed(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_index(place)
    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy" / "0.jsonl").write_bytes(content(9))
    assert numbers(open_dataset(tmp_path / "copy"))[0] == 9 * ROWS
    assert "is out of date" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_index_is_said_so_and_not_used(place: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    build_index(place)
    path = place / SIDECAR_NAME
    good = path.read_bytes()
    changed = {"cut": good[:-10], "flip": good.replace(b"2.jsonl", b"7.jsonl"), "other": b"something"}[damage]
    assert changed != good
    path.write_bytes(changed)
    assert numbers(open_dataset(place)) == list(range(FILES * ROWS))
    assert "is not used, the files are scanned" in caplog.text


def contents(sidecar: Sidecar) -> list[object]:
    blocks = sidecar.blocks
    vectors = (blocks.shard, blocks.offset, blocks.length, blocks.first_sample, sidecar.learned_of)
    texts = (sidecar.format, sidecar.schema, sidecar.facts, sidecar.learned, sidecar.fingerprint)
    return [*texts, sidecar.listing(), *(vector.tolist() for vector in vectors)]


def test_no_flipped_byte_of_an_index_goes_unseen(place: Path) -> None:
    build_index(place)
    good = (place / SIDECAR_NAME).read_bytes()
    expected = contents(Sidecar.decode(good, uri="file:///index"))
    for position in range(0, len(good), 3):
        changed = bytearray(good)
        changed[position] ^= 0xFF
        # Or it changed nothing: some bytes are padding, and a buffer may be longer than its values.
        with suppress(CorruptError):
            assert contents(Sidecar.decode(changed, uri="file:///index")) == expected


def test_an_index_may_lie_elsewhere_and_is_refused_when_it_does_not_hold(place: Path, tmp_path: Path) -> None:
    where = tmp_path / "elsewhere" / "my.arrow"
    build = build_index(place, out=where)
    assert not build.beside
    assert not (place / SIDECAR_NAME).exists()
    assert numbers(open_dataset(place, index=where)) == list(range(FILES * ROWS))
    with pytest.raises(BadInputError, match="is the index of a jsonl dataset"):
        open_dataset(place, index=where, format="csv")
    (place / "4.jsonl").write_bytes(content(9))
    with pytest.raises(BadInputError, match=r"4\.jsonl has changed; write it again"):
        open_dataset(place, index=where)
    (place / "0.jsonl").unlink()
    with pytest.raises(BadInputError, match=r"0\.jsonl is gone"):
        open_dataset(place, index=where)
    with pytest.raises(NotFoundError):
        open_dataset(place, index=tmp_path / "nothing")
    where.write_bytes(b"something")
    with pytest.raises(CorruptError):
        open_dataset(place, index=where)


def test_where_the_data_cannot_be_written_to_the_index_goes_to_the_cache_folder(
    place: Path, kept_scans: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Destination, name: str, chunks: object) -> None:
        raise PermissionDeniedError(f"{self.url}/{name} is read-only")

    monkeypatch.setattr(Destination, "put", refuse)
    build = build_index(place, workers=0)
    assert not build.beside
    assert Path(build.url.removeprefix("file://")).parent == kept_scans
    scanned.clear()
    assert numbers(open_dataset(place)) == list(range(FILES * ROWS))
    assert scanned == []
    with pytest.raises(PermissionDeniedError):
        build_index(place, workers=0, out=place / "here.arrow")
    shutil.rmtree(kept_scans)
    kept_scans.touch()
    with pytest.raises(DataError, match="name a place with --out"):
        build_index(place, workers=0)


def test_a_single_file_has_its_index_in_the_cache_folder(place: Path, scanned: list[str]) -> None:
    build = build_index(place / "1.jsonl", workers=0)
    assert (build.num_files, build.beside) == (1, False)
    scanned.clear()
    assert numbers(open_dataset(place / "1.jsonl")) == list(range(ROWS, 2 * ROWS))
    assert scanned == []


@pytest.mark.parametrize(("to", "workers"), [("webdataset", 0), ("tfrecord", 2), ("jsonl", 0)])
def test_every_format_that_is_scanned_reads_the_same_with_an_index(
    place: Path, tmp_path: Path, to: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "JOB_FILES", 1)
    out = tmp_path / "out"
    convert(place, out, to=to, shard_size_bytes=2000, workers=0)
    plain = open_dataset(out)
    build = build_index(out, workers=workers)
    assert (build.format, build.beside) == (to, True)
    assert build.num_files > 1
    indexed = open_dataset(out)
    assert (indexed.fingerprint, indexed.schema) == (plain.fingerprint, plain.schema)
    name = "n" if to != "webdataset" else "n.cls"
    assert [int(sample[name]) for sample in indexed] == list(range(FILES * ROWS))


def test_compressed_files_are_indexed_as_one_block_each(place: Path) -> None:
    for path in place.iterdir():
        (place / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    assert build_index(place).num_blocks == FILES
    assert numbers(open_dataset(place)) == list(range(FILES * ROWS))


def test_files_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    for name, value in (("a", "1"), ("b", '"text"')):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"n": {value}}}\n')
    with pytest.raises(BadInputError, match=r"b\.jsonl"):
        build_index(tmp_path)


def test_what_needs_no_index_gets_none(place: Path, tmp_path: Path) -> None:
    convert(place, tmp_path / "native", workers=0)
    with pytest.raises(BadInputError, match="needs no index"):
        build_index(tmp_path / "native")
    with pytest.raises(NotFoundError):
        build_index(tmp_path / "nothing")
    with pytest.raises(BadInputError, match="no format is called 'tar'"):
        build_index(place, format="tar")
    with pytest.raises(BadInputError, match="workers must be >= 0"):
        build_index(place, workers=-1)


def test_a_dataset_with_an_index_can_be_overwritten(place: Path, tmp_path: Path) -> None:
    convert(place, tmp_path / "out", to="jsonl", workers=0)
    build_index(tmp_path / "out")
    convert(place, tmp_path / "out", to="jsonl", workers=0, overwrite=True, sample_fraction=0.5)
    assert not (tmp_path / "out" / SIDECAR_NAME).exists()
    assert len(open_dataset(tmp_path / "out")) == FILES * ROWS // 2


@pytest.fixture
def images() -> str:
    url = f"memory://{uuid.uuid4().hex}/set"
    with Destination(url) as destination:
        for number in range(20):
            destination.put(f"{'cat' if number % 2 else 'dog'}/{number:02}.png", [bytes([number])])
    return url


def test_the_index_of_a_folder_is_its_listing(images: str) -> None:
    plain, _ = counted(images)
    build = build_index(images)
    assert (build.format, build.num_files, build.num_samples, build.num_scanned) == ("folder", 20, 20, 0)
    dataset, reader = counted(images)
    assert (reader.listed, reader.requests) == ([], [])
    assert len(reader.heads) == 5
    assert dataset.fingerprint == plain.fingerprint == build.fingerprint
    assert dataset.schema == plain.schema
    for _ in range(2):  # an older index is no part of the next
        assert build_index(images).num_files == 20


def test_the_index_of_a_folder_that_changed_is_said_so_and_not_used(
    images: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_index(images)
    with Destination(images) as destination:
        destination.put("cat/01.png", [b"other"])
    dataset, reader = counted(images)
    assert "is out of date (cat/01.png has changed)" in caplog.text
    assert reader.listed == [images]
    assert len(dataset) == 20


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 50), st.integers(1, 6))
def test_jobs_cover_all_files_in_order(sizes: list[int], job_bytes: int, job_files: int) -> None:
    files = [ObjectMeta(str(number), size, "") for number, size in enumerate(sizes)]
    jobs = cut_jobs(files, job_bytes=job_bytes, job_files=job_files)
    assert [meta for job in jobs for meta in job.files] == files
    for job in jobs:
        assert 1 <= len(job.files) <= job_files
        assert len(job.files) == 1 or sum(meta.size_bytes for meta in job.files) <= job_bytes


def test_the_command_says_what_it_did(place: Path) -> None:
    done = CliRunner().invoke(main, ["index", str(place), "--workers", "0"])
    assert done.exit_code == 0
    assert f"{FILES * ROWS} samples in {FILES} blocks of {FILES} jsonl files" in done.stdout
    again = CliRunner().invoke(main, ["index", str(place), "--resume", "--json"])
    rows = [json.loads(text) for text in again.stdout.splitlines()]
    assert [row["event"] for row in rows] == ["progress", "done"]
    assert (rows[-1]["num_scanned"], rows[-1]["num_files"]) == (0, FILES)
    quiet = CliRunner().invoke(main, ["index", str(place), "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    missing = CliRunner().invoke(main, ["index", str(place / "nothing")])
    assert missing.exit_code == 1

"""`tiered::` does what fsspec's own suite asks of a file system, and never mixes two contents of one file."""

import contextlib
import gc
import hashlib
import io
import logging
import multiprocessing
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import obstore.fsspec
import pytest
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from cache.client import CacheClient
from cache.filesystem import TieredFileSystem
from cache.testing import digest_files
from connectors.errors import BadInputError, ChangedError, NotFoundError

MIB = 1 << 20


class TieredFixtures(AbstractFixtures):
    @pytest.fixture
    def supports_empty_directories(self):
        return False


class FileFixtures(TieredFixtures):
    @pytest.fixture
    def fs(self):
        return fsspec.filesystem("tiered", target_protocol="file")

    @pytest.fixture
    def fs_path(self, tmp_path):
        return str(tmp_path)


class MemoryFixtures(TieredFixtures):
    @pytest.fixture
    def fs(self):
        return fsspec.filesystem("tiered", target_protocol="memory")

    @pytest.fixture
    def fs_path(self, tmp_path):
        return f"test/{tmp_path.name}"


class TestCopyFiles(FileFixtures, AbstractCopyTests):
    pass


class TestGetFiles(FileFixtures, AbstractGetTests):
    pass


class TestOpenFiles(FileFixtures, AbstractOpenTests):
    pass


class TestPipeFiles(FileFixtures, AbstractPipeTests):
    pass


class TestPutFiles(FileFixtures, AbstractPutTests):
    pass


class TestCopyMemory(MemoryFixtures, AbstractCopyTests):
    pass


class TestGetMemory(MemoryFixtures, AbstractGetTests):
    pass


class TestOpenMemory(MemoryFixtures, AbstractOpenTests):
    pass


class TestPipeMemory(MemoryFixtures, AbstractPipeTests):
    pass


class TestPutMemory(MemoryFixtures, AbstractPutTests):
    pass


@pytest.fixture
def fs() -> TieredFileSystem:
    return fsspec.filesystem("tiered", target_protocol="file", block_size_bytes=MIB)


@pytest.fixture
def big(tmp_path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(2 * MIB + 12_345))
    return path


def test_the_url_that_names_it_finds_it(big):
    with fsspec.open(f"tiered::file://{big}") as file:
        assert file.read() == big.read_bytes()
    with fsspec.open(f"tiered://file://{big}") as file:
        assert file.read() == big.read_bytes()


def test_any_slice_is_that_of_the_bytes(fs, big):
    data = big.read_bytes()
    for start, end in [(None, None), (0, 0), (5, 5), (9, 4), (MIB - 1, MIB + 1), (1, -1), (-7, None), (0, 1 << 40)]:
        assert fs.cat_file(str(big), start, end) == data[start:end]
    for piece in (1, 1000, MIB, MIB + 1, 3 * MIB):
        with fs.open(str(big)) as file:
            file.seek(MIB - 500)
            assert file.read(piece) == data[MIB - 500 :][:piece]
            assert file.tell() == min(MIB - 500 + piece, len(data))


def test_many_ranges_come_in_order_and_errors_in_their_places(fs, big, tmp_path):
    data = big.read_bytes()
    starts = [3, MIB, 0, len(data) - 4]
    ends = [9, MIB + 10, 2 * MIB + 1, None]
    assert fs.cat_ranges([str(big)] * 4, starts, ends) == [data[s:e] for s, e in zip(starts, ends, strict=True)]
    first, second = fs.cat_ranges([str(big), str(tmp_path / "none")], 0, 3)
    assert first == data[:3]
    assert isinstance(second, NotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges([str(big), str(tmp_path / "none")], 0, 3, on_error="raise")


@pytest.mark.parametrize("size", [3000, 2 * MIB + 7])
def test_a_file_replaced_while_it_is_read_is_an_error_and_then_the_new_one(fs, tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(b"a" * size)
    with fs.open(str(path)) as file:
        assert file.read(10) == b"a" * 10
        path.with_suffix(".new").write_bytes(b"b" * size)
        path.with_suffix(".new").replace(path)
        file._held = None  # what was read is held and may be given again
        with pytest.raises(ChangedError):
            file.read()
    assert fs.cat_file(str(path)) == b"b" * size


def test_a_pickled_file_goes_on_where_it_was_and_only_in_the_same_content(fs, big):
    data = big.read_bytes()
    with fs.open(str(big)) as file:
        file.seek(1000)
        copied = pickle.dumps(file)
    with pickle.loads(copied) as again:
        assert again.read(5) == data[1000:1005]
    big.with_suffix(".new").write_bytes(data[::-1])
    big.with_suffix(".new").replace(big)
    with pickle.loads(copied) as again, pytest.raises(ChangedError):
        again.read(5)


def test_a_pickled_file_system_is_the_same_and_works(fs, big):
    again = pickle.loads(pickle.dumps(fs))
    assert again == fs
    assert again.cat_file(str(big)) == big.read_bytes()


def test_a_write_appears_whole_at_its_end(fs, tmp_path):
    path = tmp_path / "folder" / "out.bin"
    data = os.urandom(3 * MIB)
    with fs.open(str(path), "wb", block_size=MIB) as file:
        for begin in range(0, len(data), 100_000):
            file.write(data[begin : begin + 100_000])
            assert not path.exists()
    assert path.read_bytes() == data


def test_a_write_that_fails_leaves_what_was_there(fs, tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    file = fs.open(str(path), "wb")
    with contextlib.suppress(ZeroDivisionError), file:
        file.write(b"half of the ne")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"


def test_a_lost_file_is_not_written(fs, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "cache.tiered_file"):
        fs.open(str(tmp_path / "lost"), "wb").write(b"x")
        gc.collect()
    assert "never closed" in caplog.text
    assert not (tmp_path / "lost").exists()


def test_a_transaction_publishes_at_its_end_or_not_at_all(fs, tmp_path):
    with fs.transaction:
        with fs.open(str(tmp_path / "a"), "wb") as file:
            file.write(b"1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"1"
    with contextlib.suppress(ZeroDivisionError), fs.transaction:
        with fs.open(str(tmp_path / "b"), "wb") as file:
            file.write(b"1")
        raise ZeroDivisionError
    assert not (tmp_path / "b").exists()


def test_a_download_that_fails_leaves_nothing(fs, big, tmp_path, monkeypatch):
    def chunks(pinned):
        yield b"half"
        raise ChangedError("changed")

    monkeypatch.setattr(fs._objects, "chunks", chunks)
    (tmp_path / "target").mkdir()
    with pytest.raises(ChangedError):
        fs.get_file(str(big), str(tmp_path / "target" / "copy"))
    assert list((tmp_path / "target").iterdir()) == []


def test_listings_know_folders_by_what_is_in_them(fs, tmp_path):
    for name in ("a/1", "a/b/2", "c"):
        fs.pipe_file(str(tmp_path / "top" / name), name.encode())
    top = str(tmp_path / "top")
    assert fs.ls(top, detail=False) == [f"{top}/a", f"{top}/c"]
    assert [entry["type"] for entry in fs.ls(top)] == ["directory", "file"]
    assert fs.find(top) == [f"{top}/a/1", f"{top}/a/b/2", f"{top}/c"]
    assert fs.find(top, maxdepth=2, withdirs=True) == [top, f"{top}/a", f"{top}/a/1", f"{top}/a/b", f"{top}/c"]
    assert fs.ls(f"{top}/c", detail=False) == [f"{top}/c"]
    assert fs.glob(f"{top}/**/2") == [f"{top}/a/b/2"]
    assert fs.info(f"{top}/a")["type"] == "directory"
    assert fs.info(f"{top}/c")["size"] == 1
    assert not fs.exists(f"{top}/d")
    with pytest.raises(FileNotFoundError):
        fs.ls(f"{top}/d")
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir(f"{top}/a")
    fs.rm(top, recursive=True)
    assert not fs.exists(top)


def test_text_lines_and_other_libraries_read_it(fs, tmp_path):
    fs.pipe_file(str(tmp_path / "lines"), b"one\ntwo\nthree")
    with fs.open(str(tmp_path / "lines"), "r") as file:
        assert file.readlines() == ["one\n", "two\n", "three"]
    with fs.open(str(tmp_path / "lines"), "rb") as file:
        assert io.BufferedReader(file).readline() == b"one\n"


def test_writing_works_where_an_event_loop_runs(tmp_path):
    # As in a notebook, and in a process of its own: here, whatever blocks a loop is an error.
    program = f"""
import asyncio, fsspec
async def cell():
    fsspec.filesystem("tiered").pipe_file("file://{tmp_path}/cell", b"x")
asyncio.run(cell())
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "cell").read_bytes() == b"x"


@pytest.fixture
def daemon(tmp_path) -> Iterator[str]:
    """A daemon in a process of its own; its address."""
    address = f"@{tmp_path.name}-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address, "--ram", "256MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        yield address
        process.terminate()
        process.stderr.read()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_eight_processes_read_ten_cold_files_right_and_each_block_comes_once(tmp_path, daemon, method):
    contents = {f"tiered::file://{tmp_path}/{number}": os.urandom(2 * MIB + number * 1000) for number in range(1, 11)}
    for url, content in contents.items():
        Path(url.removeprefix("tiered::file://")).write_bytes(content)
    options = {"tiered": {"cache": daemon, "block_size_bytes": MIB}}
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe() for _ in range(8)]
    processes = [context.Process(target=digest_files, args=(list(contents), options, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    for ours, _ in pipes:
        assert ours.recv() == "ready"
    for ours, _ in pipes:
        ours.send("go")
    right = [hashlib.blake2b(content).hexdigest() for content in contents.values()]
    wrong = sum(ours.recv() != digest for ours, _ in pipes for digest in right)
    for process in processes:
        process.join()
    client = CacheClient(daemon)
    stats = client.stats()
    client.close()
    for end in (end for pipe in pipes for end in pipe):
        end.close()
    assert wrong == 0
    assert stats["origin"]["bytes"] == sum(map(len, contents.values()))
    assert stats["blocks_requested"] == 8 * 10 * 3


def test_each_data_set_has_blocks_of_its_size_and_a_small_object_is_one_block(tmp_path, daemon):
    client = CacheClient(daemon)

    def blocks_of(name: str, size_bytes: int, block_size_bytes: int) -> int:
        (tmp_path / name).write_bytes(os.urandom(size_bytes))
        reader = fsspec.filesystem(
            "tiered", target_protocol="file", cache=daemon, block_size_bytes=block_size_bytes, skip_instance_cache=True
        )
        assert reader.cat_file(str(tmp_path / name)) == (tmp_path / name).read_bytes()
        return client.stats()["origin"]["blocks"]

    fine = blocks_of("fine", MIB, 16 * 1024)
    coarse = blocks_of("coarse", MIB, 256 * 1024) - fine
    small = blocks_of("small", 100, 256 * 1024) - fine - coarse
    client.close()
    assert (fine, coarse, small) == (64, 4, 1)


@pytest.mark.s3
def test_files_of_an_object_store_are_read_written_and_pinned(s3_server, s3_bucket, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    data = os.urandom(5 * MIB)
    # The chain wants some class for s3; obstore has one that needs no further package.
    obstore.fsspec.register("s3")
    with fsspec.open(f"tiered::s3://{s3_bucket}/folder/object", "wb", tiered={"block_size_bytes": MIB}) as file:
        file.write(data)
    filesystem, path = fsspec.url_to_fs(f"tiered::s3://{s3_bucket}/folder/object", tiered={"block_size_bytes": MIB})
    try:
        assert filesystem.ls(f"{s3_bucket}/folder", detail=False) == [path]
        with filesystem.open(path) as file:
            assert file.read(10) == data[:10]
            filesystem.pipe_file(path, data[::-1])
            with pytest.raises(ChangedError):
                file.read(3 * MIB)
        with filesystem.open(path) as file:
            assert filesystem.cat_file(path) == data[::-1]
            filesystem.pipe_file(path, b"third")
            assert file.read() == data[::-1]  # all of the pinned content is in the cache
        assert filesystem.cat_file(path, 1, -1) == b"hir"
        filesystem.rm(f"{s3_bucket}/folder", recursive=True)
        assert not filesystem.exists(path)
    finally:
        filesystem.close()


def test_a_file_is_copied_to_another_origin(fs, big):
    whole = fsspec.filesystem("tiered")
    whole.cp_file(f"file://{big}", "memory://test/copied")
    assert whole.cat_file("memory://test/copied") == big.read_bytes()
    whole.rm("memory://test/copied")
    assert not whole.exists("memory://test/copied")


def test_what_cannot_be_done_is_refused_by_name(fs, tmp_path):
    with pytest.raises(BadInputError, match="key"):
        fsspec.filesystem("tiered", target_protocol="s3", target_options={"key": "secret"})
    with pytest.raises(BadInputError, match="rb, wb and xb"):
        fs.open(str(tmp_path / "x"), "ab")
    with pytest.raises(BadInputError, match="no scheme"):
        fsspec.filesystem("tiered").cat_file("bucket/key")
    with pytest.raises(BadInputError, match="block_size_bytes"):
        fsspec.filesystem("tiered", block_size_bytes=10)
    with pytest.raises(BadInputError, match="max_age_s"):
        fsspec.filesystem("tiered", max_age_s=-1)


def test_a_version_is_looked_up_once_while_it_is_young_enough(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    young = fsspec.filesystem("tiered", target_protocol="file", max_age_s=3600)
    assert young.cat_file(str(path)) == b"old"
    path.with_suffix(".new").write_bytes(b"newer")
    path.with_suffix(".new").replace(path)
    assert young.info(str(path))["size"] == 3
    with young.open(str(path)) as file, pytest.raises(ChangedError):
        file.read()
    assert young.info(str(path))["size"] == 5
    path.with_suffix(".new").write_bytes(b"newest")
    path.with_suffix(".new").replace(path)
    assert young.cat_file(str(path)) == b"newest"
    young.pipe_file(str(path), b"own")
    assert young.cat_file(str(path)) == b"own"

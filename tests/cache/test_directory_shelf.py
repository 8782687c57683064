"""A directory has one server, holds only whole blocks, and survives a kill between any two system calls."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.block import block_path, file_bytes
from cache.config import Medium
from cache.directory_shelf import DirectoryShelf, LeftBehindError
from cache.handle import Block, seal_block
from cache.pins import PinSet
from cache.testing import FaultySystem, check_directory
from connectors.errors import BadInputError, CorruptError

DATA = bytes(range(256)) * 300
# Large enough to go past the page cache, and no multiple of its pages.
LARGE = bytes(range(256)) * 2000 + b"end"


def make_block(number: int, data: bytes = DATA) -> Block:
    return seal_block(number.to_bytes(16, "big"), data)


def opened(path: Path, system: object = os, medium: Medium = "nvme") -> DirectoryShelf:
    shelf = DirectoryShelf(str(path), medium=medium, system=system)
    shelf.lock()
    return shelf


def blocks_in(shelf: DirectoryShelf) -> list[tuple[bytes, int]]:
    return sorted(block for folder in shelf.folders() for block in shelf.scan(folder)[0])


def failing(call: str, number: int) -> FaultySystem:
    def before(name: str) -> None:
        if name == call:
            raise OSError(number, os.strerror(number))

    return FaultySystem(before)


def test_a_written_block_is_read_found_and_removed(tmp_path: Path) -> None:
    shelf, block = opened(tmp_path), make_block(7)
    shelf.write(block)
    assert os.pread(shelf.open(block.key, block.length).fd, block.length, 0) == DATA
    assert shelf.read(block.key, block.length).map() == DATA
    assert blocks_in(shelf) == [(block.key, block.length)]
    shelf.remove(block.key, block.length)
    shelf.remove(block.key, block.length)
    assert blocks_in(shelf) == []
    with pytest.raises(FileNotFoundError):
        shelf.open(block.key, block.length)


def test_blocks_survive_the_server(tmp_path: Path) -> None:
    shelf, block = opened(tmp_path), make_block(7)
    shelf.write(block)
    shelf.close()
    assert blocks_in(opened(tmp_path)) == [(block.key, block.length)]


def test_a_second_server_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(BadInputError, match=rf"{tmp_path}.*process {os.getpid()}"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from cache.directory_shelf import DirectoryShelf\n"
        "shelf = DirectoryShelf(sys.argv[1], medium='ram', system=os); shelf.lock()\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command, pipe = [sys.executable, "-c", script, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            with pytest.raises(BadInputError, match=f"process {holder.pid}"):
                opened(tmp_path)
        finally:
            holder.kill()
    opened(tmp_path).close()


def test_the_files_of_a_killed_server_are_swept(tmp_path: Path) -> None:
    opened(tmp_path).close()
    (tmp_path / "tmp" / "half").write_bytes(b"x" * 5000)
    opened(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_directory_that_was_deleted_is_not_made_again_and_taken_up_when_it_is(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shelf = opened(path)
    shutil.rmtree(path)
    with pytest.raises(OSError, match=f"no longer the directory .*{path}"):
        shelf.write(make_block(7))
    readable, writable, reason = shelf.probe()
    assert (readable, writable) == (False, False)
    assert f"No such file or directory: '{path}'" in str(reason)
    assert not path.exists()
    path.mkdir()
    assert shelf.changes == 0
    assert shelf.probe() == shelf.probe() == (True, True, None)
    assert shelf.changes == 1
    shelf.write(make_block(7))
    assert len(blocks_in(shelf)) == 1
    with pytest.raises(BadInputError, match=f"process {os.getpid()}"):
        opened(path)


def test_a_directory_that_another_server_has_by_now_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shelf, block = opened(path), make_block(7)
    shutil.rmtree(path)
    other = opened(path)
    for write in (lambda: shelf.write(block), lambda: shelf.keep_pins(PinSet())):
        with pytest.raises(OSError, match="no longer the directory"):
            write()
    assert sorted(entry.name for entry in path.rglob("*")) == ["blocks-1", "lock", "tmp"]
    readable, writable, reason = shelf.probe()
    assert (readable, writable) == (False, False)
    assert f"{path} is in use by process {os.getpid()}" in str(reason)
    other.write(block)
    other.close()
    assert shelf.probe() == (True, True, None)
    assert blocks_in(shelf) == [(block.key, block.length)]


@pytest.mark.parametrize("notices", ["a write", "a read", "a probe"])
def test_a_directory_that_was_away_and_is_back_counts_as_another_one(tmp_path: Path, notices: str) -> None:
    shelf = opened(tmp_path / "cache")
    shelf.write(make_block(1))
    shelf.renew()
    assert shelf.changes == 0
    (tmp_path / "cache").rename(tmp_path / "away")
    block = make_block(1)
    if notices == "a write":
        with pytest.raises(OSError, match="no longer the directory"):
            shelf.write(block)
    elif notices == "a read":
        with pytest.raises(OSError, match="no longer the directory"):
            shelf.open(block.key, block.length)
    else:
        assert not shelf.probe()[0]
    (tmp_path / "away").rename(tmp_path / "cache")
    # Whoever held what was in it may have let go of some of that meanwhile.
    assert shelf.probe() == (True, True, None)
    assert shelf.changes == 1
    assert shelf.probe() == (True, True, None)
    assert shelf.changes == 1


def test_where_a_disk_was_mounted_the_one_below_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mounted = tmp_path / "disk", [True]
    monkeypatch.setattr(os.path, "ismount", lambda found: found == str(path) and mounted[0])
    shelf = opened(path)
    path.rename(tmp_path / "away")
    path.mkdir()
    mounted[0] = False
    readable, _, reason = shelf.probe()
    assert (readable, shelf.changes, list(path.iterdir())) == (False, 0, [])
    assert f"no disk is mounted: '{path}'" in str(reason)
    mounted[0] = True
    assert shelf.probe() == (True, True, None)
    assert shelf.changes == 1


@pytest.mark.parametrize("gone", ["tmp", "blocks-1", "blocks-1/07"])
def test_a_folder_that_somebody_tidied_away_is_made_again_by_the_next_write(tmp_path: Path, gone: str) -> None:
    shelf, block = opened(tmp_path), make_block(7)
    shelf.write(block)
    shutil.rmtree(tmp_path / gone)
    shelf.write(block)
    assert blocks_in(shelf) == [(block.key, block.length)]
    check_directory(tmp_path, capacity_bytes=shelf.cost_bytes(block.length))


def test_foreign_files_and_other_versions_are_left_alone_with_one_line(tmp_path: Path, caplog) -> None:
    shelf = opened(tmp_path)
    shelf.write(make_block(7))
    shelf.close()
    foreign = [tmp_path / "notes.txt", tmp_path / "blocks-2" / "00" / "x", tmp_path / "blocks-1" / "07" / "y"]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    shelf = opened(tmp_path)
    assert [len(blocks) for blocks, _ in map(shelf.scan, shelf.folders())] == [1]
    assert [others for _, others in map(shelf.scan, shelf.folders())] == [1]
    assert [file.read_text() for file in foreign] == ["mine"] * 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "notes.txt" in line
    assert "blocks-2" in line


def test_however_many_foreign_files_there_are_the_line_about_them_is_short(tmp_path: Path, caplog) -> None:
    for number in range(2000):
        (tmp_path / f"{number:04}.txt").touch()
    opened(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2000 entries" in line
    assert len(line) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:100] + b"\xff" + content[101:],
        lambda content: content[:-20] + b"\xff" + content[-19:],
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_file_is_not_read(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    shelf, block = opened(tmp_path), make_block(7)
    shelf.write(block)
    file = tmp_path / "blocks-1" / block_path(block.key, block.length)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptError):
        shelf.read(block.key, block.length)


def test_swapped_files_are_not_read(tmp_path: Path) -> None:
    shelf, left, right = opened(tmp_path), make_block(7), make_block(8, DATA[::-1])
    paths = []
    for block in (left, right):
        shelf.write(block)
        paths.append(tmp_path / "blocks-1" / block_path(block.key, block.length))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    for block in (left, right):
        with pytest.raises(CorruptError):
            shelf.read(block.key, block.length)


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("call", ["open", "posix_fallocate", "write", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, call: str, number: int, data: bytes) -> None:
    shelf = opened(tmp_path, failing(call, number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        shelf.write(make_block(7, data))
    assert not isinstance(caught.value, LeftBehindError)
    assert check_directory(tmp_path, capacity_bytes=0) == {}


def test_a_temporary_file_that_cannot_be_removed_is_owned_up_to(tmp_path: Path) -> None:
    def before(name: str) -> None:
        if name in ("rename", "unlink"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(LeftBehindError):
        opened(tmp_path, FaultySystem(before)).write(make_block(7))
    assert len(list((tmp_path / "tmp").iterdir())) == 1


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
def test_a_short_write_goes_on(tmp_path: Path, data: bytes) -> None:
    class ShortWrites(FaultySystem):
        def __getattr__(self, name: str) -> object:
            if name == "write":
                return lambda fd, data: os.write(fd, data[: max(1, len(data) // 2)])
            return super().__getattr__(name)

    block = make_block(7, data)
    opened(tmp_path, ShortWrites(lambda name: None)).write(block)
    cost_bytes = -(-file_bytes(block.length) // 4096) * 4096
    assert check_directory(tmp_path, capacity_bytes=cost_bytes) == {block.key: data}


class SystemWithoutDirectWrites(FaultySystem):
    """Refuses each write past the page cache, or each but the first, as file systems do that cannot."""

    def __init__(self, taken: int) -> None:
        super().__init__(lambda name: None)
        self.refused = 0
        self._taken = taken

    def write(self, fd: int, data: memoryview) -> int:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return os.write(fd, data)
        if self._taken:
            self._taken -= 1
            return os.write(fd, data[:65536])
        self.refused += 1
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("taken", [0, 1])
def test_what_a_file_system_does_not_take_past_its_page_cache_it_gets_through_it(tmp_path: Path, taken: int) -> None:
    block, system = make_block(7, LARGE), SystemWithoutDirectWrites(taken)
    opened(tmp_path, system).write(block)
    cost_bytes = -(-file_bytes(block.length) // 4096) * 4096
    assert check_directory(tmp_path, capacity_bytes=cost_bytes) == {block.key: LARGE}
    assert system.refused == 1


@pytest.mark.parametrize("medium", ["ram", "nvme", "hdd"])
def test_a_large_block_is_the_same_on_every_medium(tmp_path: Path, medium: Medium) -> None:
    shelf, block = opened(tmp_path, medium=medium), make_block(7, LARGE)
    shelf.write(block)
    assert shelf.read(block.key, block.length).map() == LARGE


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
def test_a_kill_before_any_system_call_of_a_write_leaves_whole_blocks_only(tmp_path: Path, data: bytes) -> None:
    written, new = make_block(1, data), make_block(2, data)
    outcomes = set()
    for victim_call in range(50):
        path = tmp_path / str(victim_call)
        pid = os.fork()
        if pid == 0:
            try:
                calls = iter(range(10**6))
                shelf = opened(path)
                shelf.write(written)
                shelf.close()

                def before(name: str, calls=calls, last=victim_call) -> None:
                    if next(calls) == last:
                        os.kill(os.getpid(), signal.SIGKILL)

                opened(path, FaultySystem(before)).write(new)
            finally:
                os._exit(0)
        killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
        shelf = opened(path)
        assert list((path / "tmp").iterdir()) == []
        blocks = check_directory(path, capacity_bytes=10**7)
        assert set(blocks) >= {written.key}
        assert set(blocks.values()) == {data}
        outcomes.add((killed, len(blocks)))
        shelf.close()
        if not killed:
            break
    assert outcomes == {(True, 1), (False, 2)}

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from connectors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    Span,
    TransientError,
    _posix,
    open_store,
    run_sync,
    split_uri,
)
from connectors.testing.stores import StoreTests


class TestPosixStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(tmp_path)

    def peek(self, store, key):
        path = _path(store, key)
        return path.read_bytes() if path.is_file() else None

    def poke(self, store, key, data):
        path = _path(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _path(store, key) -> Path:
    return Path("/" + split_uri(store.url)[1]) / key


@pytest.fixture
async def store(tmp_path):
    opened = open_store(tmp_path, threads=2)
    yield opened
    await opened.close()


async def _keys(store):
    return [meta.key async for meta in store.list()]


def _names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


async def test_a_version_is_inode_time_and_size(store, tmp_path):
    meta = await store.put("key", b"abc")
    status = (tmp_path / "key").stat()
    assert meta.version == f"{status.st_ino}-{status.st_mtime_ns}-3"


async def test_a_file_written_in_place_during_the_read_is_a_changed_error(store, tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_bytes(b"old old old")

    def pread(descriptor, length, offset):
        path.write_bytes(b"new new new!")
        return os.pread(descriptor, length, offset)

    monkeypatch.setattr(_posix, "os", _Patched(os, pread=pread))
    with pytest.raises(ChangedError, match="key"):
        await store.get("key")


async def test_a_file_replaced_during_the_read_gives_the_old_bytes_whole(store, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"old old old")
    version = (await store.head("key")).version

    def pread(descriptor, length, offset):
        (tmp_path / "other").write_bytes(b"new new new!")
        (tmp_path / "other").replace(tmp_path / "key")
        return os.pread(descriptor, length, offset)

    monkeypatch.setattr(_posix, "os", _Patched(os, pread=pread))
    assert await store.get("key", version=version) == b"old old old"


async def test_short_reads_are_continued(store, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"0123456789")
    monkeypatch.setattr(
        _posix, "os", _Patched(os, pread=lambda fd, length, offset: os.pread(fd, min(length, 3), offset))
    )
    assert await store.get("key") == b"0123456789"
    assert await store.get_range("key", Span(1, 7)) == b"1234567"


async def test_a_file_that_gives_fewer_bytes_than_its_size_is_transient(store, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"0123456789")
    monkeypatch.setattr(_posix, "os", _Patched(os, pread=lambda fd, length, offset: b""))
    with pytest.raises(TransientError) as raised:
        await store.get("key")
    assert raised.value.kind == ErrorKind.SHORT_BODY


class _Patched:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name):
        return getattr(self._module, name)


@pytest.mark.parametrize(
    ("code", "error", "kind"),
    [
        (errno.ENOENT, NotFoundError, ErrorKind.NOT_FOUND),
        (errno.EACCES, PermissionDeniedError, ErrorKind.PERMISSION_DENIED),
        (errno.EROFS, PermissionDeniedError, ErrorKind.PERMISSION_DENIED),
        (errno.ENOSPC, DataError, ErrorKind.NO_SPACE),
        (errno.EDQUOT, DataError, ErrorKind.NO_SPACE),
        (errno.ENAMETOOLONG, BadInputError, ErrorKind.BAD_INPUT),
        (errno.EIO, TransientError, ErrorKind.TRANSIENT),
        (errno.ESTALE, TransientError, ErrorKind.TRANSIENT),
        (errno.EMFILE, TransientError, ErrorKind.TRANSIENT),
    ],
)
async def test_an_error_of_the_system_is_one_of_ours_and_leaves_nothing(
    store, tmp_path, monkeypatch, code, error, kind
):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    (tmp_path / "key").write_bytes(b"old")
    monkeypatch.setattr(_posix, "os", _Patched(os, pread=refuse, fsync=refuse))
    for attempt in (store.get("key"), store.put("key", b"new")):
        with pytest.raises(error) as raised:
            await attempt
        assert type(raised.value) is error
        assert (raised.value.kind, raised.value.uri) == (kind, (tmp_path / "key").as_uri())
    assert _names(tmp_path) == ["key"]
    assert (tmp_path / "key").read_bytes() == b"old"


async def test_real_refusals_of_the_system(store, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for key in ("folder", "pipe", "file/below"):
        with pytest.raises(NotFoundError):
            await store.get(key)
    for attempt in (
        store.get("loop"),
        store.put("file/below", b"x"),
        store.put("folder", b"x"),
        store.put("n" * 300, b"x"),
    ):
        with pytest.raises(BadInputError):
            await attempt
    assert _names(tmp_path) == ["file", "folder", "folder/inner", "loop", "pipe"]


async def test_symbolic_links_are_followed_and_loops_end(store, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"x")
    (tmp_path / "real/up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "file").symlink_to("real/file")
    (tmp_path / "broken").symlink_to("absent")
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    assert await _keys(store) == ["file", "linked/file", "real/file"]
    assert await store.get("linked/file") == b"x"
    await store.put("file", b"replaced the link")
    assert (tmp_path / "real/file").read_bytes() == b"x"


async def test_a_file_name_that_is_no_text_is_listed_and_read(store, tmp_path):
    (tmp_path / os.fsdecode(b"\xff\xfe")).write_bytes(b"x")
    [key] = await _keys(store)
    assert await store.get(key) == b"x"


async def test_a_put_is_durable_before_it_is_visible(store, tmp_path, monkeypatch):
    steps = []

    def fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append(("sync", "folder" if os.path.isdir(name) else "file", (tmp_path / "new/key").exists()))
        os.fsync(descriptor)

    monkeypatch.setattr(_posix, "os", _Patched(os, fsync=fsync))
    await store.put("new/key", b"x")
    assert steps == [("sync", "folder", False), ("sync", "file", False), ("sync", "folder", True)]


async def test_unfinished_writes_are_no_keys(store, tmp_path):
    name = ".0123456789abcdef.dataflow-partial"
    (tmp_path / name).write_bytes(b"half")
    assert await _keys(store) == []
    with pytest.raises(BadInputError, match="unfinished"):
        await store.put(name, b"x")


KILLED = """
import os, signal, sys
from connectors import _posix, open_store, run_sync

class Killing:
    def __getattr__(self, name):
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(os, name)

_posix.os = Killing()
run_sync(open_store(sys.argv[1]).put("key", b"new"))
"""


@pytest.mark.parametrize("call", ["write", "fsync", "fstat"])
def test_a_writer_killed_before_it_published_leaves_the_old_object(tmp_path, call):
    (tmp_path / "key").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), call], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_store(tmp_path)
    assert run_sync(_all(store)) == {"key": b"old"}
    run_sync(store.close())


async def _all(store):
    return {meta.key: await store.get(meta.key) async for meta in store.list()}


async def test_a_task_cancelled_in_the_middle_of_a_write_leaves_nothing_and_no_descriptor(store, tmp_path, monkeypatch):
    writing, proceed = threading.Event(), threading.Event()

    def write(descriptor, data):
        writing.set()
        proceed.wait(30)
        return os.write(descriptor, data)

    async def chunks():
        yield b"x" * 100

    monkeypatch.setattr(_posix, "os", _Patched(os, write=write))
    before = len(os.listdir("/proc/self/fd"))
    writer = asyncio.create_task(store.put_stream("folder/key", chunks()))
    await asyncio.to_thread(writing.wait, 30)
    writer.cancel()
    asyncio.get_running_loop().call_later(0.01, proceed.set)
    with pytest.raises(asyncio.CancelledError):
        await writer
    assert _names(tmp_path) == ["folder"]
    assert len(os.listdir("/proc/self/fd")) == before


async def test_no_more_calls_run_at_once_than_threads(store, tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"x")
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)

    def pread(descriptor, length, offset):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(30)
        with lock:
            running -= 1
        return os.pread(descriptor, length, offset)

    monkeypatch.setattr(_posix, "os", _Patched(os, pread=pread))
    await asyncio.gather(*(store.get("key") for _ in range(10)))
    assert most == 2


def test_a_store_used_before_a_fork_works_in_the_child(tmp_path):
    (tmp_path / "key").write_bytes(b"x")
    store = open_store(tmp_path)
    assert run_sync(store.get("key")) == b"x"
    child = os.fork()
    if child == 0:
        os._exit(0 if run_sync(store.get("key")) == b"x" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run_sync(store.close())


async def test_a_write_that_fails_says_why_and_names_what_it_could_not_remove(store, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_posix.os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    for write in (store.put("key", b"x"), store.put_stream("key", _chunks(b"x"))):
        with pytest.raises(TransientError, match="key: Input/output error") as raised:
            await write
        error = raised.value
        notes = [note for each in (error, error.__cause__) for note in getattr(each, "__notes__", ())]
        assert any("dataflow-partial may be left behind" in note for note in notes)


async def _chunks(*chunks):
    for chunk in chunks:
        yield chunk

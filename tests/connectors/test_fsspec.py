import errno
import itertools
import logging
import traceback
from tempfile import NamedTemporaryFile

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from connectors import (
    BadInputError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    TransientError,
    _fsspec,
    open_store,
    run_sync,
)
from connectors._fsspec import FsspecStore, knows_scheme
from connectors.testing.stores import StoreTests

NUMBERS = itertools.count()


class TestWhereFilesCanBeRenamed(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        self.folder = tmp_path
        return FsspecStore("local://files", LocalFileSystem(skip_instance_cache=True), str(tmp_path))

    def peek(self, store, key):
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def poke(self, store, key, data):
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def test_a_write_that_fails_leaves_no_hidden_file(self, store, monkeypatch):
        def fail(first, second):
            raise OSError("the disk is gone")

        monkeypatch.setattr(store._filesystem, "mv", fail)
        with pytest.raises(TransientError):
            await store.put("key", b"x")
        assert list(self.folder.iterdir()) == []

    async def test_a_write_that_fails_says_why_also_where_its_hidden_file_cannot_be_removed(self, store, monkeypatch):
        def refuse(*_args):
            raise PermissionError("secret words")

        def fail(*_args):
            raise ConnectionError("the server is gone")

        monkeypatch.setattr(store._filesystem, "mv", refuse)
        monkeypatch.setattr(store._filesystem, "rm_file", fail)
        with pytest.raises(PermissionDeniedError, match="refuses access to local://files/key") as raised:
            await store.put("key", b"x")
        (left,) = self.folder.iterdir()
        assert raised.value.__notes__ == [
            f"{left} may be left behind, because it could not be removed: ConnectionError"
        ]

    @pytest.mark.parametrize("call", ["write", "flush"])
    async def test_a_full_temporary_folder_is_named(self, store, monkeypatch, call):
        def fill(*_args):
            raise OSError(errno.ENOSPC, "No space left on device")

        def full(**options):
            file = NamedTemporaryFile(**options)  # noqa: SIM115
            setattr(file, call, fill)
            return file

        async def chunks():
            yield b"x"

        monkeypatch.setattr(_fsspec, "NamedTemporaryFile", full)
        monkeypatch.setattr(_fsspec, "gettempdir", lambda: "/some/folder")
        with pytest.raises(DataError, match="is collected in /some/folder before") as raised:
            await store.put_stream("key", chunks())
        assert raised.value.kind == ErrorKind.NO_SPACE
        assert list(self.folder.iterdir()) == []

    async def test_what_became_of_the_temporary_file_does_not_hide_what_became_of_the_object(self, store, monkeypatch):
        def open_file(**options):
            file = NamedTemporaryFile(**options)  # noqa: SIM115
            close = file.close

            def close_and_fail():
                close()
                raise OSError(errno.EIO, "Input/output error")

            file.close = close_and_fail
            return file

        async def chunks():
            yield b"x"

        monkeypatch.setattr(_fsspec, "NamedTemporaryFile", open_file)
        await store.put_stream("key", chunks())
        assert self.peek(store, "key") == b"x"


class TestWhereNothingCanBeRenamed(StoreTests):
    @pytest.fixture
    def store(self):
        self.filesystem = MemoryFileSystem(skip_instance_cache=True)
        self.root = f"/root-{next(NUMBERS)}"
        yield FsspecStore("foreign://objects", self.filesystem, self.root)
        if self.filesystem.exists(self.root):
            self.filesystem.rm(self.root, recursive=True)

    def peek(self, store, key):
        path = f"{self.root}/{key}"
        return self.filesystem.cat_file(path) if self.filesystem.isfile(path) else None

    def poke(self, store, key, data):
        self.filesystem.pipe_file(f"{self.root}/{key}", data)


class _Failing(AbstractFileSystem):
    """A file system whose every answer is an exception."""

    def __init__(self, error):
        super().__init__(skip_instance_cache=True)
        self.error = error

    def info(self, path, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected", "kind"),
    [
        (FileNotFoundError("x"), NotFoundError, ErrorKind.NOT_FOUND),
        (IsADirectoryError("x"), NotFoundError, ErrorKind.NOT_FOUND),
        (NotADirectoryError("x"), BadInputError, ErrorKind.BAD_INPUT),
        (PermissionError("x"), PermissionDeniedError, ErrorKind.PERMISSION_DENIED),
        (TimeoutError("x"), TransientError, ErrorKind.TIMEOUT),
        (ConnectionResetError("x"), TransientError, ErrorKind.TRANSIENT),
        (RuntimeError("x"), DataError, ErrorKind.UNKNOWN),
    ],
)
async def test_a_foreign_error_is_one_of_ours_and_tells_no_secret(error, expected, kind, caplog):
    caplog.set_level(logging.DEBUG)
    error.args = ("sftp://me:hunter2@host",)
    store = FsspecStore("sftp://host", _Failing(error), "/data")
    with pytest.raises(expected) as raised:
        await store.get("key")
    assert type(raised.value) is expected
    assert (raised.value.kind, raised.value.uri) == (kind, "sftp://host/key")
    assert "hunter2" not in "".join(traceback.format_exception(raised.value)) + caplog.text
    await store.close()


def test_a_protocol_whose_package_is_missing_says_what_to_install():
    assert knows_scheme("sftp")
    with pytest.raises(BadInputError, match="paramiko"):
        open_store("sftp://host/folder")


def test_a_url_of_a_foreign_scheme_is_opened_by_its_file_system():
    # fsspec's local file system ignores the host and begins at the root.
    store = open_store("local://tmp")
    assert isinstance(store, FsspecStore)
    assert store.url == "local://tmp"
    with pytest.raises(NotFoundError, match="local://tmp/absent"):
        run_sync(store.get("absent"))
    run_sync(store.close())

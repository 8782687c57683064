import itertools
import logging
import traceback

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

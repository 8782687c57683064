import importlib.metadata
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from connectors import BadInputError, open_store, run_sync
from connectors._fsspec import FsspecStore
from connectors._memory import MemoryStore
from connectors._object import ObjectStore
from connectors._posix import PosixStore
from connectors.wrappers import PrefixStore


@pytest.mark.parametrize(
    ("url", "options", "store"),
    [
        ("/", {}, PosixStore),
        ("memory://name", {}, MemoryStore),
        ("s3://bucket", {}, ObjectStore),
        ("gs://bucket", {"skip_signature": True}, ObjectStore),
        ("az://container", {"account_name": "account"}, ObjectStore),
        ("http://127.0.0.1:1", {}, ObjectStore),
        ("https://127.0.0.1:1", {}, ObjectStore),
        ("local://any", {}, FsspecStore),
    ],
)
def test_the_scheme_chooses_the_store(url, options, store, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    opened = open_store(url, **options)
    assert type(opened) is store
    assert opened.url == ("file:///" if url == "/" else url)


def test_a_url_with_a_folder_opens_that_folder(tmp_path):
    store = open_store(tmp_path)
    assert isinstance(store, PrefixStore)
    assert store.url == tmp_path.as_uri()
    run_sync(store.put("a b", b"x"))
    assert (tmp_path / "a b").read_bytes() == b"x"
    run_sync(store.close())


def test_a_relative_path_opens_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store(Path("set")).url == (tmp_path / "set").as_uri()


def test_an_unknown_scheme_lists_those_that_are_known():
    with pytest.raises(BadInputError, match=r"nowhere://.*az, file, gs, http, https, memory, s3.*fsspec"):
        open_store("nowhere://x")


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[fsspec\]"):
        open_store("sftp://host/x")


@pytest.mark.parametrize(("url", "options"), [("file:///x", {"thread": 3}), ("memory://x", {"secret": "hunter2"})])
def test_an_option_of_another_store_is_refused_by_name(url, options):
    with pytest.raises(BadInputError, match=next(iter(options))) as raised:
        open_store(url, **options)
    assert "hunter2" not in str(raised.value)


def test_an_option_reaches_the_store():
    with pytest.raises(BadInputError, match="threads must be >= 1, got 0"):
        open_store("file:///x", threads=0)


class TestPlugins:
    def _install(self, monkeypatch, value):
        plugin = EntryPoint("plugged", value, "dataflow.stores")
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints([plugin]).select(group=group))

    def test_an_entry_point_serves_its_scheme(self, monkeypatch):
        self._install(monkeypatch, "connectors._memory:MemoryStore")
        assert open_store("plugged://x/folder").url == "plugged://x/folder"
        with pytest.raises(BadInputError, match="plugged, s3"):
            open_store("nowhere://x")

    @pytest.mark.parametrize("value", ["absent_module:Store", "connectors._memory:Absent"])
    def test_an_entry_point_that_does_not_load_is_named(self, monkeypatch, value):
        self._install(monkeypatch, value)
        with pytest.raises(BadInputError, match=f"plugged = {value}"):
            open_store("plugged://x")

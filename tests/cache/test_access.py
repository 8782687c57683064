import contextlib
import logging
import os
import pickle

import pytest
from crc32c import crc32c

from cache import access
from cache.access import BlockReader, open_reader
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import ServerGoneError
from cache.direct import DirectReader
from cache.fallback import FallbackReader
from cache.in_place import InPlaceReader
from cache.keys import BlockRef
from cache.rights import AccessConfig
from cache.server import ServerLimits
from cache.testing import running_server
from connectors.bridge import run_sync
from connectors.errors import BadInputError, ChangedError, DataError, NotFoundError, PermissionDeniedError
from connectors.objects import normalise_url
from connectors.registry import open_store

RAM = CacheConfig((TierConfig("ram", 1 << 20),))


@pytest.fixture(autouse=True)
def no_daemon(monkeypatch, tmp_path):
    """Whatever runs on this machine is not found."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("cache.address.SYSTEM_ADDRESS", str(tmp_path / "system.sock"))


@pytest.fixture
def shared_disk(monkeypatch):
    """Every file system counts as shared."""
    monkeypatch.setattr(access, "is_local", lambda path: False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(5000))
    return path


def ref_of(path):
    return BlockRef(normalise_url(path), "digest", 100, 1000, crc32c(path.read_bytes()[100:1100]))


def rungs(reader):
    return [type(rung) for _, rung in reader._rungs] if isinstance(reader, FallbackReader) else [type(reader)]


@pytest.mark.parametrize("cache", ["auto", None])
def test_a_local_disk_is_read_in_place(path, cache):
    assert rungs(open_reader(path, cache)) == [InPlaceReader]


@pytest.mark.parametrize("cache", ["auto", None])
def test_a_shared_file_system_is_read_through_a_server_and_in_place_at_worst(path, cache, shared_disk):
    assert rungs(open_reader(path, cache)) == [CacheClient, InPlaceReader]


def test_an_object_store_is_read_through_a_server():
    for cache in ("auto", None, RAM):
        assert rungs(open_reader("s3://bucket/set", cache)) == [CacheClient]
    assert rungs(open_reader("s3://bucket/set", "/run/some.sock")) == [CacheClient, CacheClient]


@pytest.mark.parametrize("runtime", ["relative", "/" + "x" * 108], ids=["relative", "too long for a socket"])
def test_a_runtime_directory_where_no_daemon_can_listen_keeps_nobody_from_reading(monkeypatch, runtime):
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert rungs(open_reader("s3://bucket/set")) == [CacheClient]


def test_a_configuration_is_used_for_local_files_too(path):
    with contextlib.closing(open_reader(path, RAM)) as reader:
        for source in ("origin", "ram"):
            [block] = reader.read_blocks([ref_of(path)])
            assert (bytes(block.view), block.source) == (path.read_bytes()[100:1100], source)
        assert isinstance(reader, BlockReader)


def test_readers_that_nobody_configured_share_one_server_and_its_limit():
    one, two = open_reader("s3://bucket/a"), open_reader("s3://bucket/b")
    assert one.address == two.address
    assert open_reader("s3://bucket/a", RAM).address != open_reader("s3://bucket/a", RAM).address


def test_a_daemon_that_answers_at_the_default_address_is_found(path, shared_disk, tmp_path):
    address = str(tmp_path / "run" / "dataflow" / "cache.sock")
    with running_server(RAM, address=address), contextlib.closing(open_reader(path)) as reader:
        assert rungs(reader) == [CacheClient, CacheClient, InPlaceReader]
        assert reader.stats()["server"]["pid"] == os.getpid()


def test_a_daemon_that_refuses_this_user_is_passed_over_unless_it_was_named(
    path, shared_disk, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("cache.server.peer", lambda connection: (os.getpid(), 4_000_001))
    address = str(tmp_path / "run" / "dataflow" / "cache.sock")
    with running_server(RAM, address=address, access=AccessConfig(allowed_uids=())):
        with contextlib.closing(open_reader(path)) as reader:
            assert rungs(reader) == [CacheClient, InPlaceReader]
        assert "user 4000001 may not use this cache server" in caplog.text
        with contextlib.closing(open_reader(path, address)) as reader, pytest.raises(PermissionDeniedError):
            reader.read_blocks([ref_of(path)])


def test_a_daemon_of_another_release_is_passed_over_unless_it_was_named(path, shared_disk, tmp_path, monkeypatch):
    address = str(tmp_path / "run" / "dataflow" / "cache.sock")
    with running_server(RAM, address=address):
        monkeypatch.setattr("cache.connection.PROTOCOL_VERSION", 2)
        with contextlib.closing(open_reader(path)) as reader:
            assert rungs(reader) == [CacheClient, InPlaceReader]
        with contextlib.closing(open_reader(path, address)) as reader, pytest.raises(DataError, match="same release"):
            reader.read_blocks([ref_of(path)])


def test_a_successor_of_another_release_is_a_warning_for_whom_the_daemon_served(path, tmp_path, monkeypatch, caplog):
    address = str(tmp_path / "run" / "cache.sock")
    with contextlib.closing(open_reader(path, address)) as reader:
        with running_server(RAM, address=address):
            before = reader.read_blocks([ref_of(path)])
        with running_server(RAM, address=address):
            monkeypatch.setattr("cache.session.PROTOCOL_VERSION", 2)
            worker = pickle.loads(pickle.dumps(reader))
            after = [worker.read_blocks([ref_of(path)]), reader.read_blocks([ref_of(path)])]
            worker.close()
            with pytest.raises(ServerGoneError, match="same release"):
                reader._rungs[0][1].greet(timeout_s=30)
    assert [bytes(blocks[0].view) for blocks in after] == [bytes(before[0].view)] * 2
    assert "speaks protocol 2, the client 1" in caplog.text


def test_the_environment_names_the_daemon(path, shared_disk, monkeypatch):
    with running_server(RAM) as running:
        monkeypatch.setenv("DATAFLOW_CACHE", running.address)
        with contextlib.closing(open_reader(path)) as reader:
            assert reader.read_blocks([ref_of(path)])[0].source == "origin"
            assert reader.stats()["server"]["requests"] == 2


def test_a_daemon_without_room_for_a_connection_is_a_warning_and_a_private_server(path, caplog):
    with (
        running_server(RAM, limits=ServerLimits(max_connections=1)) as running,
        contextlib.closing(CacheClient(running.address)) as first,
        contextlib.closing(open_reader(path, running.address)) as reader,
    ):
        first.stats()
        assert reader.read_blocks([ref_of(path)])[0].source == "origin"
        assert reader.stats()["server"]["pid"] != os.getpid()
    assert "has its 1 connections already" in caplog.text


def test_a_private_server_without_room_is_not_started_again(monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("there is a server")

    monkeypatch.setattr("cache.client.start_server", start)
    with (
        running_server(RAM, limits=ServerLimits(max_connections=1)) as running,
        contextlib.closing(CacheClient(running.address)) as first,
    ):
        first.stats()
        with pytest.raises(ServerGoneError, match="connections already"):
            CacheClient(running.address, private=RAM).stats()


def test_a_named_daemon_that_is_dead_is_a_warning_and_a_private_server(path, caplog):
    with contextlib.closing(open_reader(path, "@nobody-has-this-address")) as reader:
        for source in ("origin", "ram"):
            assert reader.read_blocks([ref_of(path)])[0].source == source
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "@nobody-has-this-address" in warnings[0]
    assert "1024 MiB" in warnings[0]


def test_where_no_server_can_be_started_files_are_read_in_place_with_a_warning(path, caplog, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with contextlib.closing(open_reader(path, RAM)) as reader:
        assert reader.read_blocks([ref_of(path)])[0].source == "in_place"
        assert reader.read_blocks([ref_of(path)])[0].source == "in_place"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "going on with reading in place" in caplog.text


def test_memory_is_read_in_this_process():
    store = open_store("memory://access")
    data = os.urandom(3000)
    meta = run_sync(store.put("set/a", data))
    reader = open_reader("memory://access/set")
    assert rungs(reader) == [DirectReader]
    refs = [
        BlockRef("memory://access/set/a", meta.version, 10, 100),
        BlockRef("memory://access/set/a", "digest", 0, 50, crc32c(data[:50])),
        BlockRef("memory://access/set/a", meta.version, 2000, 1000),
    ]
    blocks = reader.read_blocks(refs)
    assert [bytes(block.view) for block in blocks] == [data[10:110], data[:50], data[2000:]]
    assert {block.source for block in blocks} == {"direct"}
    assert all(block.view.readonly for block in blocks)
    assert reader.read_blocks([]) == []
    assert reader.read_object("memory://access/set/a").data == data
    assert [meta.key for meta in reader.list_objects("memory://access/set")] == ["a"]
    assert pickle.loads(pickle.dumps(reader)).read_object("memory://access/set/a").version == meta.version
    with pytest.raises(ChangedError, match="offset 0"):
        reader.read_blocks([BlockRef("memory://access/set/a", "digest", 0, 50, 1)])
    with pytest.raises(NotFoundError):
        reader.read_object("memory://access/absent")
    with pytest.raises(BadInputError, match="not in memory://access"):
        reader.read_object("memory://elsewhere/a")
    assert reader.stats()["origin"]["bytes"] == 1150
    reader.close()


def test_what_cannot_be_is_refused_with_a_reason(path):
    with pytest.raises(BadInputError, match="lives in this process"):
        open_reader("memory://x", RAM)
    with pytest.raises(BadInputError, match="got 5"):
        open_reader(path, 5)
    with pytest.raises(BadInputError, match="absolute path or @name"):
        open_reader("s3://bucket", "cache.sock").stats()

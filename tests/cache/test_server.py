import asyncio
import errno
import os
import queue
import socket
import threading
from pathlib import Path

import pytest
from crc32c import crc32c

from cache import frames
from cache.address import socket_address
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection, ServerGoneError
from cache.frames import Blocks, Failed, Hello, Inline, Object, Passed, ReadBlocks, Waiting, encode, replies
from cache.keys import BlockRef
from cache.server import ServerLimits
from cache.session import pack_messages, slice_refs
from cache.testing import running_server
from connectors.errors import BadInputError, DataError, ErrorKind, NotFoundError, PermissionDeniedError
from connectors.objects import normalise_url
from connectors.registry import open_store

RAM = CacheConfig((TierConfig("ram", 64 << 20),))


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(16 << 20))
    return path


def refs_of(path: Path, length: int, count: int) -> list[BlockRef]:
    data = path.read_bytes()
    return [
        BlockRef(normalise_url(path), "digest", place * length, length, crc32c(data[place * length :][:length]))
        for place in range(count)
    ]


def greeted(address: str) -> tuple[socket.socket, frames.FrameReader]:
    """A client that does as it likes after the greeting."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(socket_address(address))
    connection.sendall(encode(Hello(frames.PROTOCOL_VERSION)))
    reader = replies()
    while not list(reader.feed(connection.recv(65536))):
        pass
    return connection, reader


def received(connection: socket.socket, reader: frames.FrameReader) -> list[frames.Reply]:
    """Everything until the server hangs up."""
    found = []
    while data := connection.recv(65536):
        found += reader.feed(data)
    return found


class GatedStore:
    """A file store whose range reads wait until the gate opens."""

    def __init__(self, url: str) -> None:
        self._store = open_store(url)
        self._gate = asyncio.Event()
        self._loops: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()
        self.url = self._store.url

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def get_range(self, key, span, *, version=None):
        self._loops.put(asyncio.get_running_loop())
        await self._gate.wait()
        return await self._store.get_range(key, span, version=version)

    async def get_ranges(self, key, spans, *, version=None):
        return [await self.get_range(key, span, version=version) for span in spans]

    def wait_for_reader(self) -> None:
        self.loop = self._loops.get()

    def open_gate(self) -> None:
        self.loop.call_soon_threadsafe(self._gate.set)


class Gates:
    """Opens gated stores; the test steers the only one."""

    def __init__(self) -> None:
        self._stores: queue.SimpleQueue[GatedStore] = queue.SimpleQueue()

    def __call__(self, url: str) -> GatedStore:
        store = GatedStore(url)
        self._stores.put(store)
        return store

    def reached(self) -> GatedStore:
        """Wait until the server reads."""
        store = self._stores.get()
        store.wait_for_reader()
        return store


def until(condition) -> None:
    """Wait for what must come; the test's own time limit ends a wait that does not."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def test_small_blocks_come_inline_and_large_ones_as_descriptors(content):
    small, large = refs_of(content, frames.INLINE_BYTES, 1), refs_of(content, frames.INLINE_BYTES + 1, 1)
    with running_server(RAM) as running:
        connection = Connection(running.address, timeout_s=10)
        [(reply, descriptors)] = connection.ask(ReadBlocks(small + large))
        assert [type(item) for item in reply.items] == [Inline, Passed]
        assert len(descriptors) == 1
        connection.close()


def test_a_large_request_is_answered_in_order_with_few_descriptors_a_message(content):
    refs = refs_of(content, 70_000, 150)
    with running_server(RAM) as running:
        connection = Connection(running.address, timeout_s=10)
        answer = list(connection.ask(ReadBlocks(refs)))
        assert [len(descriptors) for _, descriptors in answer] == [64, 64, 22]
        assert [reply.last for reply, _ in answer] == [False, False, True]
        data = content.read_bytes()
        fds = [descriptor.fd for _, descriptors in answer for descriptor in descriptors]
        assert [os.pread(fd, 70_000, 0) for fd in fds] == [data[ref.offset :][:70_000] for ref in refs]
        del answer
        connection.close()


def test_slices_are_within_both_limits_and_leave_nothing_out():
    refs = [BlockRef("u", "v", 0, length) for length in (5, 5, 5, 50, 1, 1, 1, 1)]
    cut = [[ref.length for ref in part] for part in slice_refs(refs, max_blocks=3, max_bytes=11)]
    assert cut == [[5, 5], [5], [50], [1, 1, 1], [1]]
    assert list(slice_refs([], max_blocks=3, max_bytes=11)) == []


def test_many_inline_blocks_are_cut_into_messages_below_the_limit(content):
    refs = refs_of(content, 60_000, 200)
    with running_server(RAM) as running:
        connection = Connection(running.address, timeout_s=10)
        answer = [reply for reply, _ in connection.ask(ReadBlocks(refs))]
        assert sum(len(reply.items) for reply in answer) == 200
        assert max(sum(len(item.data) for item in reply.items) for reply in answer) < 1_200_000
        connection.close()
    assert list(pack_messages([])) == []


def test_one_bad_block_costs_only_itself(content):
    good = refs_of(content, 1000, 2)
    missing = BlockRef(normalise_url(content.with_name("absent")), "v", 0, 10)
    with running_server() as running:
        connection = Connection(running.address, timeout_s=10)
        [(reply, _)] = connection.ask(ReadBlocks([good[0], missing, good[1]]))
        assert [type(item) for item in reply.items] == [Inline, Failed, Inline]
        assert (reply.items[1].kind, reply.items[1].uri) == ("not_found", missing.uri)
        connection.close()


@pytest.mark.parametrize("garbage", [b"\xff" * 100, b"\x01\x00\x00\x00\xc1", encode(frames.Stats())])
def test_garbage_is_answered_with_a_protocol_error_and_a_closed_connection(garbage):
    with running_server() as running:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(socket_address(running.address))
        connection.sendall(garbage)
        [reply] = received(connection, replies())
        assert reply.kind == ErrorKind.PROTOCOL
        connection.close()
        client = CacheClient(running.address)
        assert client.stats()["origin"]["requests"] == 0
        client.close()


def test_another_protocol_version_is_refused_by_name():
    with running_server() as running:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(socket_address(running.address))
        connection.sendall(encode(Hello(99)))
        [reply] = received(connection, replies())
        assert "99" in reply.message
        connection.close()


def test_another_user_is_refused(monkeypatch):
    with running_server() as running:
        monkeypatch.setattr("cache.server.peer", lambda connection: (1, 54321))
        client = CacheClient(running.address)
        with pytest.raises(PermissionDeniedError, match="54321"):
            client.stats()


def test_more_connections_than_allowed_are_refused_and_room_is_found_again():
    with running_server(limits=ServerLimits(max_connections=1)) as running:
        first = Connection(running.address, timeout_s=10)
        with pytest.raises(DataError, match="1 connections"):
            Connection(running.address, timeout_s=10)
        first.close()
        until(lambda: not running.server._sessions)
        Connection(running.address, timeout_s=10).close()


def test_a_client_that_does_not_read_waits_alone_and_is_hung_up_on(content):
    refs = refs_of(content, 60_000, 200)
    with running_server(RAM, limits=ServerLimits(write_timeout_s=0.3)) as running:
        stalled, reader = greeted(running.address)
        stalled.sendall(encode(ReadBlocks(refs)))
        client = CacheClient(running.address)
        assert len(client.read_blocks(refs)) == 200
        until(lambda: len(running.server._sessions) == 1)
        answer = received(stalled, reader)
        assert sum(len(reply.items) for reply in answer) < 200
        stalled.close()
        client.close()


def test_a_waiting_client_hears_that_the_server_lives(content):
    [ref] = refs_of(content, 1000, 1)
    gates = Gates()
    with running_server(limits=ServerLimits(heartbeat_s=0.02), store_opener=gates) as running:
        connection, reader = greeted(running.address)
        connection.sendall(encode(ReadBlocks([ref])))
        store, heard = gates.reached(), []
        while len(heard) < 3:
            heard += reader.feed(connection.recv(65536))
        assert heard == [Waiting()] * len(heard)
        store.open_gate()
        while not isinstance(heard[-1], Blocks):
            heard += reader.feed(connection.recv(65536))
        connection.close()


def test_a_client_that_dies_while_it_waits_is_noticed(content):
    [ref] = refs_of(content, 1000, 1)
    gates = Gates()
    with running_server(limits=ServerLimits(heartbeat_s=0.02), store_opener=gates) as running:
        connection, _ = greeted(running.address)
        connection.sendall(encode(ReadBlocks([ref])))
        gates.reached()
        connection.close()
        until(lambda: not running.server._sessions)


def test_shutdown_answers_what_is_under_way_and_hangs_up_on_the_idle(content):
    [ref] = refs_of(content, 1000, 1)
    gates = Gates()
    with running_server(store_opener=gates) as running:
        idle, _ = greeted(running.address)
        busy, reader = greeted(running.address)
        busy.sendall(encode(ReadBlocks([ref])))
        store = gates.reached()
        running.stop()
        assert idle.recv(1) == b""
        store.open_gate()
        [answer] = received(busy, reader)
        assert answer.items == [Inline("origin", content.read_bytes()[:1000])]
        idle.close()
        busy.close()


def test_shutdown_does_not_wait_for_a_store_that_does_not_open(content):
    [ref] = refs_of(content, 1000, 1)
    asked, answers = threading.Event(), threading.Event()

    def open_silent(root):
        asked.set()
        answers.wait()

    with running_server(limits=ServerLimits(drain_s=0.05), store_opener=open_silent) as running:
        busy, _ = greeted(running.address)
        busy.sendall(encode(ReadBlocks([ref])))
        asked.wait()
    answers.set()
    busy.close()


def test_shutdown_does_not_wait_for_ever(content):
    [ref] = refs_of(content, 1000, 1)
    gates = Gates()
    with running_server(limits=ServerLimits(drain_s=0.05), store_opener=gates) as running:
        busy, reader = greeted(running.address)
        busy.sendall(encode(ReadBlocks([ref])))
        gates.reached()
        running.stop()
        assert received(busy, reader) == []
        busy.close()
    with pytest.raises(ServerGoneError):
        Connection(running.address, timeout_s=10)


def test_objects_of_any_size_come_whole(tmp_path):
    with running_server() as running:
        client = CacheClient(running.address)
        for size in (0, 1, frames.INLINE_BYTES, frames.INLINE_BYTES + 1, 3 << 20):
            path = tmp_path / str(size)
            path.write_bytes(os.urandom(size))
            assert client.read_object(normalise_url(path)).data == path.read_bytes()
        with pytest.raises(NotFoundError):
            client.read_object(normalise_url(tmp_path / "absent"))
        client.close()


def test_a_listing_of_many_pages_is_complete(tmp_path):
    for number in range(2100):
        (tmp_path / f"{number:05}").touch()
    with running_server() as running:
        client = CacheClient(running.address)
        listed = client.list_objects(normalise_url(tmp_path))
        assert [meta.key for meta in listed] == [f"{number:05}" for number in range(2100)]
        assert client.list_objects(normalise_url(tmp_path / "absent")) == []
        assert client.head(normalise_url(tmp_path / "00000")).size_bytes == 0
        client.close()


def test_an_unknown_failure_is_told_and_the_server_goes_on(tmp_path, caplog):
    with running_server() as running:
        running.server.engine.head = None
        client = CacheClient(running.address)
        with pytest.raises(DataError, match="NoneType"):
            client.head(normalise_url(tmp_path))
        assert client.stats()["server"]["connections"] == 1
        client.close()
    assert "unknown way" in caplog.text


def test_a_private_server_ends_with_its_last_connection():
    with running_server(grace_s=60) as running:
        first, second = (Connection(running.address, timeout_s=10) for _ in range(2))
        first.close()
        until(lambda: len(running.server._sessions) == 1)
        assert not running.server.stopping
        second.close()
        until(lambda: running.server.stopping)


def test_a_private_server_that_nobody_uses_ends():
    with running_server(grace_s=0.01) as running:
        until(lambda: running.server.stopping)


def test_an_object_in_a_descriptor_has_its_size(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    with running_server() as running:
        connection = Connection(running.address, timeout_s=10)
        [(reply, [descriptor])] = connection.ask(frames.ReadObject(normalise_url(tmp_path / "big")))
        assert isinstance(reply, Object)
        assert (reply.size_bytes, os.fstat(descriptor.fd).st_size) == (100_000, 100_000)
        connection.close()


def test_an_object_for_which_no_file_is_left_is_an_error_and_the_connection_goes_on(tmp_path, monkeypatch):
    def seal(key, data):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("cache.session.seal_block", seal)
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    with running_server() as running:
        connection = Connection(running.address, timeout_s=10)
        reply, _ = connection.ask_once(frames.ReadObject(normalise_url(tmp_path / "big")))
        assert isinstance(reply, Failed)
        assert (reply.kind, "Too many open files" in reply.message) == ("transient", True)
        assert isinstance(connection.ask_once(frames.Stats())[0], frames.Statistics)
        connection.close()


def test_limits_are_checked():
    with pytest.raises(BadInputError, match="slice_bytes must be > 0, got 0"):
        ServerLimits(slice_bytes=0)

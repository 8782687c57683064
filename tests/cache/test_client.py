import array
import contextlib
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import threading
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from cache import questions
from cache.address import listen, unused_address
from cache.client import CacheClient, ClientOptions
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection, ServerGoneError
from cache.frames import (
    MAX_BLOCKS,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    Blocks,
    Done,
    Failed,
    Hello,
    Inline,
    Object,
    Passed,
    ReadBlocks,
    Waiting,
    Welcome,
    encode,
    requests,
)
from cache.keys import BlockRef
from cache.questions import cut_batches
from cache.testing import running_server, send_blocks
from connectors.errors import BadInputError, ChangedError, CorruptError, DataError, ErrorKind, NotFoundError
from connectors.objects import normalise_url

RAM = CacheConfig((TierConfig("ram", 64 << 20),))
LARGE_BYTES = 512 * 1024
SIZES = (1000, 70_000, LARGE_BYTES + 1, (4 << 20) + 5)  # the last in large pages, where there are some


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(8 << 20))
    return path


def refs_of(path: Path, *lengths: int) -> list[BlockRef]:
    data, refs, offset = path.read_bytes(), [], 0
    for length in lengths:
        refs.append(BlockRef(normalise_url(path), "digest", offset, length, crc32c(data[offset : offset + length])))
        offset += length
    return refs


def expected(path: Path, refs: list[BlockRef]) -> list[bytes]:
    data = path.read_bytes()
    return [data[ref.offset : ref.offset + ref.length] for ref in refs]


def read(client: CacheClient, refs: list[BlockRef]) -> list[bytes]:
    return [bytes(block.view) for block in client.read_blocks(refs)]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_blocks() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:block")


def test_blocks_of_every_size_are_right_first_from_the_origin_then_from_the_tier(content):
    refs = refs_of(content, *SIZES)
    with running_server(RAM) as running, contextlib.closing(CacheClient(running.address)) as client:
        for source in ("origin", "ram"):
            blocks = client.read_blocks(refs)
            assert [bytes(block.view) for block in blocks] == expected(content, refs)
            assert {block.source for block in blocks} == {source}
            assert all(block.view.readonly for block in blocks)
        assert client.read_blocks([]) == []


def test_blocks_of_a_disk_are_read_and_verified(content, tmp_path):
    refs = refs_of(content, *SIZES)
    config = CacheConfig((TierConfig("disk", 64 << 20, path=str(tmp_path / "cache"), medium="nvme"),), ring_bytes=0)
    with running_server(config) as running, contextlib.closing(CacheClient(running.address)) as client:
        blocks = client.read_blocks(refs)
        while {block.source for block in blocks} != {"disk"}:  # until they have been written
            blocks = client.read_blocks(refs)
        assert [bytes(block.view) for block in blocks] == expected(content, refs)


def test_a_corrupt_block_of_a_disk_is_reported_and_fetched_again(content, tmp_path, caplog):
    refs = refs_of(content, *SIZES)
    config = CacheConfig((TierConfig("disk", 64 << 20, path=str(tmp_path / "cache"), medium="nvme"),), ring_bytes=0)
    with running_server(config) as running, contextlib.closing(CacheClient(running.address)) as client:
        while {block.source for block in client.read_blocks(refs)} != {"disk"}:
            pass
        for file in (tmp_path / "cache" / "blocks-1").glob("*/*"):
            with file.open("r+b") as opened:
                opened.seek(500)
                opened.write(b"flipped")
        before = client.stats()["origin"]["requests"]
        assert read(client, refs) == expected(content, refs)
        assert client.stats()["origin"]["requests"] > before
    assert "is bad and is fetched again" in caplog.text


def test_a_cache_that_only_has_corrupt_copies_is_an_error_after_bounded_reads(content, tmp_path, monkeypatch):
    [ref] = refs_of(content, LARGE_BYTES)
    asked = []

    def never(ref, descriptor):
        asked.append(ref)

    monkeypatch.setattr(questions, "_read_verified", never)
    monkeypatch.setattr(questions, "_map", lambda descriptor, length: never(ref, descriptor))
    options = ClientOptions(max_reads=3)
    with running_server(RAM) as running, contextlib.closing(CacheClient(running.address, options=options)) as client:
        with pytest.raises(CorruptError, match=r"every copy of .* offset 0") as caught:
            client.read_blocks([ref])
        assert caught.value.uri == ref.uri
    assert len(asked) == 3


def test_views_outlive_eviction_the_client_and_the_server(content):
    refs = refs_of(content, *SIZES)
    with running_server(CacheConfig(ring_bytes=LARGE_BYTES * 2)) as running:
        client = CacheClient(running.address)
        blocks = client.read_blocks(refs)
        client.close()
    assert [bytes(block.view) for block in blocks] == expected(content, refs)


def test_the_first_block_in_order_that_failed_is_the_error(content):
    [good] = refs_of(content, 1000)
    changed = BlockRef(good.uri, "another digest", 0, 1000, good.crc32c ^ 1)
    missing = BlockRef(good.uri + ".absent", "v", 0, 10)
    with running_server() as running, contextlib.closing(CacheClient(running.address)) as client:
        with pytest.raises(NotFoundError) as caught:
            client.read_blocks([good, missing, changed])
        assert caught.value.uri == missing.uri
        with pytest.raises(ChangedError, match="offset 0"):
            client.read_blocks([good, changed, missing])
        assert read(client, [good]) == expected(content, [good])
        assert client.stats()["server"]["connections"] == 1


def test_no_descriptor_stays_open(content, tmp_path):
    config = CacheConfig((TierConfig("disk", 64 << 20, path=str(tmp_path / "cache"), medium="nvme"),))
    refs = refs_of(content, *([70_000] * 40), *([LARGE_BYTES] * 4))
    missing = BlockRef(normalise_url(content) + ".absent", "v", 0, 10)
    # In a server of its own process, whose descriptors are not counted here.
    with contextlib.closing(CacheClient(unused_address(), private=config)) as client:
        read(client, refs)
        before = open_files()
        for _ in range(5):
            read(client, refs)
            with pytest.raises(NotFoundError):
                client.read_blocks([*refs, missing])
        assert open_files() == before


@contextlib.contextmanager
def descriptors_left(number):
    gc.collect()
    free = os.dup(0)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_process_without_descriptors_is_told_which_limit_to_raise(content):
    refs = refs_of(content, LARGE_BYTES + 1)
    with running_server(RAM) as running:
        client = CacheClient(running.address)
        client.read_blocks(refs)
        with descriptors_left(0):
            with pytest.raises(DataError, match=r"cannot connect .* Too many open files; .*ulimit -n"):
                CacheClient(running.address).stats()
            with pytest.raises(DataError, match=r"open files to take more blocks; .*ulimit -n"):
                client.read_blocks(refs)
        assert [block.source for block in client.read_blocks(refs)] == ["ram"]
        client.close()


def test_a_private_server_outlives_what_becomes_of_its_only_client(content, monkeypatch):
    refs = refs_of(content, LARGE_BYTES + 1, LARGE_BYTES + 1)
    with contextlib.closing(CacheClient(unused_address(), private=RAM)) as client:
        read(client, refs)
        with descriptors_left(1), pytest.raises(DataError, match="open files to take more blocks"):
            client.read_blocks(refs)
        assert client._idle, "a server without a connection ends"
        assert [block.source for block in client.read_blocks(refs)] == ["ram", "ram"]
        monkeypatch.setattr(Connection, "_next", lambda connection: interrupt(monkeypatch))
        with pytest.raises(KeyboardInterrupt):
            client.read_blocks(refs)
        assert client._idle
        assert [block.source for block in client.read_blocks(refs)] == ["ram", "ram"]


def interrupt(monkeypatch):
    monkeypatch.undo()
    raise KeyboardInterrupt


def test_an_error_lets_go_of_the_blocks_that_came_with_it(content):
    refs = refs_of(content, *([LARGE_BYTES] * 4))
    missing = BlockRef(normalise_url(content) + ".absent", "v", 0, 10)
    with contextlib.closing(CacheClient(unused_address(), private=RAM)) as client:
        read(client, refs)
        before = open_files(), mapped_blocks()
        gc.disable()  # an error refers to the frames that it went through, and must not need the collector
        try:
            with pytest.raises(NotFoundError):
                client.read_blocks([*refs, missing])
            assert (open_files(), mapped_blocks()) == before
        finally:
            gc.enable()


def test_threads_share_a_client(content):
    refs = refs_of(content, *([1000, 70_000] * 20))
    right = expected(content, refs)
    with running_server(RAM) as running:
        client = CacheClient(running.address, options=ClientOptions(max_idle=2))
        found = []
        threads = [
            threading.Thread(target=lambda: found.extend([read(client, refs) for _ in range(5)])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 40
        assert all(result == right for result in found)
        assert len(client._connections) <= 2
        client.close()


def in_child(method: str, client: CacheClient, refs: list[BlockRef]) -> list[bytes]:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=send_blocks, args=(client, refs, there))
    child.start()
    there.close()
    found = [here.recv_bytes() for _ in refs]
    child.join()
    assert child.exitcode == 0
    return found


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_used_client_works_in_a_child_and_still_in_the_parent(content, method):
    refs = refs_of(content, *SIZES)
    with running_server(RAM) as running, contextlib.closing(CacheClient(running.address)) as client:
        right = read(client, refs)
        with client._lock:  # as if another thread were in the middle of a call
            assert in_child(method, client, refs) == right
        assert read(client, refs) == right


def test_a_pickled_copy_has_the_address_and_no_connection(content):
    refs = refs_of(content, 1000)
    with running_server() as running, contextlib.closing(CacheClient(running.address)) as client:
        read(client, refs)
        copy = pickle.loads(pickle.dumps(client))
        assert not copy._connections
        assert read(copy, refs) == expected(content, refs)
        copy.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_hangs_up_on_what_it_inherited():
    with running_server() as running:
        client = CacheClient(running.address)
        client.stats()
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)  # until the parent has looked
            os._exit(0)
        os.close(read_end)
        client.close()
        pause = threading.Event()
        while running.server._sessions:  # would never end if the child held the connection
            pause.wait(0.005)
        os.close(write_end)
        os.waitpid(child, 0)


class Puppet:
    """A server that says what the test wants: `script` is called with each request and yields frames, bytes or fds."""

    def __init__(self, script, *, welcome=True) -> None:
        self.address = unused_address()
        self.connections = 0
        self._listener = listen(self.address)
        self._script = script
        self._welcome = welcome
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                if self.connections < 0:
                    return
                self.connections += 1
                with contextlib.suppress(ConnectionError):
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        frames = requests()
        while data := connection.recv(65536):
            for request in frames.feed(data):
                if isinstance(request, Hello) and self._welcome:
                    connection.sendall(encode(Welcome(PROTOCOL_VERSION, os.getpid())))
                    continue
                for message, fds in self._script(request):
                    if message is None:
                        return
                    frame = message if isinstance(message, bytes) else encode(message)
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                    connection.sendmsg([frame], rights)

    def close(self) -> None:
        self.connections = -1
        with contextlib.suppress(ServerGoneError), socket.socket(socket.AF_UNIX) as last:
            last.connect("\0" + self.address[1:])
        self._thread.join()
        self._listener.close()


REF = BlockRef("file:///x", "v", 0, 5)
NULL = os.open(os.devnull, os.O_RDONLY)

NONSENSE = {
    "another answer": [(Done(), [])],
    "no blocks": [(Blocks([], last=True), [])],
    "too many blocks": [(Blocks([Inline("ram", b"12345")] * 2, last=True), [])],
    "too many messages": [(Blocks([Inline("ram", b"12345")], last=False), [])] * 2 + [(Blocks([], last=True), [])],
    "a short block": [(Blocks([Inline("ram", b"1234")], last=True), [])],
    "a short file": [(Blocks([Passed("ram", 4, verify=False)], last=True), [NULL])],
    "a missing descriptor": [(Blocks([Passed("ram", 5, verify=False)], last=True), [])],
    "garbage": [(b"\x02\x00\x00\x00\xc1\xc1", [])],
    "a huge frame": [(b"\xff\xff\xff\xff", [])],
}


@pytest.mark.parametrize("answer", [[], [(b"\x02\x00\x00\x00\xc1\xc1", [])]], ids=["its end", "garbage"])
def test_a_connection_that_ended_in_the_middle_of_a_call_is_not_remembered(answer):
    def script(request):
        yield from answer
        yield None, []

    puppet = Puppet(script)
    client = CacheClient(puppet.address, options=ClientOptions(max_attempts=3))
    for _ in range(2):
        with pytest.raises(DataError):
            client.stats()
    connections = puppet.connections
    puppet.close()
    assert connections > 1
    assert not client._connections


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_from_a_server_is_a_protocol_error_and_leaks_nothing(answer):
    def script(request):
        yield from answer
        yield None, []

    before = open_files()
    puppet = Puppet(script)
    client = CacheClient(puppet.address, options=ClientOptions(max_attempts=1))
    with pytest.raises(DataError) as caught:
        client.read_blocks([REF])
    assert caught.value.kind in (ErrorKind.PROTOCOL, ErrorKind.UNREACHABLE)
    del caught  # its traceback holds what was in the hands of the functions
    client.close()
    puppet.close()
    assert open_files() == before


@pytest.mark.parametrize("name", ["stats", "read_object", "head"])
def test_more_messages_than_the_one_that_is_due_are_a_protocol_error(name):
    puppet = Puppet(lambda request: iter([(Blocks([], last=False), []), (Blocks([], last=True), [])]))
    client = CacheClient(puppet.address, options=ClientOptions(max_attempts=1))
    with pytest.raises(DataError, match="more to say") as caught:
        getattr(client, name)(*([] if name == "stats" else ["file:///x"]))
    assert caught.value.kind is ErrorKind.PROTOCOL
    client.close()
    puppet.close()


def test_unasked_descriptors_are_closed():
    def script(request):
        yield Blocks([Inline("ram", b"12345")], last=True), [NULL] * 10

    before = open_files()
    puppet = Puppet(script)
    client = CacheClient(puppet.address)
    for _ in range(3):
        client.read_blocks([REF])
        client.close()
    puppet.close()
    assert open_files() == before


def test_a_server_that_dies_in_the_middle_is_asked_again_for_the_rest():
    asked = []

    def script(request):
        if not isinstance(request, ReadBlocks):
            return
        asked.append([ref.offset for ref in request.refs])
        yield Waiting(), []
        yield Blocks([Inline("ram", b"12345")], last=len(request.refs) == 1), []
        yield None, []

    puppet = Puppet(script)
    client = CacheClient(puppet.address)
    refs = [BlockRef("file:///x", "v", offset, 5) for offset in (0, 5, 10)]
    assert read(client, refs) == [b"12345"] * 3
    assert asked == [[0, 5, 10], [5, 10], [10]]
    client.close()
    puppet.close()


def test_a_server_that_always_dies_is_given_up():
    puppet = Puppet(lambda request: iter([(None, [])]))
    client = CacheClient(puppet.address, options=ClientOptions(max_attempts=3))
    with pytest.raises(ServerGoneError, match=puppet.address):
        client.read_blocks([REF])
    assert puppet.connections == 3
    puppet.close()


@pytest.mark.parametrize("welcome", [True, False])
def test_silence_is_a_timeout_that_names_the_server_and_is_not_repeated(welcome):
    puppet = Puppet(lambda request: iter([]), welcome=welcome)
    client = CacheClient(puppet.address, options=ClientOptions(silence_timeout_s=0.1))
    with pytest.raises(ServerGoneError, match=r"silent for 0\.1 s") as caught:
        client.read_blocks([REF])
    assert caught.value.kind is ErrorKind.TIMEOUT
    assert puppet.connections == 1
    puppet.close()


def test_a_stopped_server_is_a_timeout_not_a_hang(content):
    refs = refs_of(content, 1000)
    options = ClientOptions(silence_timeout_s=1)
    with contextlib.closing(CacheClient(unused_address(), private=CacheConfig(), options=ClientOptions())) as client:
        read(client, refs)
        pid = client.stats()["server"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        hasty = CacheClient(client.address, private=CacheConfig(), options=options)
        with pytest.raises(ServerGoneError, match="stopped or stuck"):
            hasty.read_blocks(refs)
        os.kill(pid, signal.SIGCONT)
        assert read(hasty, refs) == expected(content, refs)
        hasty.close()


def test_an_error_of_the_whole_request_keeps_the_connection():
    puppet = Puppet(lambda request: iter([(Failed("throttled", "slow down", "s3://b/k"), [])]))
    client = CacheClient(puppet.address)
    for call in (lambda: client.read_blocks([REF]), client.stats, lambda: client.list_objects("s3://b")):
        with pytest.raises(DataError, match="slow down"):
            call()
    assert puppet.connections == 1
    client.close()
    puppet.close()


def test_an_object_of_the_wrong_size_is_refused():
    puppet = Puppet(lambda request: iter([(Object("v", 5, None), [NULL])]))
    client = CacheClient(puppet.address)
    with pytest.raises(DataError, match="0 bytes of the 5"):
        client.read_object("file:///x")
    client.close()
    puppet.close()


def test_nobody_at_the_address_is_said_at_once(tmp_path):
    client = CacheClient(str(tmp_path / "cache.sock"))
    with pytest.raises(ServerGoneError, match="no cache server answers"):
        client.stats()


def test_another_users_server_is_not_trusted(monkeypatch):
    monkeypatch.setattr("cache.connection.peer", lambda connection: (1, 54321))
    with running_server() as running, pytest.raises(DataError, match="user 54321"):
        CacheClient(running.address).stats()


def test_another_users_server_is_trusted_in_a_place_that_was_given_to_it(monkeypatch, tmp_path):
    address = str(tmp_path / "s")
    monkeypatch.setattr("cache.connection.peer", lambda connection: (1, 54321))
    monkeypatch.setattr("cache.connection.trusts", lambda *asked: asked == (address, 54321))
    with running_server(address=address), contextlib.closing(CacheClient(address)) as client:
        assert client.stats()["server"]["pid"] == os.getpid()


def test_a_name_that_is_no_text_is_bad_input():
    puppet = Puppet(lambda request: iter([]))
    with pytest.raises(BadInputError, match="UTF-8"):
        CacheClient(puppet.address).read_blocks([BlockRef("file:///\udcff", "v", 0, 5)])
    puppet.close()


@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=40))
def test_batches_are_within_both_limits_in_order_and_complete(shapes):
    refs = [BlockRef(("\U0001f40d" if wide else "u") * size, "v", 2**62, 2**61, 2**32 - 1) for size, wide in shapes]
    refs = refs * 30
    batches = list(cut_batches(refs, range(len(refs))))
    assert [place for batch in batches for place in batch] == list(range(len(refs)))
    assert all(len(batch) <= MAX_BLOCKS for batch in batches)
    assert all(len(encode(ReadBlocks([refs[place] for place in batch]))) <= MAX_REQUEST_BYTES for batch in batches)


def test_options_are_checked():
    with pytest.raises(BadInputError, match="max_reads must be > 0, got 0"):
        ClientOptions(max_reads=0)

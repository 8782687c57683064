"""A client that lies, over the wire, to a real server: it costs nothing but its own requests."""

import contextlib
import os
import socket

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import frames, share
from cache.address import socket_address
from cache.block_table import BlockTable
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection
from cache.frames import PROTOCOL_VERSION, Done, Failed, Hello, OpenPlan, PlanOpened, ReadBlocks, ReportBad, encode
from cache.keys import BlockRef
from cache.rights import AccessConfig, PrefixRule
from cache.server import ServerLimits
from cache.session import MAX_BLOCK_BYTES
from cache.share import UserShare
from cache.testing import garbage, request_messages, running_server
from connectors.errors import BadInputError, ErrorKind, PermissionDeniedError, TransientError
from connectors.objects import normalise_url

BLOCK = 70_000
BLOCKS = 6
HONEST, LIAR = 4_000_001, 4_000_002


@pytest.fixture
def refs(tmp_path):
    data = os.urandom(BLOCK * BLOCKS)
    (tmp_path / "data").write_bytes(data)
    uri = normalise_url(tmp_path / "data")
    return [
        BlockRef(uri, "digest", begin, BLOCK, crc32c(data[begin : begin + BLOCK]))
        for begin in range(0, len(data), BLOCK)
    ]


@pytest.fixture
def user(monkeypatch):
    """Who connects next, as far as the server can tell."""
    now = {"uid": HONEST}
    monkeypatch.setattr("cache.server.peer", lambda connection: (os.getpid(), now["uid"]))
    return now


@contextlib.contextmanager
def connected(running):
    connection = Connection(running.address, timeout_s=30)
    try:
        yield connection
    finally:
        connection.close()


def answer(connection, request):
    [(reply, _)] = connection.ask(request)
    return reply


def table_of(refs):
    return BlockTable.from_columns(
        [refs[0].uri],
        [refs[0].version],
        object_of=np.zeros(len(refs), np.int32),
        offset=np.array([ref.offset for ref in refs]),
        length=np.array([ref.length for ref in refs]),
        crc32c=np.array([ref.crc32c for ref in refs]),
    )


def test_a_good_block_that_is_called_bad_stays_where_it_is(refs, tmp_path):
    tiers = (TierConfig("ram", 2 * 74_000), TierConfig("disk", 1 << 20, path=str(tmp_path / "disk"), medium="nvme"))
    with running_server(CacheConfig(tiers)) as running, contextlib.closing(CacheClient(running.address)) as client:
        while {block.source for block in client.read_blocks(refs)} - {"ram", "disk"}:
            pass
        before = client.stats()
        with connected(running) as connection:
            assert answer(connection, ReportBad(refs)) == Done()
            unheard_of = [BlockRef("file:///nowhere", str(number), 0, BLOCK) for number in range(100)]
            assert answer(connection, ReportBad(unheard_of)) == Done()
        after = client.stats()
        assert [tier["blocks"] for tier in after["tiers"]] == [tier["blocks"] for tier in before["tiers"]]
        assert [tier["corrupt"] for tier in after["tiers"]] == [0, 0]
        client.read_blocks(refs)
        assert client.stats()["origin"] == before["origin"]


def test_a_block_that_really_is_bad_goes_whoever_says_so(refs, tmp_path, user):
    disk = TierConfig("disk", 1 << 20, path=str(tmp_path / "disk"), medium="nvme")
    access = AccessConfig(allowed_uids=(HONEST, LIAR))
    with (
        running_server(CacheConfig((disk,), ring_bytes=0), access=access) as running,
        contextlib.closing(CacheClient(running.address)) as client,
    ):
        while {block.source for block in client.read_blocks(refs)} != {"disk"}:
            pass
        for file in (tmp_path / "disk" / "blocks-1").glob("*/*"):
            with file.open("r+b") as opened:
                opened.seek(500)
                opened.write(b"flipped")
        user["uid"] = LIAR
        with connected(running) as connection:
            assert answer(connection, ReportBad(refs)) == Done()
        (tier,) = client.stats()["tiers"]
        assert (tier["blocks"], tier["corrupt"]) == (0, BLOCKS)


def test_a_wrong_checksum_is_only_its_askers_error(refs):
    lies = [BlockRef(ref.uri, ref.version, ref.offset, ref.length, (ref.crc32c + 1) % 2**32) for ref in refs]
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running, connected(running) as connection:
        # In one request they are looked up together, so that the truth would join the lie's fetch if they had one name.
        mixed = [ref for pair in zip(lies, refs, strict=True) for ref in pair]
        items = [item for reply, _ in connection.ask(ReadBlocks(mixed)) for item in reply.items]
        assert [isinstance(item, Failed) for item in items] == [True, False] * BLOCKS
        assert {item.kind for item in items[::2]} == {ErrorKind.CHANGED}


def test_a_table_under_anothers_name_is_refused_and_not_lent(refs):
    honest, lie = table_of(refs), table_of(refs[::-1])
    with running_server() as running, connected(running) as liar:
        assert answer(liar, OpenPlan(honest.digest, BLOCKS)) == PlanOpened(table_known=False)
        reply = answer(liar, lie.pages[0])
        assert isinstance(reply, Failed)
        assert "not the one that was announced" in reply.message
        with connected(running) as connection:
            assert answer(connection, OpenPlan(honest.digest, BLOCKS)) == PlanOpened(table_known=False)
            assert answer(connection, honest.pages[0]) == Done()


def test_a_plan_reads_nothing_that_its_user_may_not_read(refs, user, tmp_path):
    table = table_of(refs)
    access = AccessConfig(allowed_uids=(HONEST, LIAR), rules=(PrefixRule(str(tmp_path), (HONEST,)),))
    with (
        running_server(CacheConfig((TierConfig("ram", 1 << 20),)), access=access) as running,
        contextlib.closing(CacheClient(running.address)) as client,
        contextlib.closing(client.open_plan(table)) as plan,
    ):
        user["uid"] = LIAR
        for request in (ReportBad(refs), ReadBlocks(refs)):
            with connected(running) as connection:
                reply = answer(connection, request)
                assert (type(reply), reply.kind) == (Failed, PermissionDeniedError("").kind)
        with connected(running) as connection:
            # The honest user's table is in use, and not this user's to plan with.
            assert answer(connection, OpenPlan(table.digest, BLOCKS)) == PlanOpened(table_known=False)
            reply = answer(connection, table.pages[0])
            assert (reply.kind, reply.uri) == (PermissionDeniedError("").kind, refs[0].uri)
            reply = answer(connection, frames.ExtendPlan(np.arange(BLOCKS, dtype="<i4").tobytes()))
            assert reply.kind == BadInputError("").kind
        assert client.stats()["prefetch"]["issued"] == 0
        plan.extend(np.arange(1))


def test_one_user_leaves_connections_to_the_others(user):
    limits = ServerLimits(max_connections=4, max_user_connections=3)
    access = AccessConfig(allowed_uids=(HONEST, LIAR))
    with running_server(limits=limits, access=access) as running, contextlib.ExitStack() as held:
        user["uid"] = LIAR
        for _ in range(3):
            held.enter_context(connected(running))
        with pytest.raises(TransientError, match="user 4000002 has 3 connections"):
            Connection(running.address, timeout_s=30)
        user["uid"] = HONEST
        held.enter_context(connected(running))


def test_plans_of_one_user_take_no_more_than_their_share_and_give_it_back(refs, monkeypatch):
    table = table_of(refs)
    monkeypatch.setattr(share, "MAX_USER_TABLE_BYTES", 3 * table.size_bytes // 2)
    monkeypatch.setattr(share, "MAX_USER_PLACES", 4)
    with running_server() as running, contextlib.closing(CacheClient(running.address)) as client:
        first, again = client.open_plan(table), client.open_plan(table)
        with pytest.raises(BadInputError, match="tables of one user"):
            client.open_plan(table_of(refs[1:]))
        first.extend(np.arange(3))
        with pytest.raises(BadInputError, match="blocks ahead"):
            again.extend(np.arange(2))
        with pytest.raises(BadInputError, match="of a table of"):
            again.extend(np.array([BLOCKS]))
        first.advance(2)
        again.extend(np.arange(3))
        again.replace()
        first.extend(np.arange(3))
        for plan in (first, again):
            plan.close()
        while client.stats()["prefetch"]["plans"]:
            pass
        (mine,) = running.server._shares.values()
        assert (mine.places, mine.table_bytes) == (0, 0)
        plan = client.open_plan(table_of(refs[1:]))
        plan.extend(np.arange(4))
        plan.close()


def test_a_table_that_never_comes_whole_is_given_back(refs):
    table = table_of(refs)
    with running_server() as running:
        with connected(running) as connection:
            for _ in range(2):
                assert answer(connection, OpenPlan(table.digest, BLOCKS + 1)) == PlanOpened(table_known=False)
                (mine,) = running.server._shares.values()
                assert mine.table_bytes == 0
                assert answer(connection, table.pages[0]) == Done()
                assert mine.table_bytes == table.pages[0].size_bytes
        while mine.connections:
            pass
        assert mine.table_bytes == 0


def test_a_share_counts_a_table_once_however_many_plans_use_it():
    mine = UserShare()
    for _ in range(3):
        mine.use_table(b"a", 100)
    mine.use_table(b"b", 10)
    assert mine.table_bytes == 110
    for _ in range(3):
        mine.leave_table(b"a", 100)
    assert mine.table_bytes == 10


def test_a_block_that_would_fill_the_servers_memory_is_refused_by_name(tmp_path):
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, MAX_BLOCK_BYTES + 1)
    with running_server() as running, contextlib.closing(CacheClient(running.address)) as client:
        ref = BlockRef(normalise_url(sparse), client.head(normalise_url(sparse)).version, 0, MAX_BLOCK_BYTES + 1)
        with pytest.raises(BadInputError, match=r"sparse is asked for; a server takes \d+ at most"):
            client.read_blocks([ref])
        assert client.stats()["origin"]["bytes"] == 0


def send_all(address, stream):
    """Greet, send, and take whatever comes until the server hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(socket_address(address))
        # A server that has heard enough hangs up first.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(encode(Hello(PROTOCOL_VERSION)) + stream)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass


def test_whatever_a_client_sends_others_are_served_and_nothing_is_left_of_it(refs, caplog):
    uris = st.sampled_from([refs[0].uri, "memory://m/x", "file:///nowhere/x", "s3:", ""]) | st.text(max_size=9)
    streams = st.lists(request_messages(uris).map(encode) | garbage(), max_size=6).map(b"".join)
    with (
        running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running,
        contextlib.closing(CacheClient(running.address)) as client,
    ):

        @settings(max_examples=settings.default.max_examples // 2)
        @given(streams)
        def send(stream):
            send_all(running.address, stream)

        send()
        assert [crc32c(block.view) for block in client.read_blocks(refs)] == [ref.crc32c for ref in refs]
        while client.stats()["server"]["connections"] > 1:
            pass
        assert client.stats()["prefetch"]["plans"] == 0
        (mine,) = running.server._shares.values()
        assert (mine.connections, mine.places, mine.table_bytes) == (1, 0, 0)
    # What a client can bring about is refused by name, never met by surprise.
    assert [record.message for record in caplog.records if record.exc_info] == []

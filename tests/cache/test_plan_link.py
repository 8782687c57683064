"""A client tells its future on a connection of its own, and the plan ends with that."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache import frames
from cache.block_table import PAGE_BLOCKS, BlockTable
from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection, ServerGoneError
from cache.direct import DirectReader
from cache.fallback import FallbackReader
from cache.in_place import InPlaceReader
from cache.keys import BlockRef
from cache.reader import TakesPlans
from cache.testing import RunningServer, hold_plan, running_server
from connectors.errors import BadInputError
from connectors.objects import normalise_url
from connectors.registry import open_store

BLOCK = 64 * 1024 + 5
BLOCKS = 40


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(CacheConfig((TierConfig("ram", 0),), ring_bytes=20 * (BLOCK + 4096))) as running:
        yield running


@pytest.fixture
def table(tmp_path: Path) -> BlockTable:
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(BLOCKS * BLOCK))
    return table_of(normalise_url(path), BLOCKS)


def table_of(uri: str, blocks: int) -> BlockTable:
    store, key = open_store("file:///"), uri.removeprefix("file:///")
    from connectors.bridge import run_sync

    version = run_sync(store.head(key)).version
    return BlockTable.from_columns(
        [uri],
        [version],
        object_of=np.zeros(blocks, np.int32),
        offset=np.arange(blocks) % BLOCKS * BLOCK,
        length=np.full(blocks, BLOCK),
        crc32c=None,
    )


def prefetch(client: CacheClient) -> dict[str, int]:
    found: dict[str, int] = client.stats()["prefetch"]
    return found


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process or thread does."""
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_announced_blocks_are_there_when_they_are_read(server: RunningServer, table: BlockTable) -> None:
    client = CacheClient(server.address)
    plan = client.open_plan(table)
    order = np.random.default_rng(0).permutation(BLOCKS)
    plan.extend(order)
    for place, block in enumerate(order.tolist()):
        until(lambda place=place: prefetch(client)["issued"] > place and not _is_coming(server))
        (data,) = client.read_blocks([table.ref(block)])
        assert data.source == "ring"
        plan.advance(place + 1)
    stats = prefetch(client)
    assert (stats["issued"], stats["useful"], stats["late"], stats["wasted"]) == (BLOCKS, BLOCKS, 0, 0)
    plan.close()
    until(lambda: prefetch(client)["plans"] == 0)
    client.close()


def _is_coming(server: RunningServer) -> bool:
    return bool(server.server.engine._ahead)


def test_several_ranks_send_one_table_once(server: RunningServer, table: BlockTable) -> None:
    client = CacheClient(server.address)
    first = client.open_plan(table)
    before = server.server.stats()["server"]["requests"]
    second = client.open_plan(BlockTable(table.pages))
    second.extend(np.arange(3))
    assert server.server.stats()["server"]["requests"] == before + 2, "opened, extended, and no page"
    assert prefetch(client)["plans"] == 2
    for plan in (first, second):
        plan.close()
    client.close()


def test_a_table_of_several_pages_arrives_whole(server: RunningServer, table: BlockTable) -> None:
    large = table_of(table.ref(0).uri, PAGE_BLOCKS + 3)
    client = CacheClient(server.address)
    plan = client.open_plan(large)
    plan.extend(np.array([PAGE_BLOCKS + 2]))
    with pytest.raises(BadInputError, match=str(PAGE_BLOCKS + 3)):
        plan.extend(np.array([PAGE_BLOCKS + 3]))
    until(lambda: prefetch(client)["issued"] == 1 and not _is_coming(server))
    (data,) = client.read_blocks([large.ref(PAGE_BLOCKS + 2)])
    assert data.source == "ring"
    plan.close()
    client.close()


def test_a_plan_that_is_replaced_goes_on_from_its_position(server: RunningServer, table: BlockTable) -> None:
    client = CacheClient(server.address)
    plan = client.open_plan(table)
    plan.extend(np.arange(10))
    plan.advance(2)
    plan.replace()
    plan.extend(np.array([39]))
    with pytest.raises(BadInputError, match="position 4"):
        plan.advance(4)
    plan.advance(3)
    plan.close()
    client.close()


def test_a_plan_ends_when_its_process_is_killed(server: RunningServer, table: BlockTable) -> None:
    client = CacheClient(server.address)
    process = multiprocessing.get_context("spawn").Process(target=hold_plan, args=(client, table.pages))
    process.start()
    until(lambda: prefetch(client)["plans"] == 1)
    process.kill()
    process.join()
    until(lambda: prefetch(client)["plans"] == 0)
    client.close()


def test_a_forked_child_does_not_keep_the_plan_of_its_parent_alive(server: RunningServer, table: BlockTable) -> None:
    client = CacheClient(server.address)
    plan = client.open_plan(table)
    gate_in, gate_out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(gate_out)
        os.read(gate_in, 1)
        os._exit(0)
    try:
        plan.close()
        until(lambda: prefetch(client)["plans"] == 0)
    finally:
        os.close(gate_out)
        os.waitpid(child, 0)
        os.close(gate_in)
    client.close()


def test_a_dead_server_is_an_error_that_says_so(table: BlockTable) -> None:
    with running_server() as running:
        client = CacheClient(running.address)
        plan = client.open_plan(table)
    with pytest.raises(ServerGoneError):
        plan.extend(np.arange(3))
    with pytest.raises(ServerGoneError):
        client.open_plan(table)
    plan.close()
    gc.collect()


def test_who_takes_plans(tmp_path: Path, server: RunningServer, table: BlockTable) -> None:
    here, there = InPlaceReader(), CacheClient(server.address)
    assert not isinstance(here, TakesPlans)
    assert not isinstance(DirectReader("memory://nobody"), TakesPlans)
    with_server, without = FallbackReader([("a", there), ("b", here)]), FallbackReader([("b", here)])
    plan = with_server.open_plan(table)
    assert plan is not None
    plan.close()
    assert without.open_plan(table) is None
    there.close()


@pytest.mark.parametrize(
    "requests",
    [
        [frames.ExtendPlan(b"\0\0\0\0")],
        [frames.AdvancePlan(0)],
        [frames.ReplacePlan()],
        [frames.TablePage(["a"], ["1"], bytes(4), bytes(8), b"\1" + bytes(7), None)],
        [
            frames.OpenPlan(bytes(16), 1),
            frames.TablePage(["a", "b"], ["1", "1"], bytes(8), bytes(16), (b"\1" + bytes(7)) * 2, None),
        ],
        [frames.OpenPlan(bytes(16), 1), frames.TablePage(["a"], ["1"], b"\5\0\0\0", bytes(8), bytes(8), None)],
    ],
)
def test_what_makes_no_sense_is_refused_and_the_connection_stays(
    server: RunningServer, requests: list[frames.Request]
) -> None:
    connection = Connection(server.address, timeout_s=30)
    replies = [reply for request in requests for reply, _ in connection.ask(request)]
    assert isinstance(replies[-1], frames.Failed)
    assert replies[-1].kind == BadInputError("x").kind
    assert [type(reply) for reply, _ in connection.ask(frames.Stats())] == [frames.Statistics]
    connection.close()


def test_a_connection_has_one_plan(server: RunningServer, table: BlockTable) -> None:
    connection = Connection(server.address, timeout_s=30)
    requests = [frames.OpenPlan(table.digest, BLOCKS), *table.pages, frames.OpenPlan(table.digest, BLOCKS)]
    replies = [reply for request in requests for reply, _ in connection.ask(request)]
    assert isinstance(replies[-1], frames.Failed)
    connection.close()


def test_a_block_reference_of_a_page_is_the_block_reference(table: BlockTable) -> None:
    assert table.ref(3) == BlockRef(table.ref(0).uri, table.ref(0).version, 3 * BLOCK, BLOCK)

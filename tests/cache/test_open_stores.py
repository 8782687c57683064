"""Stores are opened once, shared while they are used, and closed when there are too many that nobody uses."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from cache.open_stores import OpenStores
from connectors.errors import DataError, NotFoundError
from connectors.hedge import HedgedStore
from connectors.protocols import Store
from connectors.registry import open_store
from connectors.wrappers import CountingStore

MAX_OPEN = 4


class Counted(CountingStore):
    """Knows its root, and how often it was closed."""

    def __init__(self, root: str, opener: "Opener") -> None:
        super().__init__(open_store("memory://counted"))
        self.url = root
        self._opener = opener

    async def close(self) -> None:
        self._opener.closed[self.url] += 1
        self._opener.closes.set()
        await self._opener.may_close.wait()


class Opener:
    """Opens stores, and counts by root what it opened and what was closed."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.closes, self.may_close = asyncio.Event(), asyncio.Event()
        self.may_close.set()

    def __call__(self, root: str) -> Store:
        self.opened[root] += 1
        return Counted(root, self)


@pytest.fixture
def opener() -> Opener:
    return Opener()


@pytest.fixture
async def stores(opener: Opener) -> AsyncIterator[OpenStores]:
    made = OpenStores(opener, hedge=False, max_open=MAX_OPEN)
    yield made
    await made.close()


def uris(count: int) -> Iterator[str]:
    return (f"s3://bucket-{number}/key" for number in range(count))


async def use(stores: OpenStores, uri: str) -> None:
    async with stores.use(uri):
        pass


async def test_many_roots_leave_only_the_last_used_open(stores: OpenStores, opener: Opener) -> None:
    for place, uri in enumerate(uris(100)):
        await use(stores, uri)
        assert len(stores) == min(place + 1, MAX_OPEN)
    assert opener.opened == {f"s3://bucket-{number}": 1 for number in range(100)}
    assert opener.closed == {f"s3://bucket-{number}": 1 for number in range(96)}


async def test_a_store_that_gets_a_user_while_others_are_closed_is_not_closed_under_it(
    stores: OpenStores, opener: Opener
) -> None:
    async with AsyncExitStack() as burst:
        for uri in uris(MAX_OPEN + 2):
            await burst.enter_async_context(stores.use(uri))
    opener.may_close.clear()
    newcomer = asyncio.ensure_future(use(stores, "s3://new/key"))
    await opener.closes.wait()

    async def come_back() -> None:
        async with stores.use("s3://bucket-4/key") as (store, _):
            assert opener.closed["s3://bucket-4"] < opener.opened["s3://bucket-4"]
            await newcomer
            assert opener.closed["s3://bucket-4"] < opener.opened["s3://bucket-4"], f"{store.url} was closed in use"

    async def open_the_gate() -> None:
        await asyncio.sleep(0)
        opener.may_close.set()

    await asyncio.gather(come_back(), open_the_gate())


async def test_the_one_whose_last_use_is_oldest_is_closed(stores: OpenStores, opener: Opener) -> None:
    for uri in (*uris(MAX_OPEN), "s3://bucket-0/other", "s3://new/key"):
        await use(stores, uri)
    assert opener.closed == {"s3://bucket-1": 1}
    await use(stores, "s3://bucket-1/key")
    assert opener.opened["s3://bucket-1"] == 2


async def test_a_store_in_use_stays_open_whatever_comes(stores: OpenStores, opener: Opener) -> None:
    async with AsyncExitStack() as held:
        for uri in uris(MAX_OPEN + 2):
            await held.enter_async_context(stores.use(uri))
        assert len(stores) == MAX_OPEN + 2
        assert not opener.closed
        await use(stores, "s3://new/key")
        await use(stores, "s3://newer/key")
        assert opener.closed == {"s3://new": 1}
    await use(stores, "s3://newest/key")
    assert len(stores) == MAX_OPEN


async def test_all_who_ask_at_once_share_one_store(stores: OpenStores, opener: Opener) -> None:
    async def hold(key: str, both: asyncio.Barrier) -> tuple[Store, str]:
        async with stores.use(f"s3://bucket/{key}") as found:
            await both.wait()
            return found

    both = asyncio.Barrier(2)
    (store, key), (same, other) = await asyncio.gather(hold("a/b", both), hold("c", both))
    assert store is same
    assert (key, other) == ("a/b", "c")
    assert opener.opened == {"s3://bucket": 1}


async def test_a_failure_of_its_user_does_not_hold_a_store(stores: OpenStores, opener: Opener) -> None:
    with pytest.raises(NotFoundError):
        async with stores.use("s3://bucket-x/key"):
            raise NotFoundError("nothing there")
    for uri in uris(MAX_OPEN):
        await use(stores, uri)
    assert opener.closed == {"s3://bucket-x": 1}


async def test_one_that_cannot_be_opened_is_tried_again(stores: OpenStores, opener: Opener, monkeypatch) -> None:
    def fail(root: str) -> Store:
        raise DataError("no credentials")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "_open_store", fail)
        with pytest.raises(DataError, match="credentials"):
            await use(stores, "s3://bucket/key")
    assert len(stores) == 0
    await use(stores, "s3://bucket/key")
    assert len(stores) == 1


async def test_one_that_does_not_open_is_waited_for_only_by_those_who_want_it(
    stores: OpenStores, opener: Opener, monkeypatch
) -> None:
    answers = threading.Event()

    def open_one(root: str) -> Store:
        if root == "sftp://silent":
            answers.wait(30)
        return opener(root)

    monkeypatch.setattr(stores, "_open_store", open_one)
    impatient, patient = (asyncio.create_task(use(stores, f"sftp://silent/{key}")) for key in "ab")
    for uri in uris(MAX_OPEN):
        await use(stores, uri)
    impatient.cancel()
    await asyncio.wait({impatient})
    assert not patient.done()
    answers.set()
    await patient
    assert opener.opened["sftp://silent"] == 1
    assert len(stores) == MAX_OPEN


async def test_closing_does_not_wait_for_one_that_does_not_open(stores: OpenStores, monkeypatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(stores, "_open_store", lambda root: answers.wait(30))
    waiting = asyncio.create_task(use(stores, "sftp://silent/key"))
    await asyncio.sleep(0)
    await stores.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    answers.set()


async def test_one_that_does_not_close_takes_nothing_from_others(stores: OpenStores, monkeypatch, caplog) -> None:
    async def fail(self: Counted) -> None:
        raise OSError("still busy")

    with monkeypatch.context() as patch:
        patch.setattr(Counted, "close", fail)
        for uri in uris(MAX_OPEN + 1):
            await use(stores, uri)
    assert len(stores) == MAX_OPEN
    assert "s3://bucket-0 could not be closed" in caplog.text


async def test_only_remote_stores_are_hedged_and_their_counts_outlive_them(opener: Opener) -> None:
    stores = OpenStores(opener, hedge=True, max_open=1)
    async with stores.use("s3://bucket/key") as (store, _):
        assert isinstance(store, HedgedStore)
        store.sent, store.won = 3, 2
    async with stores.use("memory://near/key") as (store, _):
        assert not isinstance(store, HedgedStore)
    assert opener.closed == {"s3://bucket": 1}
    assert stores.hedges() == (3, 2)
    await stores.close()
    assert opener.closed == opener.opened

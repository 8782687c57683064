"""A slow read is asked for once more, the better answer wins, and the extra load is bounded."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.testing import until
from connectors import BadInputError, NotFoundError, Span, open_store
from connectors._memory import _Object, _stores, _versions
from connectors.hedge import HedgedStore, HedgeLimits, Percentile
from connectors.testing.stores import StoreTests, lets_go

NUMBERS = itertools.count()
SOON = HedgeLimits(min_samples=4, min_delay_s=0.001)


class TestHedgedStore(StoreTests):
    @pytest.fixture
    def store(self):
        self.url = f"memory://hedged-{next(NUMBERS)}"
        # Every read may be hedged, from the first on.
        yield HedgedStore(open_store(self.url), HedgeLimits(max_share=1.0, min_samples=1, min_delay_s=1e-9))
        del _stores[self.url]

    def peek(self, store, key):
        found = _stores[self.url].get(key)
        return found and found.data

    def poke(self, store, key, data):
        _stores[self.url][key] = _Object(data, str(next(_versions)))


class Stuck:
    """A store whose chosen reads never answer."""

    def __init__(self, stuck, *, fails=()):
        self.url = "memory://stuck"
        self.stuck, self.fails = set(stuck), set(fails)
        self.calls = 0
        self.cancelled = 0
        self.asked = asyncio.Event()

    async def get_range(self, key, span, *, version=None):
        number, self.calls = self.calls, self.calls + 1
        self.asked.set()
        if number in self.fails:
            raise NotFoundError("gone")
        if number in self.stuck:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return bytes([number]) * span.length


async def warm(store, times=4):
    for _ in range(times):
        await store.get_range("key", Span(0, 10))


async def test_a_read_that_hangs_is_answered_by_the_second_request_and_cancelled():
    inner = Stuck({4})
    store = HedgedStore(inner, SOON)
    await warm(store)
    assert await store.get_range("key", Span(0, 10)) == bytes([5]) * 10
    assert (store.reads, store.sent, store.won, inner.cancelled) == (5, 1, 1, 1)


class Told(Stuck):
    """A store that answers a read and its hedge when the test says so."""

    def __init__(self):
        super().__init__(set())
        self.answers = [asyncio.get_running_loop().create_future() for _ in range(2)]

    async def get_range(self, key, span, *, version=None):
        if self.calls < 4:
            return await super().get_range(key, span, version=version)
        self.calls += 1
        return await self.answers[self.calls - 5]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("both", [False, True])
async def test_a_request_that_fails_waits_for_the_other(failing, both):
    inner = Told()
    store = HedgedStore(inner, SOON)
    await warm(store)
    read = asyncio.create_task(store.get_range("key", Span(0, 10)))
    await until(lambda: inner.calls == 6)
    inner.answers[failing].set_exception(NotFoundError("gone"))
    for _ in range(10):  # steps of the event loop, more than the failure takes to be seen
        await asyncio.sleep(0)
    assert not read.done()
    if both:
        inner.answers[1 - failing].set_exception(NotFoundError("gone"))
        with pytest.raises(NotFoundError):
            await read
    else:
        inner.answers[1 - failing].set_result(bytes(10))
        assert await read == bytes(10)


async def test_an_error_is_an_answer_and_is_not_hedged():
    inner = Stuck(set(), fails={4})
    store = HedgedStore(inner, SOON)
    await warm(store)
    with pytest.raises(NotFoundError):
        await store.get_range("key", Span(0, 10))
    assert store.sent == 0


async def test_an_error_keeps_nothing_alive():
    store = HedgedStore(Stuck(set(), fails={4}), SOON)
    await warm(store)
    assert await lets_go(lambda: store.get_range("key", Span(0, 10)))


async def test_nothing_is_hedged_before_it_is_known_what_is_slow():
    inner = Stuck({3})
    store = HedgedStore(inner, SOON)
    await warm(store, 3)
    task = asyncio.create_task(store.get_range("key", Span(0, 10)))
    _, pending = await asyncio.wait({task}, timeout=0.02)
    assert pending
    assert inner.calls == 4
    task.cancel()
    await asyncio.wait({task})


async def test_a_store_that_is_slow_as_a_whole_is_asked_for_a_bounded_share_more():
    inner = Stuck(range(4, 10_000))
    store = HedgedStore(inner, HedgeLimits(min_samples=4, min_delay_s=0.001, max_share=0.05, max_burst=3))
    await warm(store)
    tasks = [asyncio.create_task(store.get_range("key", Span(0, 10))) for _ in range(200)]
    # On a busy machine the first reads were slow, and so is the hedge.
    await until(lambda: store.sent >= 1)
    await asyncio.wait(tasks, timeout=0.05)
    assert store.sent <= 3
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert store._inflight == 0
    assert inner.cancelled == inner.calls - 4


async def test_few_hedges_are_under_way_at_a_time():
    inner = Stuck(range(4, 10_000))
    store = HedgedStore(inner, HedgeLimits(min_samples=4, min_delay_s=0.001, max_share=1, max_inflight=2))
    await warm(store)
    tasks = [asyncio.create_task(store.get_range("key", Span(0, 10))) for _ in range(20)]
    await until(lambda: store.sent >= 2)
    await asyncio.wait(tasks, timeout=0.05)
    assert store.sent == 2
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_caller_who_gives_up_leaves_nothing_behind():
    inner = Stuck({4, 5})
    store = HedgedStore(inner, SOON)
    await warm(store)
    task = asyncio.create_task(store.get_range("key", Span(0, 10)))
    while inner.calls < 6:
        inner.asked.clear()
        await inner.asked.wait()
    task.cancel()
    await asyncio.wait({task})
    assert inner.cancelled == 2


async def test_sizes_are_compared_with_their_like():
    inner = Stuck({4})
    store = HedgedStore(inner, SOON)
    await warm(store)
    task = asyncio.create_task(store.get_range("key", Span(0, 10_000_000)))
    _, pending = await asyncio.wait({task}, timeout=0.02)
    assert pending
    assert store.sent == 0
    task.cancel()
    await asyncio.wait({task})


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 10))
def test_the_percentile_is_that_of_the_newest_values(values, size):
    percentile = Percentile(0.9, size=size)
    for value in values:
        percentile.add(value)
    newest = sorted(values[-size:])
    assert len(percentile) == len(newest)
    assert percentile.value() == newest[min(len(newest) - 1, int(0.9 * len(newest)))]


@pytest.mark.parametrize(
    "wrong", [{"percentile": 1.0}, {"percentile": 0.0}, {"max_share": 0}, {"max_inflight": 0}, {"min_delay_s": -1}]
)
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(BadInputError, match=next(iter(wrong))):
        HedgeLimits(**wrong)

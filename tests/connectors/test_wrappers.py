import asyncio
import itertools

import pytest

from connectors import BadInputError, CorruptError, ErrorKind, Span, ThrottledError, open_store
from connectors._memory import _Object, _stores, _versions
from connectors.testing.stores import StoreTests
from connectors.wrappers import Call, CountingStore, DelayedStore, Fail, FailingStore, Flip, PrefixStore

NUMBERS = itertools.count()


class WrapperTests(StoreTests):
    """A wrapper over a memory store, looked at below the wrapper."""

    folder = ""

    def wrap(self, store):
        raise AssertionError("each wrapper says how")

    @pytest.fixture
    def store(self):
        self.url = f"memory://wrapped-{next(NUMBERS)}"
        yield self.wrap(open_store(self.url))
        del _stores[self.url]

    def peek(self, store, key):
        found = _stores[self.url].get(self.folder + key)
        return found and found.data

    def poke(self, store, key, data):
        _stores[self.url][self.folder + key] = _Object(data, str(next(_versions)))


class TestPrefixStore(WrapperTests):
    folder = "some/folder/"

    def wrap(self, store):
        return PrefixStore(store, "some/folder")

    async def test_what_lies_beside_the_folder_is_not_seen(self, store):
        _stores[self.url]["some/folder-2/key"] = _stores[self.url]["some/folder"] = _Object(b"x", "1")
        assert [meta async for meta in store.list()] == []

    @pytest.mark.parametrize("prefix", ["", "/", "a/", "../up"])
    def test_a_prefix_that_is_no_key_is_refused(self, store, prefix):
        with pytest.raises(BadInputError):
            PrefixStore(store, prefix)


class TestNestedPrefixStore(WrapperTests):
    folder = "some/folder/"

    def wrap(self, store):
        return PrefixStore(PrefixStore(store, "some"), "folder")


class TestCountingStore(WrapperTests):
    def wrap(self, store):
        return CountingStore(store)


class TestDelayedStore(WrapperTests):
    def wrap(self, store):
        return DelayedStore(store, lambda call: 0.001 * (call.number % 2))


class TestFailingStore(WrapperTests):
    def wrap(self, store):
        return FailingStore(store, lambda call: None)


class TestAllAtOnce(WrapperTests):
    folder = "inner/"

    def wrap(self, store):
        counted = CountingStore(PrefixStore(store, "inner"))
        return DelayedStore(FailingStore(counted, lambda call: None), lambda call: 0.0)


@pytest.fixture
async def filled():
    url = f"memory://wrapped-{next(NUMBERS)}"
    store = open_store(url)
    await store.put("key", b"0123456789")
    yield store
    del _stores[url]


async def _chunks():
    yield b"abc"
    yield b"de"


async def test_requests_and_bytes_are_counted_by_operation(filled):
    store = CountingStore(filled)
    await store.get("key")
    await store.get_range("key", Span(0, 4))
    await store.get_ranges("key", [Span(0, 4), Span(2, 4), Span(0, 0)])
    await store.head("key")
    await store.put("other", b"123")
    await store.put_stream("streamed", _chunks())
    await store.copy("key", "copied")
    await store.delete("copied")
    assert [meta.key async for meta in store.list()] == ["key", "other", "streamed"]
    with pytest.raises(FileNotFoundError):
        await store.get("absent")
    assert store.requests == {
        "get": 2, "get_range": 1, "get_ranges": 1, "head": 1, "list": 1,
        "put": 1, "put_stream": 1, "copy": 1, "delete": 1,
    }  # fmt: skip
    assert +store.bytes == {"get": 10, "get_range": 4, "get_ranges": 8, "put": 3, "put_stream": 5}


async def test_the_decision_sees_every_call_in_order(filled):
    calls = []
    store = FailingStore(filled, calls.append)
    await store.head("key")
    await store.copy("key", "target")
    assert [meta.key async for meta in store.list("k")] == ["key"]
    assert calls == [Call("head", "key", 0), Call("copy", "key", 1), Call("list", "k", 2)]


async def test_a_chosen_call_fails_before_it_has_any_effect(filled):
    store = FailingStore(filled, lambda call: Fail(ErrorKind.THROTTLED) if call.operation != "get" else None)
    for attempt in (
        store.put("key", b"x"),
        store.delete("key"),
        store.put_stream("key", _chunks()),
        anext(store.list()),
    ):
        with pytest.raises(ThrottledError) as raised:
            await attempt
        assert raised.value.kind == ErrorKind.THROTTLED
    assert await store.get("key") == b"0123456789"


async def test_the_kind_of_failure_chooses_the_error(filled):
    with pytest.raises(CorruptError) as raised:
        await FailingStore(filled, lambda call: Fail(ErrorKind.CORRUPT)).get("key")
    assert raised.value.uri == f"{filled.url}/key"


async def test_a_flipped_read_differs_in_one_bit_and_keeps_the_object(filled):
    store = FailingStore(filled, lambda call: Flip(12))
    assert bytes(await store.get("key")) == b"0133456789"
    assert [bytes(part) for part in await store.get_ranges("key", [Span(0, 3), Span(0, 0)])] == [b"112", b""]
    assert await filled.get("key") == b"0123456789"


async def test_a_delayed_call_lets_others_pass(filled):
    order = []
    store = DelayedStore(filled, lambda call: 0.05 if call.number == 0 else 0.0)

    async def read(name):
        await store.get("key")
        order.append(name)

    await asyncio.gather(read("first, slow"), read("second"))
    assert order == ["second", "first, slow"]

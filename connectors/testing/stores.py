"""What every store and every wrapper has to show.

    class TestMyStore(StoreTests):
        @pytest.fixture
        def store(self, tmp_path): return MyStore(...)
        def peek(self, store, key): ...      # the bytes of an object, read around the store
        def poke(self, store, key, data): ...  # an object, written around the store

The suite needs pytest-asyncio in auto mode. It looks at what a store wrote, and prepares what a store reads, through
`peek` and `poke`, so that no mistake of a store is hidden by the same mistake on the other side.
"""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from connectors.errors import BadInputError, ChangedError, ErrorKind, NotFoundError
from connectors.objects import Span, join_uri
from connectors.protocols import Buffer, Store

__all__ = ["StoreTests", "lets_go"]

CONTENT = random.Random(1).randbytes(10_000)
SIZE = len(CONTENT)
STALE = '"0-stale-0"'

ODD_KEYS = [
    "space in name",
    "folder with space/ leading and trailing ",
    "percent%20encoded",
    "50%",
    "hash#tag",
    "question?mark=1&x=2",
    "plus+plus",
    "semi;colon,comma=equals",
    "quote'quote\"",
    "star*brace{}bracket[]",
    "dots..in...names",
    "..two",
    "~tilde",
    "umläut/日本語/😀",
    "e\u0301 is not \u00e9",
]
BAD_KEYS = ["", "/", "/absolute", "trailing/", "a//b", ".", "..", "../up", "a/../b", "a/./b", "nul\0byte"]

Read = Callable[[Store, str, str | None], Awaitable[object]]
READS: dict[str, Read] = {
    "get": lambda store, key, version: store.get(key, version=version),
    "get_range": lambda store, key, version: store.get_range(key, Span(1, 3), version=version),
    "get_ranges": lambda store, key, version: store.get_ranges(key, [Span(1, 3), Span(0, 2)], version=version),
    "get_range of no bytes": lambda store, key, version: store.get_range(key, Span(1, 0), version=version),
}


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _keys(store: Store, prefix: str = "") -> list[str]:
    return [meta.key async for meta in store.list(prefix)]


async def lets_go(call: Callable[[], Awaitable[object]]) -> bool:
    """Say whether the NotFoundError that a call ends with is gone, with what its callers held, once it was dealt with.

    It refers to the frames that it went through. Where one of these refers to it, all of them wait for the collector.
    """
    gone = asyncio.Event()

    async def fail(loop: asyncio.AbstractEventLoop) -> None:
        held = {NotFoundError}
        weakref.finalize(held, loop.call_soon_threadsafe, gone.set)
        with pytest.raises(NotFoundError):
            await call()

    gc.disable()
    try:
        await fail(asyncio.get_running_loop())
        # A thread holds what it has handed over for a moment, and the loop what has just woken this task.
        await asyncio.wait_for(gone.wait(), 5)
    except TimeoutError:
        return False
    finally:
        gc.enable()
    return True


class StoreTests(ABC):
    """The conformance suite; a subclass gives a `store` fixture and the two back doors.

    Attributes:
        many_keys: How many objects the test of long listings writes.
        chunk_bytes: How large the chunks of an aborted upload are; large enough that some have left when it aborts.
    """

    many_keys = 1_100
    chunk_bytes = 1 << 16

    @pytest.fixture
    @abstractmethod
    def store(self) -> Store:
        """An empty store."""

    @abstractmethod
    def peek(self, store: Store, key: str) -> bytes | None:
        """Return the bytes of an object, or None, without the code under test."""

    @abstractmethod
    def poke(self, store: Store, key: str, data: bytes) -> None:
        """Write an object without the code under test."""

    # Reading

    @pytest.mark.parametrize("size", [0, 1, SIZE])
    async def test_get_gives_the_whole_object(self, store: Store, size: int) -> None:
        self.poke(store, "folder/key", CONTENT[:size])
        assert bytes(await store.get("folder/key")) == CONTENT[:size]

    @pytest.mark.parametrize("span", [Span(0, 1), Span(0, SIZE), Span(17, 100), Span(SIZE - 1, 1)])
    async def test_get_range_gives_exactly_the_span(self, store: Store, span: Span) -> None:
        self.poke(store, "key", CONTENT)
        assert bytes(await store.get_range("key", span)) == CONTENT[span.offset : span.end]

    @pytest.mark.parametrize("offset", [0, 5, SIZE])
    async def test_a_range_of_no_bytes_is_empty(self, store: Store, offset: int) -> None:
        self.poke(store, "key", CONTENT)
        assert bytes(await store.get_range("key", Span(offset, 0))) == b""

    @pytest.mark.parametrize("span", [Span(SIZE - 1, 2), Span(SIZE, 1), Span(SIZE + 9, 1), Span(SIZE + 1, 0)])
    async def test_a_range_past_the_end_is_bad_input(self, store: Store, span: Span) -> None:
        self.poke(store, "key", CONTENT)
        with pytest.raises(BadInputError) as raised:
            await store.get_range("key", span)
        assert raised.value.kind == ErrorKind.BAD_RANGE
        assert raised.value.uri == join_uri(store.url, "key")
        with pytest.raises(BadInputError):
            await store.get_ranges("key", [Span(0, 4), span])

    async def test_get_ranges_come_in_the_order_asked(self, store: Store) -> None:
        self.poke(store, "key", CONTENT)
        spans = [
            Span(9_000, 500),
            Span(0, 10),
            Span(10, 10),  # adjacent
            Span(5, 10),  # overlapping
            Span(0, 10),  # again
            Span(7, 0),  # no bytes
            Span(2, 3),  # inside another
            Span(0, SIZE),
        ]
        buffers = await store.get_ranges("key", spans)
        assert [bytes(buffer) for buffer in buffers] == [CONTENT[span.offset : span.end] for span in spans]

    async def test_get_ranges_of_random_spans_are_the_slices(self, store: Store) -> None:
        self.poke(store, "key", CONTENT)
        chance = random.Random(2)
        offsets = [chance.randrange(SIZE) for _ in range(200)]
        spans = [Span(offset, chance.randrange(min(300, SIZE - offset) + 1)) for offset in offsets]
        buffers = await store.get_ranges("key", spans)
        assert [bytes(buffer) for buffer in buffers] == [CONTENT[span.offset : span.end] for span in spans]

    async def test_get_ranges_of_no_spans_is_an_empty_list(self, store: Store) -> None:
        self.poke(store, "key", CONTENT)
        assert await store.get_ranges("key", []) == []

    async def test_buffers_outlive_the_object(self, store: Store) -> None:
        self.poke(store, "key", CONTENT)
        whole, part = await store.get("key"), await store.get_range("key", Span(3, 5))
        await store.put("key", b"other")
        await store.delete("key")
        await store.close()
        assert (bytes(whole), bytes(part)) == (CONTENT, CONTENT[3:8])

    # Versions

    async def test_head_put_and_list_describe_an_object_alike(self, store: Store) -> None:
        written = await store.put("folder/key", CONTENT)
        assert (written.key, written.size_bytes) == ("folder/key", SIZE)
        assert written.version
        assert await store.head("folder/key") == written
        assert [meta async for meta in store.list()] == [written]

    async def test_the_version_changes_when_the_content_does(self, store: Store) -> None:
        first = await store.put("key", b"one")
        second = await store.put("key", b"two")
        assert first.version != second.version
        self.poke(store, "key", b"six")
        assert (await store.head("key")).version not in (first.version, second.version)

    @pytest.mark.parametrize("read", READS)
    async def test_a_read_of_the_current_version_succeeds(self, store: Store, read: str) -> None:
        self.poke(store, "key", CONTENT)
        await READS[read](store, "key", (await store.head("key")).version)

    @pytest.mark.parametrize("read", READS)
    async def test_a_read_of_another_version_is_a_changed_error(self, store: Store, read: str) -> None:
        before = await store.put("key", CONTENT)
        self.poke(store, "key", CONTENT[::-1])
        for version in (before.version, STALE):
            with pytest.raises(ChangedError) as raised:
                await READS[read](store, "key", version)
            assert raised.value.uri == join_uri(store.url, "key")
            assert join_uri(store.url, "key") in str(raised.value)

    async def test_a_shrunk_object_is_changed_rather_than_too_short(self, store: Store) -> None:
        before = await store.put("key", CONTENT)
        self.poke(store, "key", b"short")
        with pytest.raises(ChangedError):
            await store.get_range("key", Span(SIZE - 10, 10), version=before.version)

    # Absence

    @pytest.mark.parametrize("read", READS)
    async def test_reading_what_is_not_there_is_not_found(self, store: Store, read: str) -> None:
        with pytest.raises(NotFoundError) as raised:
            await READS[read](store, "folder/absent", None)
        assert raised.value.uri == join_uri(store.url, "folder/absent")
        assert join_uri(store.url, "folder/absent") in str(raised.value)

    async def test_head_delete_and_copy_of_what_is_not_there_are_not_found(self, store: Store) -> None:
        for attempt in (store.head("absent"), store.delete("absent"), store.copy("absent", "target")):
            with pytest.raises(NotFoundError) as raised:
                await attempt
            assert raised.value.uri == join_uri(store.url, "absent")
        assert self.peek(store, "target") is None

    async def test_a_folder_is_not_an_object(self, store: Store) -> None:
        self.poke(store, "folder/key", CONTENT)
        for attempt in (store.get("folder"), store.head("folder"), store.delete("folder")):
            with pytest.raises(NotFoundError):
                await attempt

    @pytest.mark.parametrize("read", [*READS, "head"])
    @pytest.mark.parametrize("key", ["absent", "folder"])
    async def test_an_error_keeps_nothing_alive(self, store: Store, key: str, read: str) -> None:
        self.poke(store, "folder/key", CONTENT)
        assert await lets_go(lambda: store.head(key) if read == "head" else READS[read](store, key, None))

    # Listing

    async def test_list_is_sorted_by_whole_keys(self, store: Store) -> None:
        keys = ["a/b", "a-b", "a.b", "a0", "a/b0", "b/c/d", "b/c-d", "B", "ä", "z"]
        for key in keys:
            self.poke(store, key, b"x")
        assert await _keys(store) == sorted(keys)

    async def test_a_prefix_is_a_string_not_a_folder(self, store: Store) -> None:
        for key in ["set/shard-0", "set/shard-1", "set/other", "set-2/shard-0", "sets", "x"]:
            self.poke(store, key, b"x")
        assert await _keys(store, "set") == ["set-2/shard-0", "set/other", "set/shard-0", "set/shard-1", "sets"]
        assert await _keys(store, "set/") == ["set/other", "set/shard-0", "set/shard-1"]
        assert await _keys(store, "set/shard") == ["set/shard-0", "set/shard-1"]
        assert await _keys(store, "set/shard-0") == ["set/shard-0"]
        assert await _keys(store, "set/shard-0/") == []
        assert await _keys(store, "nothing/here/") == []

    async def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert await _keys(store) == []

    @pytest.mark.parametrize("prefix", ["/", "/absolute", "a//b", "../up", "a/../b", "nul\0"])
    async def test_a_prefix_that_no_key_can_have_is_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(BadInputError):
            await _keys(store, prefix)

    async def test_a_listing_longer_than_a_page_is_whole(self, store: Store) -> None:
        keys = [f"many/{number:05d}" for number in range(self.many_keys)]
        for key in keys:
            self.poke(store, key, b"x")
        found = [meta async for meta in store.list("many/")]
        assert [meta.key for meta in found] == keys
        assert {meta.size_bytes for meta in found} == {1}

    # Writing

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_put_takes_any_buffer(self, store: Store, kind: Callable[[bytes], Buffer]) -> None:
        await store.put("key", kind(CONTENT))
        assert self.peek(store, "key") == CONTENT

    async def test_put_replaces_the_object(self, store: Store) -> None:
        self.poke(store, "key", CONTENT)
        assert (await store.put("key", b"")).size_bytes == 0
        assert self.peek(store, "key") == b""

    async def test_readers_see_the_old_object_or_the_new(self, store: Store) -> None:
        size = 300_000
        contents = [bytes([letter]) * size for letter in b"ab"]
        await store.put("key", contents[0])
        done = False

        async def read() -> int:
            reads = 0
            while not done or not reads:
                found = bytes(await store.get("key"))
                assert found in contents
                reads += 1
            return reads

        readers = [asyncio.create_task(read()) for _ in range(3)]
        for number in range(20):
            await store.put("key", contents[number % 2])
        done = True
        assert all(await asyncio.gather(*readers))

    async def test_put_stream_joins_the_chunks(self, store: Store) -> None:
        written = await store.put_stream("folder/key", _chunks(CONTENT[:10], b"", CONTENT[10:]))
        assert self.peek(store, "folder/key") == CONTENT
        assert written == await store.head("folder/key")

    async def test_a_stream_of_nothing_is_an_empty_object(self, store: Store) -> None:
        assert (await store.put_stream("key", _chunks())).size_bytes == 0
        assert self.peek(store, "key") == b""

    async def test_a_stream_that_fails_halfway_leaves_nothing(self, store: Store) -> None:
        async def failing() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield bytes(self.chunk_bytes)
            raise ValueError("the source broke")

        with pytest.raises(ValueError, match="the source broke"):
            await store.put_stream("folder/key", failing())
        assert self.peek(store, "folder/key") is None
        assert await _keys(store) == []

    async def test_a_stream_that_fails_halfway_keeps_the_old_object(self, store: Store) -> None:
        async def failing() -> AsyncIterator[bytes]:
            yield bytes(self.chunk_bytes)
            raise ConnectionResetError("the source broke")

        self.poke(store, "key", CONTENT)
        with pytest.raises(ConnectionResetError, match="the source broke"):
            await store.put_stream("key", failing())
        assert self.peek(store, "key") == CONTENT

    async def test_a_cancelled_stream_leaves_nothing(self, store: Store) -> None:
        waiting = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield bytes(self.chunk_bytes)
            waiting.set()
            await asyncio.Event().wait()

        writer = asyncio.create_task(store.put_stream("folder/key", endless()))
        arrived = asyncio.create_task(waiting.wait())
        await asyncio.wait([writer, arrived], return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
        writer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writer
        assert self.peek(store, "folder/key") is None
        assert await _keys(store) == []

    async def test_delete_removes_the_object_alone(self, store: Store) -> None:
        self.poke(store, "folder/key", CONTENT)
        self.poke(store, "folder/key2", CONTENT)
        await store.delete("folder/key")
        assert self.peek(store, "folder/key") is None
        assert self.peek(store, "folder/key2") == CONTENT

    async def test_copy_replaces_the_target_and_keeps_the_source(self, store: Store) -> None:
        self.poke(store, "source", CONTENT)
        self.poke(store, "folder/target", b"old")
        copied = await store.copy("source", "folder/target")
        assert self.peek(store, "folder/target") == self.peek(store, "source") == CONTENT
        assert copied == await store.head("folder/target")

    # Keys

    @pytest.mark.parametrize("key", ODD_KEYS)
    async def test_odd_keys_are_kept_letter_by_letter(self, store: Store, key: str) -> None:
        written = await store.put(key, key.encode())
        assert self.peek(store, key) == key.encode()
        assert bytes(await store.get(key, version=written.version)) == key.encode()
        assert [meta async for meta in store.list()] == [written]
        await store.delete(key)
        assert self.peek(store, key) is None

    @pytest.mark.parametrize("key", BAD_KEYS)
    async def test_a_key_that_could_lead_elsewhere_is_refused(self, store: Store, key: str) -> None:
        self.poke(store, "fine", CONTENT)
        for attempt in (
            lambda: store.get(key),
            lambda: store.get_range(key, Span(0, 1)),
            lambda: store.get_ranges(key, [Span(0, 1)]),
            lambda: store.head(key),
            lambda: store.put(key, b"x"),
            lambda: store.put_stream(key, _chunks(b"x")),
            lambda: store.delete(key),
            lambda: store.copy(key, "target"),
            lambda: store.copy("fine", key),
        ):
            with pytest.raises(BadInputError):
                await attempt()
        assert await _keys(store) == ["fine"]

    # Many at once, and the end

    async def test_many_calls_at_once_do_not_mix(self, store: Store) -> None:
        contents = {f"folder-{number % 7}/{number}": random.Random(number).randbytes(2_000) for number in range(60)}
        await asyncio.gather(*(store.put(key, data) for key, data in contents.items()))
        found = await asyncio.gather(*(store.get_range(key, Span(5, 1_900)) for key in contents))
        assert [bytes(buffer) for buffer in found] == [data[5:1_905] for data in contents.values()]

    async def test_a_store_has_every_method_and_a_url(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert join_uri(store.url, "key").endswith("/key")

    async def test_closing_twice_is_harmless(self, store: Store) -> None:
        await store.put("key", b"x")
        await store.close()
        await store.close()

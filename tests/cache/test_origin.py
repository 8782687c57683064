"""Few requests, only right bytes, and one clear error for each block that cannot be had."""

import asyncio
import errno
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from cache import origin as origin_module
from cache.budget import Budget
from cache.handle import Block
from cache.keys import BlockRef, block_key
from cache.origin import Fetch, Origin, plan_fetches
from connectors.errors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    NotFoundError,
    ThrottledError,
    TransientError,
)
from connectors.objects import ObjectMeta, Span
from connectors.protocols import Buffer
from connectors.registry import open_store
from connectors.wrappers import CountingStore, Fail, FailingStore

_names = itertools.count()


@pytest.fixture
def root() -> str:
    return f"memory://origin-{next(_names)}"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
async def store(root: str) -> CountingStore:
    return CountingStore(open_store(root))


@pytest.fixture
async def origin(store: CountingStore, threads: ThreadPoolExecutor) -> AsyncIterator[Origin]:
    budget = Budget(max_bytes=1 << 20, max_requests=4)
    made = Origin(lambda url: store, budget=budget, executor=threads, max_request_bytes=1000, hedge=True)
    yield made
    await made.close()


def keyed(*refs: BlockRef) -> list[tuple[bytes, BlockRef]]:
    return [(block_key(ref), ref) for ref in refs]


def content(result: Block | DataError) -> bytes:
    assert isinstance(result, Block), result
    return bytes(result.map())


REFS = st.builds(
    BlockRef,
    st.sampled_from(["memory://a/x", "memory://a/y"]),
    st.sampled_from(["1", "2"]),
    st.integers(0, 6).map(lambda place: place * 10),
    st.sampled_from([10, 20]),
    st.sampled_from([None, 5]),
)


@given(st.lists(REFS, unique=True, max_size=20))
def test_a_plan_asks_for_each_block_once_in_runs_without_gaps(refs: list[BlockRef]) -> None:
    plan = plan_fetches(keyed(*refs), max_request_bytes=40)
    planned = [ref for fetch in plan for _, ref in fetch.blocks]
    assert sorted(planned, key=repr) == sorted(refs, key=repr)
    for fetch in plan:
        assert fetch.size_bytes == sum(ref.length for _, ref in fetch.blocks) <= 40
        for (_, left), (_, right) in itertools.pairwise(fetch.blocks):
            assert left.uri == right.uri
            assert left.offset + left.length == right.offset
            assert (left.crc32c is None) == (right.crc32c is None)
            assert left.crc32c is not None or left.version == right.version


def test_a_run_of_equal_blocks_is_cut_only_by_its_size() -> None:
    refs = [BlockRef("memory://a/x", "1", number * 10, 10) for number in range(10)]
    plan = plan_fetches(keyed(*reversed(refs)), max_request_bytes=40)
    assert [[ref.offset for _, ref in fetch.blocks] for fetch in plan] == [[0, 10, 20, 30], [40, 50, 60, 70], [80, 90]]


def test_a_block_above_the_limit_still_goes() -> None:
    assert len(plan_fetches(keyed(BlockRef("memory://a/x", "1", 0, 500)), max_request_bytes=40)) == 1


def test_a_request_has_no_more_blocks_than_files_are_free_for_them() -> None:
    refs = [BlockRef("memory://a/x", "1", offset, 1) for offset in range(5)]
    plan = plan_fetches(keyed(*refs), max_request_bytes=40, max_request_blocks=2)
    assert [len(fetch.blocks) for fetch in plan] == [2, 2, 1]


async def test_a_block_for_which_no_file_is_left_says_which_limit_to_raise(
    origin: Origin, store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seal(key: bytes, data: Buffer) -> Block:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(origin_module, "seal_block", seal)
    meta = await store.put("x", b"1")
    ((result,),) = [await origin.fetch(Fetch(tuple(keyed(BlockRef(f"{store.url}/x", meta.version, 0, 1)))))]
    assert isinstance(result, TransientError)
    assert "ulimit -Hn" in str(result)


async def test_adjacent_blocks_are_one_request(origin: Origin, store: CountingStore, root: str) -> None:
    version = (await store.put("x", bytes(range(100)))).version
    refs = [BlockRef(f"{root}/x", version, number * 10, 10) for number in range(5)]
    (fetch,) = origin.plan(keyed(*refs))
    results = await origin.fetch(fetch)
    assert [content(result) for result in results] == [bytes(range(at, at + 10)) for at in (0, 10, 20, 30, 40)]
    assert store.requests["get_ranges"] == 1
    assert {"requests": 1, "bytes": 50, "errors": 0}.items() <= origin.stats().items()


async def test_without_a_checksum_the_store_must_have_that_version(
    origin: Origin, store: CountingStore, root: str
) -> None:
    version = (await store.put("x", b"old")).version
    await store.put("x", b"new")
    (result,) = await origin.fetch(Fetch(tuple(keyed(BlockRef(f"{root}/x", version, 0, 3)))))
    assert isinstance(result, ChangedError)
    assert f"{root}/x" in str(result)
    assert result.uri == f"{root}/x"


async def test_with_a_checksum_the_version_is_only_a_name(origin: Origin, store: CountingStore, root: str) -> None:
    await store.put("x", b"abcdef")
    ref = BlockRef(f"{root}/x", "digest", 2, 3, crc32c(b"cde"))
    (result,) = await origin.fetch(Fetch(tuple(keyed(ref))))
    assert content(result) == b"cde"
    await store.put("x", b"abXdef")
    (result,) = await origin.fetch(Fetch(tuple(keyed(ref))))
    assert isinstance(result, ChangedError)
    assert "offset 2" in str(result)
    assert f"{root}/x" in str(result)


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: bytes(body) + b"x", lambda body: b""])
async def test_a_body_of_another_length_is_refused(
    origin: Origin, store: CountingStore, root: str, monkeypatch, change
) -> None:
    await store.put("x", b"abcdef")
    true_get_range = store.get_range

    async def get_range(*args: object, **options: object) -> bytes:
        return change(await true_get_range(*args, **options))

    monkeypatch.setattr(store, "get_range", get_range)
    (result,) = await origin.fetch(Fetch(tuple(keyed(BlockRef(f"{root}/x", "v", 0, 3, crc32c(b"abc"))))))
    assert isinstance(result, TransientError)
    assert result.kind is ErrorKind.SHORT_BODY


async def test_a_span_past_the_end_fails_alone(origin: Origin, store: CountingStore, root: str) -> None:
    version = (await store.put("x", bytes(25))).version
    refs = [BlockRef(f"{root}/x", version, number * 10, 10) for number in range(3)]
    (fetch,) = origin.plan(keyed(*refs))
    first, second, third = await origin.fetch(fetch)
    assert (content(first), content(second)) == (bytes(10), bytes(10))
    assert isinstance(third, BadInputError)
    assert "offset 20" in str(third)


async def test_every_block_of_a_missing_object_says_so(origin: Origin, root: str) -> None:
    refs = [BlockRef(f"{root}/none", "1", number * 10, 10) for number in range(2)]
    (fetch,) = origin.plan(keyed(*refs))
    results = await origin.fetch(fetch)
    assert [type(result) for result in results] == [NotFoundError] * 2
    assert "offset 10" in str(results[1])
    assert {"requests": 1, "bytes": 0, "errors": 1}.items() <= origin.stats().items()


async def test_what_a_store_must_not_raise_becomes_a_data_error(
    origin: Origin, store: CountingStore, root: str, monkeypatch
) -> None:
    async def get_range(*args: object, **options: object) -> bytes:
        raise KeyError("boto")

    monkeypatch.setattr(store, "get_range", get_range)
    (result,) = await origin.fetch(Fetch(tuple(keyed(BlockRef(f"{root}/x", "1", 0, 1)))))
    assert type(result) is DataError
    assert "boto" in str(result)


async def test_a_scheme_that_nothing_serves_is_an_error_for_its_blocks(threads: ThreadPoolExecutor) -> None:
    budget = Budget(max_bytes=10, max_requests=1)
    origin = Origin(open_store, budget=budget, executor=threads, max_request_bytes=10, hedge=True)
    (result,) = await origin.fetch(Fetch(tuple(keyed(BlockRef("nosuch://a/x", "1", 0, 1)))))
    assert isinstance(result, BadInputError)


async def test_a_whole_object_comes_with_its_version(origin: Origin, store: CountingStore, root: str) -> None:
    version = (await store.put("a/manifest", b"{}")).version
    assert await origin.get_object(f"{root}/a/manifest") == (b"{}", version)
    assert await origin.head(f"{root}/a/manifest") == ObjectMeta("a/manifest", 2, version)
    with pytest.raises(NotFoundError):
        await origin.get_object(f"{root}/a/none")


async def test_an_object_replaced_between_head_and_get_is_read_again(
    origin: Origin, store: CountingStore, root: str, monkeypatch
) -> None:
    await store.put("x", b"one")
    true_head = store.head
    replacements = iter([b"two"])

    async def head(key: str) -> ObjectMeta:
        meta = await true_head(key)
        for data in itertools.islice(replacements, 1):
            await store.put("x", data)
        return meta

    monkeypatch.setattr(store, "head", head)
    data, version = await origin.get_object(f"{root}/x")
    assert (data, version) == (b"two", (await true_head("x")).version)
    replacements = itertools.repeat(b"again")
    with pytest.raises(ChangedError):
        await origin.get_object(f"{root}/x")


async def test_a_large_object_is_not_read_whole(origin: Origin, store: CountingStore, root: str, monkeypatch) -> None:
    monkeypatch.setattr(origin_module, "MAX_OBJECT_BYTES", 10)
    await store.put("x", bytes(11))
    with pytest.raises(BadInputError, match="11 bytes"):
        await origin.get_object(f"{root}/x")
    assert store.requests["get"] == 0


async def test_a_listing_is_relative_and_knows_folders_from_prefixes(
    origin: Origin, store: CountingStore, root: str
) -> None:
    for key in ("set/b", "set/a/c", "set2/d", "e"):
        await store.put(key, b"x")
    assert [meta.key for meta in await origin.list_objects(f"{root}/set")] == ["a/c", "b"]
    assert [meta.key for meta in await origin.list_objects(root)] == ["e", "set/a/c", "set/b", "set2/d"]


async def test_requests_stay_within_the_budget(store: CountingStore, root: str, threads: ThreadPoolExecutor) -> None:
    await store.put("x", bytes(100))
    running, most = 0, 0
    true_get_range = store.get_range

    async def get_range(*args: object, **options: object) -> object:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return await true_get_range(*args, **options)

    store.get_range = get_range  # type: ignore[method-assign]
    budget = Budget(max_bytes=30, max_requests=2)
    origin = Origin(lambda url: store, budget=budget, executor=threads, max_request_bytes=10, hedge=True)
    fetches = origin.plan(keyed(*(BlockRef(f"{root}/x", "v", at, 10, crc32c(bytes(10))) for at in range(0, 100, 10))))
    await asyncio.gather(*map(origin.fetch, fetches))
    assert (len(fetches), most) == (10, 2)


async def test_a_store_that_says_slow_down_is_asked_for_half_as_much_at_once(
    root: str, threads: ThreadPoolExecutor
) -> None:
    store = open_store(root)
    version = (await store.put("x", bytes(100))).version
    throttling = [True]
    failing = FailingStore(store, lambda call: Fail(ErrorKind.THROTTLED) if throttling[0] else None)
    budget = Budget(max_bytes=1 << 20, max_requests=8)
    origin = Origin(lambda url: failing, budget=budget, executor=threads, max_request_bytes=10, hedge=False)
    fetch = Fetch(tuple(keyed(BlockRef(f"{root}/x", version, 0, 10))))
    for _ in range(3):
        assert isinstance((await origin.fetch(fetch))[0], ThrottledError)
    assert (budget.max_requests, origin.stats()["throttled"]) == (4, 3)
    throttling[0] = False
    for _ in range(5):
        content((await origin.fetch(fetch))[0])
    assert budget.max_requests == 5
    await origin.close()


class _Slow(CountingStore):
    """Its reads hang, once they are told to, but for every second one."""

    hangs = False

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        self.calls = getattr(self, "calls", 0) + 1
        if self.hangs and self.calls % 2:
            await asyncio.Event().wait()
        return await super().get_range(key, span, version=version)


@pytest.mark.parametrize("remote", [True, False])
async def test_only_slow_reads_of_remote_stores_are_sent_again(
    root: str, threads: ThreadPoolExecutor, remote: bool
) -> None:
    store = _Slow(open_store(root))
    version = (await store.put("x", bytes(100))).version
    budget = Budget(max_bytes=1 << 20, max_requests=8)
    origin = Origin(lambda url: store, budget=budget, executor=threads, max_request_bytes=10, hedge=True)
    uri = "s3://bucket/x" if remote else f"{root}/x"
    fetch = Fetch(tuple(keyed(BlockRef(uri, version, 0, 10))))
    for _ in range(40):
        content((await origin.fetch(fetch))[0])
    store.hangs = True
    task = asyncio.create_task(origin.fetch(fetch))
    done, _ = await asyncio.wait({task}, timeout=10 if remote else 0.05)
    assert bool(done) is remote
    assert (origin.stats()["hedges_sent"], origin.stats()["hedges_won"]) == ((1, 1) if remote else (0, 0))
    task.cancel()
    await asyncio.wait({task})
    await origin.close()

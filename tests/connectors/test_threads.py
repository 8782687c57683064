"""Calls that hang: they are named, reads of them end with an error, and what else there is goes on."""

import asyncio
import logging
import threading

import pytest

from cache.testing import until
from connectors import ErrorKind, Span, TransientError, _posix, _threads
from connectors._posix import PosixStore
from connectors._threads import BlockingPool

URI = "file:///mnt/gone/x"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(_threads, "_LOOK_S", 0.001)
    monkeypatch.setattr(_threads, "_LATE_S", 0.001)
    monkeypatch.setattr(_threads, "_READ_LIMIT_S", 0.01)


@pytest.fixture
def released():
    event = threading.Event()
    yield event
    event.set()


async def test_a_call_that_hangs_is_named_again_and_again(released, caplog):
    caplog.set_level(logging.WARNING)
    pool = BlockingPool(1)

    def read():
        return released.wait(60)

    task = asyncio.create_task(pool.run(URI, None, read))
    await until(lambda: len(caplog.records) >= 3)
    assert {record.getMessage().partition(" has not returned")[0] for record in caplog.records} == {f"read of {URI}"}
    released.set()
    assert await task
    pool.close()


async def test_who_waits_for_a_read_that_hangs_is_told(released):
    pool = BlockingPool(2)
    with pytest.raises(TransientError, match=f"{URI} did not answer within 0.01 s") as raised:
        await pool.run(URI, 0.01, released.wait)
    assert (raised.value.kind, raised.value.uri) == (ErrorKind.TIMEOUT, URI)
    assert await pool.run(URI, None, lambda: 5) == 5
    pool.close()


async def test_where_every_thread_hangs_nobody_waits_until_one_comes_back(released):
    pool = BlockingPool(2)
    ended = []

    def hang():
        released.wait()
        ended.append(1)

    for _ in range(2):
        with pytest.raises(TransientError, match="did not answer"):
            # Its turn comes at once, however late its thread is.
            await _given_up_once_begun(pool, hang)
    with pytest.raises(TransientError, match="is not asked, because 2 reads"):
        await pool.run(URI, None, lambda: 5)
    released.set()
    await until(lambda: len(ended) == 2 and not pool._lost)
    assert await pool.run(URI, None, lambda: 5) == 5
    pool.close()


async def _given_up_once_begun(pool, function):
    begun = threading.Event()

    def body():
        begun.set()
        function()

    task = asyncio.create_task(pool.run(URI, 3600.0, body))
    await until(begun.is_set)
    (call,) = [call for call in pool._calls if not call.given_up]
    call.limit_s = 0.0
    await task


async def test_a_read_that_is_given_up_before_its_turn_is_never_done(released):
    pool, done = BlockingPool(1), []
    first = asyncio.create_task(pool.run(URI, None, released.wait))
    await until(lambda: any(call.begun_s is not None for call in pool._calls))
    with pytest.raises(TransientError, match="did not answer"):
        await pool.run(URI, 0.01, done.append, "second")
    released.set()
    await first
    await pool.run(URI, None, done.append, "third")
    assert done == ["third"]
    pool.close()


async def test_a_caller_that_is_cancelled_is_not_told_of_a_time_out(released):
    pool = BlockingPool(1)
    task = asyncio.create_task(pool.run(URI, 3600.0, released.wait))
    await until(lambda: pool._calls)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pool.close()


async def test_a_time_out_of_the_call_itself_is_passed_on():
    def fail():
        raise TimeoutError("its own")

    pool = BlockingPool(1)
    with pytest.raises(TimeoutError, match="its own"):
        await pool.run(URI, 3600.0, fail)
    pool.close()


async def test_a_file_system_that_hangs_leaves_others_alone(tmp_path, monkeypatch, released):
    dead = tmp_path / "dead"
    dead.mkdir()
    for folder in (dead, tmp_path):
        (folder / "x").write_bytes(b"bytes")
    read = _posix._read

    def read_unless_dead(key, spans, version):
        if key.startswith(f"{dead}/"[1:]):
            released.wait()
        return read(key, spans, version)

    monkeypatch.setattr(_posix, "_read", read_unless_dead)
    monkeypatch.setattr(_posix, "mount_points", lambda: frozenset({"/", str(dead)}))
    store = PosixStore(threads=1)
    for _ in range(2):
        with pytest.raises(TransientError) as raised:
            await store.get_range(f"{dead}/x"[1:], Span(0, 5))
        assert raised.value.kind == ErrorKind.TIMEOUT
        assert raised.value.uri == f"file://{dead}/x"
    assert bytes(await store.get(f"{tmp_path}/x"[1:])) == b"bytes"
    await store.close()


async def test_a_write_that_fails_says_why_also_where_what_it_left_cannot_be_removed(tmp_path, monkeypatch, released):
    store = PosixStore(threads=1)
    monkeypatch.setattr(_threads, "_READ_LIMIT_S", 3600.0)

    async def chunks():
        yield b"some"
        pool = await store._pool(f"{tmp_path}/x"[1:])
        with pytest.raises(TransientError, match="did not answer"):
            await _given_up_once_begun(pool, released.wait)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke") as raised:
        await store.put_stream(f"{tmp_path}/x"[1:], chunks())
    (left,) = tmp_path.iterdir()
    (note,) = raised.value.__notes__
    assert note.startswith(f"{left} may be left behind, because it could not be removed: ")
    assert "is not asked, because 1 reads" in note
    released.set()
    await until(lambda: not list(tmp_path.iterdir()))
    await store.close()


async def test_the_removal_of_what_a_write_left_is_not_waited_for_for_ever(tmp_path, monkeypatch, released):
    store, begun = PosixStore(threads=2), threading.Event()

    def hang(partial, chunks):
        with partial._lock:
            begun.set()
            released.wait()

    monkeypatch.setattr(_posix._Partial, "write", hang)

    async def chunks():
        yield b"some"

    writing = asyncio.create_task(store.put_stream(f"{tmp_path}/x"[1:], chunks()))
    await until(begun.is_set)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await writing
    assert "may be left behind" in raised.value.__notes__[0]
    released.set()
    await until(lambda: not list(tmp_path.iterdir()))
    await store.close()

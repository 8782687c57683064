"""A disk that does not answer holds up no reader; its probes are few, and bring it back."""

import asyncio
import errno
import os
import threading
import weakref

import pytest

from cache.disk import DiskLimits
from cache.disk_calls import DiskCalls
from cache.testing import until

LIMITS = DiskLimits(stuck_s=0.05, first_retry_s=1e-3, last_retry_s=1e-3)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


async def test_readers_are_told_at_once_also_those_in_the_queue(caplog) -> None:
    calls, answers = DiskCalls("disk", threads=1, limits=LIMITS), threading.Event()
    begun: list[int] = []

    def read(number: int) -> None:
        begun.append(number)
        answers.wait(10)

    readers = [asyncio.create_task(calls.call_for_reader(read, number)) for number in range(3)]
    writer = asyncio.create_task(calls.call(answers.wait, 10))
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(result) for result in results] == [TimeoutError] * 3
    assert begun == [0]
    with pytest.raises(TimeoutError, match="down"):
        await calls.call_for_reader(read, 3)
    assert not writer.done(), "what a write may still do stays charged, so it is waited for"
    assert not await calls.close(0.01)
    answers.set()
    with pytest.raises(asyncio.CancelledError):
        await writer
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_a_reader_that_is_cancelled_is_cancelled() -> None:
    calls, answers = DiskCalls("disk", threads=1, limits=DiskLimits()), threading.Event()
    reader = asyncio.create_task(calls.call_for_reader(answers.wait, 10))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    answers.set()
    assert await calls.close(10)


async def test_what_a_reader_got_is_its_own() -> None:
    calls = DiskCalls("disk", threads=1, limits=DiskLimits())
    got = await calls.call_for_reader(threading.Event)
    kept = weakref.ref(got)
    del got
    await until(lambda: kept() is None)
    assert await calls.close(10)


async def test_a_slow_disk_with_a_long_queue_is_not_stuck() -> None:
    calls = DiskCalls("disk", threads=1, limits=DiskLimits(stuck_s=1.0))
    pause = threading.Event()
    await asyncio.gather(*(calls.call_for_reader(pause.wait, 0.05) for _ in range(25)))
    assert calls.health.readable
    assert await calls.close(10)


async def test_a_probe_that_hangs_stays_the_only_one() -> None:
    calls, answers = DiskCalls("disk", threads=1, limits=LIMITS), threading.Event()
    probes: list[int] = []
    changes: list[str] = []

    def probe() -> tuple[bool, bool, str | None]:
        probes.append(len(probes))
        answers.wait(10)
        return True, True, None

    calls.attach(probe=probe, on_change=lambda: changes.append(calls.health.state.value))
    calls.distrust("it could not be opened")
    await until(lambda: bool(probes))
    for _ in range(5):
        calls.failed(OSError(errno.EIO, "still"), writing=False, more=False)
        await asyncio.sleep(0)
    assert probes == [0]
    answers.set()
    await until(lambda: calls.stats()["state"] == "normal")
    assert len(probes) == LIMITS.good_probes
    assert (changes[0], changes[-1]) == ("down", "normal")
    assert await calls.close(10)


async def test_a_probe_that_fails_in_an_unknown_way_is_repeated_and_said_once(caplog) -> None:
    calls = DiskCalls("disk", threads=1, limits=LIMITS)
    failing = [MemoryError()] * 3

    def probe() -> tuple[bool, bool, str | None]:
        if failing:
            raise failing.pop()
        return True, True, None

    calls.attach(probe=probe, on_change=lambda: None)
    calls.distrust("it could not be opened")
    await until(lambda: calls.stats()["state"] == "normal")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [MemoryError]
    assert await calls.close(10)


async def test_after_close_nothing_begins() -> None:
    calls = DiskCalls("disk", threads=1, limits=LIMITS)
    assert await calls.close(10)
    with pytest.raises(OSError, match="closed"):
        await calls.call(fail, errno.EIO)

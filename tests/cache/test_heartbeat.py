"""Who waits hears that the server lives; who does not, hears nothing."""

import asyncio
import socket

import pytest

from cache.frames import Waiting, replies
from cache.heartbeat import Heartbeat
from cache.testing import until


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def received(end: socket.socket) -> list[object]:
    try:
        return list(replies().feed(end.recv(1 << 16)))
    except BlockingIOError:
        return []


def test_a_client_that_waits_hears_again_and_again(ends) -> None:
    ours, theirs = ends

    async def main() -> None:
        heard: list[object] = []

        def three() -> bool:
            heard.extend(received(theirs))
            return len(heard) >= 3

        heartbeat = Heartbeat(ours, 0.001)
        with heartbeat:
            await until(three)
        heartbeat.close()
        assert set(heard) == {Waiting()}

    asyncio.run(main())


def test_a_client_that_does_not_wait_hears_nothing_and_the_timer_ends(ends) -> None:
    ours, theirs = ends

    async def main() -> None:
        heartbeat = Heartbeat(ours, 0.001)
        with heartbeat:
            pass
        await until(lambda: not heartbeat.running)
        assert received(theirs) == []
        with heartbeat:
            await until(lambda: bool(received(theirs)))
        heartbeat.close()

    asyncio.run(main())


def test_a_client_that_is_gone_has_its_task_cancelled(ends) -> None:
    ours, theirs = ends
    theirs.close()

    async def wait_forever() -> None:
        with Heartbeat(ours, 0.001):
            await asyncio.get_running_loop().create_future()

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(wait_forever())

    asyncio.run(main())


def fill(end: socket.socket) -> None:
    while True:
        end.send(bytes(1 << 16))


def test_a_client_that_takes_nothing_is_not_taken_for_gone(ends) -> None:
    ours, _ = ends
    with pytest.raises(BlockingIOError):
        fill(ours)

    async def main() -> None:
        heartbeat = Heartbeat(ours, 60.0)
        with heartbeat:
            heartbeat.beat()
            assert heartbeat.running
        heartbeat.close()

    asyncio.run(main())

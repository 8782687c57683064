"""A socket is watched while its task comes back for more, and not while the task is busy."""

import asyncio
import socket

import pytest

from cache.incoming import Incoming
from cache.testing import until


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def run(main) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_bytes_come_as_they_arrive_and_then_the_end(ends) -> None:
    ours, theirs = ends

    async def main() -> None:
        incoming = Incoming(ours)
        for message in (b"one", b"two"):
            receiving = asyncio.create_task(incoming.receive())
            theirs.sendall(message)
            assert await receiving == message
        theirs.close()
        assert await incoming.receive() == b""
        incoming.close()

    run(main())


def test_what_arrives_while_the_task_is_busy_is_kept_and_does_not_wake_the_loop(ends) -> None:
    ours, theirs = ends

    async def main() -> None:
        incoming, loop = Incoming(ours), asyncio.get_running_loop()
        theirs.sendall(b"first")
        assert await incoming.receive() == b"first"
        theirs.sendall(b"second")
        await until(lambda: not incoming.watching)
        assert not loop.remove_reader(ours)
        assert await incoming.receive() == b"second"
        assert incoming.watching
        incoming.close()
        assert not loop.remove_reader(ours)

    run(main())


def test_a_receive_that_is_cancelled_takes_nothing(ends) -> None:
    ours, theirs = ends

    async def main() -> None:
        incoming = Incoming(ours)
        receiving = asyncio.create_task(incoming.receive())
        await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        theirs.sendall(b"kept")
        assert await incoming.receive() == b"kept"
        incoming.close()

    run(main())

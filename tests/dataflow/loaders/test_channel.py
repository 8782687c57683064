"""Messages and descriptors arrive whole and in order, and the trainer never blocks."""

import os
import resource
import socket
import threading

import pytest

from dataflow.loaders import channel
from dataflow.loaders.channel import Channel, channel_pair


@pytest.fixture
def ends():
    trainer, sock = channel_pair()
    worker = Channel(sock)
    yield trainer, worker
    trainer.close()
    worker.close()


def test_messages_arrive_whole_and_in_order(ends):
    trainer, worker = ends
    messages = [b"", b"a", bytes(70_000), b"z" * 5]
    for message in messages:
        trainer.post(message)
    received = []
    while len(received) < len(messages):
        received += worker.receive(block=True)
    assert received == messages


def test_a_message_of_nothing_is_a_message(ends):
    trainer, worker = ends
    trainer.post(b"")
    assert worker.receive(block=False) == [b""]


def test_who_has_a_message_is_not_kept_waiting_for_the_next(ends, monkeypatch):
    trainer, worker = ends
    monkeypatch.setattr(channel, "_CHUNK_BYTES", 64)
    worker.send(bytes(56))  # fills a chunk, with its length
    assert trainer.receive(block=True) == [bytes(56)]


def test_the_trainer_never_blocks_on_a_worker_that_does_not_read(ends):
    trainer, worker = ends
    messages = [bytes([number]) * 100_000 for number in range(50)]
    for message in messages:
        trainer.post(message)
    assert trainer.pending
    received = []
    while len(received) < len(messages):
        received += worker.receive(block=False)
        trainer.flush()
    assert received == messages
    assert not trainer.pending


def test_both_may_send_more_than_the_socket_holds(ends):
    trainer, worker = ends
    big = bytes(5_000_000)
    thread = threading.Thread(target=worker.send, args=(big,))
    thread.start()
    trainer.post(big)
    received = []
    while not received:
        received = trainer.receive(block=True)
    thread.join()
    assert received == [big]
    received = []
    while not received:
        trainer.flush()
        received = worker.receive(block=False)
    assert received == [big]


def test_descriptors_come_with_their_message(ends):
    trainer, worker = ends
    reads, writes = zip(*(os.pipe() for _ in range(3)), strict=True)
    worker.send(b"one", reads[:1])
    worker.send(b"none")
    worker.send(b"two", reads[1:])
    for fd in reads:
        os.close(fd)
    received = []
    while len(received) < 3:
        received += trainer.receive(block=True)
    assert received == [b"one", b"none", b"two"]
    for number, write in enumerate(writes):
        os.write(write, b"%d" % number)
        os.close(write)
        fd = trainer.fds.popleft()
        assert os.read(fd, 9) == b"%d" % number
        os.close(fd)


def test_a_message_takes_as_many_descriptors_as_it_says(ends):
    trainer, worker = ends
    worker.send(b"many", [0] * channel.MAX_FDS)
    assert trainer.receive(block=True) == [b"many"]
    assert len(trainer.fds) == channel.MAX_FDS


def test_descriptors_come_with_a_message_that_the_socket_does_not_hold(ends):
    trainer, worker = ends
    reading, writing = os.pipe()
    message = bytes(range(256)) * 20_000

    def send():
        worker.send(message, [reading])
        worker.close()

    thread = threading.Thread(target=send)
    thread.start()
    received = []
    while not trainer.closed:
        received += trainer.receive(block=True)
    thread.join()
    os.close(reading)
    os.close(writing)
    assert received == [message]
    assert len(trainer.fds) == 1


def test_descriptors_that_nobody_took_are_closed_with_the_channel(ends):
    trainer, worker = ends
    with open(os.devnull, "rb") as file:
        worker.send(b"here", [file.fileno()])
    trainer.receive(block=True)
    (left,) = trainer.fds
    trainer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(left)


def test_a_descriptor_that_there_is_no_room_for_is_an_error(ends):
    trainer, worker = ends
    worker.send(b"here", [0])
    lowest_free = os.dup(0)
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="Too many open files"):
            trainer.receive(block=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_end_of_the_other_side_comes_after_its_messages(ends):
    trainer, worker = ends
    worker.send(b"last")
    worker.close()
    assert trainer.receive(block=True) == [b"last"]
    assert not trainer.closed
    assert trainer.receive(block=True) == []
    assert trainer.closed
    trainer.post(b"to nobody")
    assert not trainer.pending


def test_a_worker_that_dies_without_reading_is_at_its_end_as_any_other(ends):
    trainer, worker = ends
    trainer.post(b"never read")
    worker.close()
    assert trainer.receive(block=True) == []
    assert trainer.closed


def test_half_a_message_of_a_dead_worker_is_never_seen():
    trainer, sock = channel_pair()
    sock.sendall((100).to_bytes(8, "little") + b"only a part")
    sock.close()
    assert trainer.receive(block=True) == []
    assert trainer.closed
    trainer.close()


def test_a_forked_child_does_not_hold_the_trainers_end(ends):
    trainer, worker = ends
    pid = os.fork()
    if pid == 0:
        try:
            socket.socket(fileno=os.dup(trainer.sock.fileno()))
        except OSError:
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    worker.send(b"the trainer still has it")
    assert trainer.receive(block=True) == [b"the trainer still has it"]

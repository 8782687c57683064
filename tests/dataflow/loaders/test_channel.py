"""Messages and descriptors arrive whole and in order, and the trainer never blocks."""

import os
import socket
import threading

import pytest

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

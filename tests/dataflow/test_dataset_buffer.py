"""Which decoded blocks a process keeps."""

import copy
import os
import pickle
import signal

import pytest

from dataflow.dataset.buffer import BlockBuffer


def filled(capacity_bytes: int, *sizes_bytes: int) -> BlockBuffer:
    """A buffer that was given blocks 0, 1, ... of these sizes."""
    buffer = BlockBuffer(capacity_bytes)
    for block, size_bytes in enumerate(sizes_bytes):
        buffer.put(block, {"number": block}, size_bytes)
    return buffer


def kept(buffer: BlockBuffer) -> list[int]:
    return sorted(buffer.find(list(range(10))))


@pytest.mark.parametrize(
    ("sizes_bytes", "expected"),
    [
        ([40, 60], [0, 1]),
        ([40, 61], [1]),
        ([40] * 9, [7, 8]),
        ([40, 40, 500], [2]),
        ([40, 500, 40, 40], [2, 3]),
    ],
)
def test_the_newest_blocks_stay_as_far_as_they_fit(sizes_bytes: list[int], expected: list[int]) -> None:
    assert kept(filled(100, *sizes_bytes)) == expected


def test_the_block_that_was_not_used_for_longest_makes_room() -> None:
    buffer = filled(100, 40, 40)
    assert buffer.find([0]) == {0: {"number": 0}}
    buffer.put(2, {}, 40)
    assert kept(buffer) == [0, 2]


def test_a_block_that_two_threads_have_decoded_counts_once() -> None:
    buffer = filled(100, 40)
    buffer.put(0, {}, 40)
    buffer.put(1, {}, 40)
    assert kept(buffer) == [0, 1]


def test_without_capacity_nothing_stays() -> None:
    assert kept(filled(0, 40)) == []


def test_copies_are_empty_and_as_large() -> None:
    buffer = filled(100, 40)
    for other in (copy.copy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert (kept(other), other.capacity_bytes) == ([], 100)
    assert kept(buffer) == [0]


def test_a_child_has_what_its_parent_had_whoever_held_the_lock() -> None:
    buffer = filled(100, 40)
    with buffer._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # rather than for ever
            os._exit(0 if kept(buffer) == [0] else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0

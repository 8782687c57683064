"""A mapped block is there as long as anything looks at it, and then gone; large pages change nothing but the cost."""

import itertools
import math
import os
from collections.abc import Callable

import numpy as np
import pytest

from cache import memory_map
from cache.handle import seal_block
from cache.memory_map import LARGE_PAGE_BYTES, leave_dear_pages, map_memory

DATA = bytes(range(256)) * 500
LARGE = np.arange(5 * LARGE_PAGE_BYTES // 16, dtype=np.uint64).tobytes() + b"tail"


class Advice:
    """Stands for the C library; keeps what was asked of the kernel about large pages, and refuses it or not."""

    def __init__(self, refuse: bool) -> None:
        self.asked: list[int] = []
        self._refuse = refuse
        self._libc = memory_map._libc

    def __getattr__(self, name: str) -> Callable[..., int]:
        return getattr(self._libc, name)

    def madvise(self, address: int, length: int, advice: int) -> int:
        assert address % LARGE_PAGE_BYTES == 0
        self.asked.append(length)
        return -1 if self._refuse else self._libc.madvise(address, length, advice)


@pytest.fixture
def advice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Advice:
    advice = Advice(refuse=request.param)
    monkeypatch.setattr(memory_map, "_libc", advice)
    monkeypatch.setattr(memory_map, "_paused_blocks", 0)
    return advice


def maps_of(fd: int) -> int:
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps") as lines:
        return sum(line.split()[4] == inode for line in lines)


def test_a_map_needs_no_descriptor_and_is_read_only() -> None:
    block = seal_block(bytes(16), DATA)
    fds = set(os.listdir("/proc/self/fd"))
    view = block.map()
    assert set(os.listdir("/proc/self/fd")) == fds
    del block
    assert view == DATA
    assert view.readonly
    with pytest.raises(ValueError, match="read-only"):
        np.frombuffer(view, np.uint8)[0] = 1


@pytest.mark.parametrize("data", [DATA, LARGE])
def test_a_map_ends_with_the_last_of_its_views(data: bytes) -> None:
    block = seal_block(bytes(16), data)
    fd = block.memory.fd
    whole = block.map()
    part, array = whole[1000:2000], np.frombuffer(whole, np.uint8)
    assert maps_of(fd) == 1
    del whole
    assert part == data[1000:2000]
    del part
    assert maps_of(fd) == 1
    assert array[-1] == data[-1]
    del array
    assert maps_of(fd) == 0


def test_a_file_that_is_too_short_is_not_mapped() -> None:
    block = seal_block(bytes(16), DATA)
    with pytest.raises(ValueError, match=f"a file of {len(DATA)}"):
        map_memory(block.memory.fd, len(DATA) + 1)


@pytest.mark.parametrize("length", [0, LARGE_PAGE_BYTES])
def test_what_cannot_be_mapped_is_an_error_of_the_system(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "fstat", lambda _fd: os.stat_result((0,) * 6 + (length,) + (0,) * 3))
    try:
        with pytest.raises(OSError, match=f"cannot map {length} bytes"):
            map_memory(reading, length)
    finally:
        monkeypatch.undo()
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("advice", [False, True], indirect=True, ids=["taken", "refused"])
@pytest.mark.parametrize(
    "length", [1, LARGE_PAGE_BYTES - 1, LARGE_PAGE_BYTES, LARGE_PAGE_BYTES + 1, 2 * LARGE_PAGE_BYTES, len(LARGE)]
)
def test_a_block_is_what_was_written_whatever_its_pages(length: int, advice: Advice) -> None:
    block = seal_block(bytes(16), memoryview(LARGE)[-length:])
    assert os.fstat(block.memory.fd).st_size == length
    view = block.map()
    assert view == LARGE[-length:]
    with pytest.raises(PermissionError):
        os.pwrite(block.memory.fd, b"x", 0)
    whole_pages = length // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
    assert advice.asked == ([whole_pages] if whole_pages else [])


def test_a_large_block_is_mapped_where_large_pages_can_be() -> None:
    block = seal_block(bytes(16), LARGE)
    views = [block.map() for _ in range(4)]
    assert [np.frombuffer(view, np.uint8).ctypes.data % LARGE_PAGE_BYTES for view in views] == [0] * 4


def test_a_large_map_takes_no_more_room_than_its_bytes() -> None:
    block = seal_block(bytes(16), LARGE)

    def pages_of_process() -> int:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[0])

    before = pages_of_process()
    views = [block.map() for _ in range(256)]
    # Whatever else the process takes meanwhile, it is less than the room that 256 maps would have beside them.
    assert pages_of_process() - before < 256 * (len(LARGE) + LARGE_PAGE_BYTES // 2) // 4096
    del views
    assert pages_of_process() - before < 256 * LARGE_PAGE_BYTES // 2 // 4096


@pytest.mark.parametrize("advice", [True], indirect=True)
def test_after_a_refusal_some_blocks_do_not_ask_for_large_pages(
    advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_map, "_PAUSE_BLOCKS", 2)
    for asked in (1, 1, 1, 2, 2):
        seal_block(bytes(16), bytes(LARGE_PAGE_BYTES))
        assert len(advice.asked) == asked


@pytest.mark.parametrize("advice", [False], indirect=True)
@pytest.mark.parametrize(
    ("leave", "page_s", "asked"),
    [(True, 0.001, [1, 2, 3, 4]), (True, 0.003, [1, 1, 1, 2]), (False, 0.003, [1, 2, 3, 4])],
    ids=["cheap", "dear", "dear, but never mind"],
)
def test_after_large_pages_that_cost_much_some_blocks_do_not_ask_for_any(
    leave: bool, page_s: float, asked: list[int], advice: Advice, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=3 * page_s)  # read before and after
    monkeypatch.setattr(memory_map, "_cpu_s", lambda: next(clock))
    monkeypatch.setattr(memory_map, "_max_page_s", math.inf)
    monkeypatch.setattr(memory_map, "_PAUSE_BLOCKS", 2)
    if leave:
        leave_dear_pages()
    for number in asked:
        seal_block(bytes(16), bytes(3 * LARGE_PAGE_BYTES))
        assert len(advice.asked) == number

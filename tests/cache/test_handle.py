"""A mapped block is there as long as anything looks at it, and then gone."""

import os

import numpy as np
import pytest

from cache.handle import seal_block
from cache.memory_map import map_memory

DATA = bytes(range(256)) * 500


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


def test_a_map_ends_with_the_last_of_its_views() -> None:
    block = seal_block(bytes(16), DATA)
    fd = block.memory.fd
    whole = block.map()
    part, array = whole[1000:2000], np.frombuffer(whole, np.uint8)
    assert maps_of(fd) == 1
    del whole
    assert part == DATA[1000:2000]
    del part
    assert maps_of(fd) == 1
    assert array[-1] == DATA[-1]
    del array
    assert maps_of(fd) == 0


def test_a_file_that_is_too_short_is_not_mapped() -> None:
    block = seal_block(bytes(16), DATA)
    with pytest.raises(ValueError, match=f"a file of {len(DATA)}"):
        map_memory(block.memory.fd, len(DATA) + 1)


def test_what_cannot_be_mapped_is_an_error_of_the_system() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="cannot map 0 bytes"):
            map_memory(reading, 0)
    finally:
        os.close(reading)
        os.close(writing)

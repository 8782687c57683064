"""Blocks in memory cannot be changed by anybody and outlive their eviction for whoever holds them."""

import mmap
import os
import resource

import pytest

from cache.handle import Handle, seal_block
from cache.memory_shelf import MemoryShelf, raise_open_file_limit, split_open_files
from connectors.errors import BadInputError

KEY = bytes(16)


def test_a_sealed_block_refuses_every_change() -> None:
    block = seal_block(KEY, b"abc")
    fd = block.memory.fd
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 9)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 3)
    view = block.map()
    assert view == b"abc"
    assert view.readonly


def test_a_holder_keeps_the_bytes_after_the_block_was_removed() -> None:
    shelf = MemoryShelf()
    shelf.write(seal_block(KEY, b"abc"))
    with Handle(shelf.open(KEY, 3), 3, "ram") as handle:
        shelf.remove(KEY, 3)
        with pytest.raises(FileNotFoundError):
            shelf.open(KEY, 3)
        assert os.pread(handle.fd, 9, 0) == b"abc"


def test_the_file_is_closed_when_the_last_holder_lets_go() -> None:
    block = seal_block(KEY, b"abc")
    fd = block.memory.fd
    first, second = (Handle(block.memory, 3, "ram") for _ in range(2))
    del block
    first.close()
    first.close()
    assert os.fstat(fd).st_size == 3
    second.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        _ = second.fd


def test_a_block_costs_whole_pages() -> None:
    shelf = MemoryShelf()
    assert [shelf.cost_bytes(length) for length in (1, 4096, 4097)] == [4096, 4096, 8192]


def test_a_descriptor_per_block_needs_the_hard_limit() -> None:
    limit = raise_open_file_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(limit, 1 << 20)


def test_too_few_descriptors_are_refused_before_they_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 256))
    with pytest.raises(BadInputError, match=r"256 files open, .* 512 at least.*ulimit -Hn"):
        raise_open_file_limit()


@pytest.mark.parametrize(
    ("max_files", "in_memory", "arriving"),
    [(512, 256, 8), (1024, 512, 16), (4096, 3072, 64), (1 << 20, 3 << 18, 1 << 14)],
)
def test_files_are_left_for_more_than_blocks_in_memory(max_files: int, in_memory: int, arriving: int) -> None:
    assert split_open_files(max_files) == (in_memory, arriving)

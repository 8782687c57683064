"""A file of a block is open as long as anybody holds it, and cannot be changed."""

import contextlib
import fcntl
import os

import pytest

from cache.handle import Handle, seal_block

DATA = bytes(range(256))


def is_open(inode: int) -> bool:
    """Ask for the file, not for a number, which another thread may have by now."""
    found = False
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found |= os.fstat(int(number)).st_ino == inode
    return found


def test_a_file_is_closed_with_its_last_holder() -> None:
    block = seal_block(bytes(16), DATA)
    inode = os.fstat(block.memory.fd).st_ino
    with Handle(block.memory, block.length, "ring") as handle:
        del block
        assert os.pread(handle.fd, 1000, 0) == DATA
        assert is_open(inode)
    assert not is_open(inode)


def test_a_closed_handle_has_no_descriptor_and_closing_it_again_is_harmless() -> None:
    block = seal_block(bytes(16), DATA)
    handle = Handle(block.memory, block.length, "ring")
    handle.close()
    handle.close()
    with pytest.raises(ValueError, match="closed"):
        _ = handle.fd
    assert os.pread(block.memory.fd, 1000, 0) == DATA


def test_a_sealed_block_cannot_be_changed_shortened_or_unsealed() -> None:
    memory = seal_block(bytes(16), DATA).memory
    with pytest.raises(PermissionError):
        os.pwrite(memory.fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 1)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, 0)


def test_a_handle_says_what_it_stands_for() -> None:
    handle = Handle(seal_block(bytes(16), DATA).memory, len(DATA), "ram", verify=True)
    assert repr(handle) == "Handle(length=256, source='ram', verify=True)"

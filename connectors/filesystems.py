"""Which file systems are disks of this machine, told by `statfs(2)`.

A file on a local disk is best read in place, by whoever needs it: the kernel's page cache is the cache. A shared file
system (Lustre, GPFS, CephFS, NFS, anything behind FUSE) is an origin like an object store: slow, busy with others, and
able to turn a mapped page into SIGBUS. What is not known to be local counts as shared: costs a copy, is never wrong.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["filesystem_magic", "is_local", "mount_of", "mount_points", "parse_mount_points"]

# Numbers from statfs(2) and linux/magic.h.
_LOCAL = frozenset(
    {
        0x0000EF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x794C7630,  # overlayfs
        0x2FC12FC1,  # zfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        0x73717368,  # squashfs
        0xE0F5E1E2,  # erofs
        0x00009660,  # iso9660
        0x00004D44,  # vfat
        0x2011BAB0,  # exfat
        0x3153464A,  # jfs
    }
)
_OCTAL = re.compile(r"\\([0-7]{3})")
# Larger than struct statfs anywhere (120 bytes on 64-bit machines); f_type is its first field, one machine word.
_STATFS_BYTES = 512


def filesystem_magic(path: str) -> int:
    """Return `f_type` of the file system that holds `path`. `os.statvfs` does not carry it, hence the C function.

    Raises:
        OSError: As the system call fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.statfs(os.fsencode(path), answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return ctypes.c_long.from_buffer(answer).value & 0xFFFFFFFF


def is_local(path: str, *, magic_of: Callable[[str], int] = filesystem_magic) -> bool:
    """Say whether `path` lies on a disk (or in the memory) of this machine.

    A path that does not exist yet is judged by its nearest parent that does. `magic_of` stands in for the system call.
    """
    path = os.path.realpath(path)
    while True:
        try:
            return magic_of(path) in _LOCAL
        except (FileNotFoundError, NotADirectoryError):
            path = os.path.dirname(path)
        except OSError:
            return False


@cache
def mount_points() -> frozenset[str]:
    """Return where file systems are mounted, as this process first saw it; none where the kernel does not say."""
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return frozenset()
    return parse_mount_points(text)


def parse_mount_points(text: str) -> frozenset[str]:
    """Return the mount points in the text of a `mountinfo` (proc(5)), where odd characters are octal. Pure."""
    fields = (line.split(" ") for line in text.splitlines())
    return frozenset(_OCTAL.sub(lambda found: chr(int(found[1], 8)), field[4]) for field in fields if len(field) > 4)


def mount_of(path: str, mounts: frozenset[str]) -> str:
    """Return the mount point that an absolute path lies below, by its name alone: no link is looked at. Pure."""
    while path not in mounts and path != "/":
        path = path.rpartition("/")[0] or "/"
    return path

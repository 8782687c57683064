"""What processes leave behind, read from /proc."""

from __future__ import annotations

import os
import select
from pathlib import Path

__all__ = ["children", "dies_within", "slot_mappings"]


def children(pid: int | None = None) -> set[int]:
    """Return the living child processes of a process, by default of this one."""
    parent = os.getpid() if pid is None else pid
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.add(int(entry.name))
    return found


def dies_within(pid: int, seconds: float) -> bool:
    """Wait until a process has ended; say whether it did in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def slot_mappings(pid: int | None = None) -> int:
    """Return how many slots of shared memory a process has mapped."""
    lines = Path(f"/proc/{os.getpid() if pid is None else pid}/maps").read_text().splitlines()
    return sum("memfd:dataflow-slot" in line for line in lines)

"""Whose servers to believe: what comes from one is trained on, so nobody may put one in the place of another.

The servers of this user and of root are believed wherever they listen. One of another user, such as a daemon that runs
as a user of its own, is believed where it cannot have put itself: at the path of a socket whose folders, all the way
down from the root, belong to root, to this user or to the server's user, and where nobody else may write. So root or
this user has given it that place. In a folder like /tmp, where everybody may make something, whoever comes first has
the name, and so it is with abstract addresses.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

__all__ = ["trusts"]


def trusts(address: str, uid: int, *, status_of: Callable[[str], os.stat_result] = os.lstat) -> bool:
    """Say whether to believe the server of a user at an address; `status_of` stands in for the system call."""
    known = {0, os.geteuid()}
    if uid in known:
        return True
    folder = os.path.dirname(address)
    # Where a link or `..` is on the way, both the way that was written and the one it leads to have to be good.
    if not address.startswith("/") or folder != os.path.normpath(folder):
        return False
    try:
        return all(_was_given(way, uid, known, status_of) for way in {folder, os.path.realpath(folder)})
    except OSError:
        return False


def _was_given(folder: str, uid: int, known: set[int], status_of: Callable[[str], os.stat_result]) -> bool:
    """Say whether nobody but the known users can have let this one put a socket into a folder."""
    inside_uid = uid
    while True:
        status = status_of(folder)
        if status.st_uid not in known and status.st_uid != uid:
            return False
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode)
        # In a sticky folder others may make something, but not move what belongs to somebody else.
        if shared and not (status.st_mode & stat.S_ISVTX and inside_uid in known):
            return False
        inside_uid = status.st_uid
        if folder == "/":
            return True
        folder = os.path.dirname(folder)

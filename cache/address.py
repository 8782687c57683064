"""Where a cache server listens, and how a socket is bound there so that exactly one server has it.

An address is the path of a socket, or `@name` in Linux's abstract namespace, which needs no file, vanishes with its
last holder and cannot be bound twice. A path can go stale: the file of a killed daemon stays. Whoever wants it holds a
lock of the folder while it proves by connecting that nobody answers, removes the file and binds, so two starting
daemons cannot remove each other's socket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from cache.config import CacheConfig
from connectors.errors import BadInputError, DataError, PermissionDeniedError

__all__ = [
    "ENVIRONMENT",
    "answers",
    "daemon_addresses",
    "default_address",
    "listen",
    "peer",
    "private_address",
    "remove_socket",
    "socket_address",
    "unused_address",
]

ENVIRONMENT = "DATAFLOW_CACHE"
SYSTEM_ADDRESS = "/run/dataflow/cache.sock"

_MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its NUL
_PEER = struct.Struct("3i")


def socket_address(address: str) -> str:
    """Return what the socket module takes.

    Raises:
        BadInputError: The address is empty, relative or longer than the kernel takes.
    """
    if not address.startswith(("/", "@")) or len(address) < 2:
        raise BadInputError(f"a cache server's address is an absolute path or @name, got {address!r}")
    if len(os.fsencode(address)) > _MAX_SOCKET_PATH_BYTES:
        raise BadInputError(f"{address} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes a socket's path may have")
    return "\0" + address[1:] if address.startswith("@") else address


def default_address(environ: Mapping[str, str] = os.environ) -> str:
    """Return where a daemon of this user listens unless told otherwise."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):  # else it is to be ignored, says its specification
        return os.path.join(runtime, "dataflow", "cache.sock")
    if os.geteuid() == 0:
        return SYSTEM_ADDRESS
    return f"/tmp/dataflow-{os.geteuid()}/cache.sock"  # noqa: S108  the folder's owner and mode are checked


def daemon_addresses(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return where a client looks for a daemon: what `DATAFLOW_CACHE` names, or else this user's and the machine's."""
    if named := environ.get(ENVIRONMENT):
        return [named]
    return list(dict.fromkeys([default_address(environ), SYSTEM_ADDRESS]))


def private_address(config: CacheConfig) -> str:
    """Return the address of a private server.

    Servers of the same user and directories have the same address, so the processes of a node that name one directory
    share one server. Without a directory there is nothing to share and the address is a new one.
    """
    paths = sorted(os.path.realpath(place.path) for tier in config.tiers for place in tier.places)
    if not paths:
        return unused_address()
    digest = hashlib.blake2b("\0".join(paths).encode(errors="surrogateescape"), digest_size=16)
    return f"@dataflow-{os.geteuid()}-{digest.hexdigest()}"


def unused_address() -> str:
    """Return an address that nobody else has."""
    return f"@dataflow-{os.geteuid()}-{secrets.token_hex(16)}"


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return process id and user id of the other side, as the kernel saw them when it connected or listened."""
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def listen(address: str, *, mode: int = 0o600, group_id: int | None = None) -> socket.socket:
    """Bind and listen.

    Args:
        address: Where.
        mode: Permissions of a socket file; an abstract address has none and relies on the peer's user id.
        group_id: Group of the socket file; None leaves this process's own.

    Raises:
        BadInputError: A live server has the address, or a file that is no socket stands there.
        PermissionDeniedError: The folder belongs to somebody else.
    """
    target = socket_address(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if address.startswith("@"):
            listener.bind(target)
            listener.listen(socket.SOMAXCONN)
        else:
            folder = os.path.dirname(address)
            _make_folder(folder, 0o755 if mode & 0o077 else 0o700)
            with _locked(folder):
                _clear(address)
                listener.bind(target)
                if group_id is not None:
                    _give_to_group(address, group_id)
                Path(address).chmod(mode)
                # Under the lock too: bound but not yet listening, it looks like a dead server's.
                listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if isinstance(error, DataError):
            raise
        if error.errno == errno.EADDRINUSE:
            raise _taken(address) from error
        raise BadInputError(f"cannot listen at {address}: {error.strerror}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def remove_socket(listener: socket.socket) -> None:
    """Close a listener and remove its file, unless another server has put its own there meanwhile."""
    name = listener.getsockname()
    if isinstance(name, str) and name:
        with contextlib.suppress(OSError), _locked(os.path.dirname(name)):
            listener.close()
            if not answers(name):
                Path(name).unlink()
    listener.close()


def _make_folder(folder: str, mode: int) -> None:
    """Make the socket's folder; refuse one that another user could have prepared."""
    with contextlib.suppress(FileExistsError):
        Path(folder).mkdir(mode, parents=True)
        Path(folder).chmod(mode)  # the umask may have kept out those who are to be let in
    found = os.stat(folder)
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid not in (os.geteuid(), 0) or (shared and not found.st_mode & stat.S_ISVTX):
        raise PermissionDeniedError(
            f"{folder} belongs to user {found.st_uid} or others may write it; put the socket in a folder of your own"
        )


def _give_to_group(path: str, group_id: int) -> None:
    try:
        os.chown(path, -1, group_id)
    except PermissionError as error:
        raise BadInputError(
            f"cannot give {path} to group {group_id}: user {os.geteuid()} is no member of it; make it one"
        ) from error


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(path: str) -> None:
    """Remove the socket of a dead server."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BadInputError(f"{path} exists and is no socket; choose another address or remove it")
    if answers(path):
        raise _taken(path)
    Path(path).unlink()


def answers(address: str) -> bool:
    """Say whether somebody listens at an address. Never waits."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(socket_address(address))
        except (ConnectionRefusedError, FileNotFoundError, NotADirectoryError, PermissionError, BadInputError):
            return False
        except BlockingIOError:  # its backlog is full: busy, not dead
            return True
    return True


def _taken(address: str) -> BadInputError:
    return BadInputError(f"a cache server already listens at {address}; use it, stop it, or choose another address")

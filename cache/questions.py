"""What a client asks of a server, and what it makes of the answers, on one connection.

What arrives is not trusted blindly: lengths are compared with what was asked, blocks from a disk are read (a map of a
failing disk is SIGBUS) and verified by their trailer. What the server says went wrong is a value here, not raised: the
connection is in good order then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

from cache.block import trailer_bytes, verify
from cache.connection import Connection
from cache.frames import (
    MAX_BLOCKS,
    MAX_REQUEST_BYTES,
    Blocks,
    Failed,
    Inline,
    Listing,
    ListObjects,
    Object,
    Passed,
    ReadBlocks,
    ReadObject,
    Reply,
    Request,
    error_of,
)
from cache.handle import Descriptor
from cache.keys import BlockRef, block_key
from cache.memory_map import map_memory
from cache.reader import BlockData, ObjectData
from connectors.errors import CorruptError, DataError, ErrorKind
from connectors.objects import ObjectMeta

__all__ = ["ask", "ask_blocks", "ask_listing", "ask_object", "cut_batches"]

_log = logging.getLogger(__name__)
_R = TypeVar("_R", bound=Reply)


def cut_batches(refs: Sequence[BlockRef], places: Sequence[int]) -> Iterator[list[int]]:
    """Cut what is wanted into requests that the server accepts. Pure."""
    batch: list[int] = []
    size_bytes = 0
    for place in places:
        # Text is at most 4 bytes a character, names and numbers stay below 128.
        cost_bytes = 4 * (len(refs[place].uri) + len(refs[place].version)) + 128
        if batch and (len(batch) == MAX_BLOCKS or size_bytes + cost_bytes > MAX_REQUEST_BYTES - 64):
            yield batch
            batch, size_bytes = [], 0
        batch.append(place)
        size_bytes += cost_bytes
    if batch:
        yield batch


def ask(request: Request, expected: type[_R], connection: Connection) -> _R | DataError:
    """Ask what is answered by one message of the type `expected`."""
    reply, _ = connection.ask_once(request)
    if isinstance(reply, Failed):
        return error_of(reply)
    if not isinstance(reply, expected):
        raise _nonsense(connection, f"answered {type(request).__name__} with {type(reply).__name__}")
    return reply


def ask_listing(url: str, connection: Connection) -> list[ObjectMeta] | DataError:
    """Ask for everything below a URL."""
    found: list[ObjectMeta] = []
    for reply, _ in connection.ask(ListObjects(url)):
        if isinstance(reply, Failed):
            return error_of(reply)
        if not isinstance(reply, Listing):
            raise _nonsense(connection, f"answered a listing with {type(reply).__name__}")
        found += reply.objects
    return found


def ask_object(uri: str, connection: Connection) -> ObjectData | DataError:
    """Ask for a whole object."""
    reply, descriptors = connection.ask_once(ReadObject(uri))
    if isinstance(reply, Failed):
        return error_of(reply)
    if not isinstance(reply, Object):
        raise _nonsense(connection, f"answered an object with {type(reply).__name__}")
    data = _read(descriptors[0], reply.size_bytes) if reply.data is None else reply.data
    if len(data) != reply.size_bytes:
        raise _nonsense(connection, f"gave {len(data)} bytes of the {reply.size_bytes} of {uri}")
    return ObjectData(data, reply.version)


def ask_blocks(
    refs: Sequence[BlockRef],
    batch: Sequence[int],
    results: list[BlockData | DataError | None],
    connection: Connection,
) -> DataError | None:
    """Fill `results` at the places of `batch` that are still empty. A corrupt copy leaves its place empty."""
    batch = [place for place in batch if results[place] is None]
    places = iter(batch)
    arrived = 0
    for reply, descriptors in connection.ask(ReadBlocks([refs[place] for place in batch])):
        if isinstance(reply, Failed):
            return error_of(reply)
        if not isinstance(reply, Blocks):
            raise _nonsense(connection, f"answered blocks with {type(reply).__name__}")
        arrived += len(reply.items)
        if arrived > len(batch):
            break
        for item in reply.items:
            place = next(places)
            descriptor = descriptors.pop(0) if isinstance(item, Passed) else None
            results[place] = _receive(refs[place], item, descriptor, connection)
    if arrived != len(batch):
        raise _nonsense(connection, f"answered {len(batch)} blocks with {arrived}")
    return None


def _receive(
    ref: BlockRef, item: Inline | Passed | Failed, descriptor: Descriptor | None, connection: Connection
) -> BlockData | DataError | None:
    if isinstance(item, Failed):
        return error_of(item)
    length = len(item.data) if isinstance(item, Inline) else item.length
    if length != ref.length:
        raise _nonsense(connection, f"gave {length} bytes for a block of {ref.length}")
    if isinstance(item, Inline):
        return BlockData(memoryview(item.data), item.source)
    assert descriptor is not None
    view = _read_verified(ref, descriptor) if item.verify else _map(descriptor, length)
    return None if view is None or len(view) != length else BlockData(view, item.source)


def _read_verified(ref: BlockRef, descriptor: Descriptor) -> memoryview | None:
    try:
        whole = memoryview(_read(descriptor, ref.length + trailer_bytes(ref.length)))
        verify(block_key(ref), whole[: ref.length], whole[ref.length :])
    except (OSError, CorruptError) as error:
        # As text: a log record that kept the error would keep its frames, and the blocks in them.
        reason = str(error)
        _log.warning("a cached copy of %s at offset %d is bad and is fetched again: %s", ref.uri, ref.offset, reason)
        return None
    return whole[: ref.length]


def _map(descriptor: Descriptor, length: int) -> memoryview:
    try:
        return map_memory(descriptor.fd, length)
    except (OSError, ValueError):
        return memoryview(_read(descriptor, length))


def _read(descriptor: Descriptor, length: int) -> bytes:
    """Read the first `length` bytes, or what there is of them."""
    data = os.pread(descriptor.fd, length, 0)
    if len(data) == length:
        return data
    pieces = [data]  # one call gives 2 GiB at most
    done = len(data)
    while done < length and (piece := os.pread(descriptor.fd, length - done, done)):
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


def _nonsense(connection: Connection, what: str) -> DataError:
    return DataError(f"the cache server at {connection.address} {what}", kind=ErrorKind.PROTOCOL)

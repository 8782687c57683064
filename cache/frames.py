"""The wire between a client and its cache server: what is said, and how it is cut into frames. Pure: opens no socket.

    frame = u32 little endian length | msgpack of one message

A connection begins with `Hello` and `Welcome`; then the client asks and the server answers, one request at a time. An
answer is one message, save that blocks and listings may take several (`last` ends them) and that `Waiting` may come
before any, as a sign of life. A block of at most `INLINE_BYTES` travels in the message; a larger one as a descriptor
beside it (SCM_RIGHTS), in the order in which the message names them, at most `MAX_DESCRIPTORS` a message.

Both sides refuse a frame above their limit from its first four bytes, before anything is kept of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec

from cache.block_table import MAX_TABLE_BLOCKS, TablePage
from cache.keys import KEY_BYTES, BlockRef
from cache.orders import Order, Report
from connectors.errors import BadInputError, DataError, ErrorKind, error_from_kind
from connectors.objects import ObjectMeta
from connectors.protocols import Buffer

__all__ = [
    "INLINE_BYTES",
    "MAX_BLOCKS",
    "MAX_DESCRIPTORS",
    "MAX_JOB_LENGTH",
    "MAX_PLAN_BLOCKS",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "PROTOCOL_VERSION",
    "AdvancePlan",
    "Blocks",
    "Done",
    "ExtendPlan",
    "Failed",
    "FrameReader",
    "Head",
    "Hello",
    "Inline",
    "ListObjects",
    "Listing",
    "Meta",
    "Object",
    "OpenPlan",
    "Passed",
    "PlanOpened",
    "ReadBlocks",
    "ReadObject",
    "ReplacePlan",
    "Reply",
    "ReportBad",
    "Request",
    "Statistics",
    "Stats",
    "TablePage",
    "Waiting",
    "Welcome",
    "encode",
    "error_of",
    "failure_of",
    "replies",
    "requests",
]

PROTOCOL_VERSION = 1
INLINE_BYTES = 64 * 1024
MAX_DESCRIPTORS = 64
"""Descriptors beside one message; the kernel takes 253."""
MAX_BLOCKS = 4096
"""Blocks named in one request."""
MAX_JOB_LENGTH = 128
MAX_PLAN_BLOCKS = 1 << 16
"""Block numbers in one request."""
MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_REPLY_BYTES = 8 * 1024 * 1024

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """First message of a client, with the name of the job that it works for."""

    version: int
    job: Annotated[str, msgspec.Meta(max_length=MAX_JOB_LENGTH)] = ""


class ReadBlocks(msgspec.Struct, tag="blocks", frozen=True):
    """Ask for blocks; answered by `Blocks`."""

    refs: Annotated[list[BlockRef], msgspec.Meta(max_length=MAX_BLOCKS)]


class ReadObject(msgspec.Struct, tag="object", frozen=True):
    """Ask for the newest content of a whole object; answered by `Object`."""

    uri: str


class ListObjects(msgspec.Struct, tag="list", frozen=True):
    """Ask for everything below a URL; answered by `Listing`."""

    url: str


class Head(msgspec.Struct, tag="head", frozen=True):
    """Ask for size and version of an object; answered by `Meta`."""

    uri: str


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Ask for numbers; answered by `Statistics`."""


class ReportBad(msgspec.Struct, tag="bad", frozen=True):
    """Say that the stored copies of these blocks failed their checksums; answered by `Done`, once they were checked."""

    refs: Annotated[list[BlockRef], msgspec.Meta(max_length=MAX_BLOCKS)]


class OpenPlan(msgspec.Struct, tag="plan", frozen=True):
    """Begin this connection's plan over the table with this digest; answered by `PlanOpened`.

    Where the server does not know the table, its pages follow, each as a `TablePage` that `Done` answers. The plan ends
    with the connection.
    """

    table: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=MAX_TABLE_BLOCKS)]


class ExtendPlan(msgspec.Struct, tag="extend", frozen=True):
    """Append block numbers (int32, little-endian) to this connection's plan; answered by `Done`."""

    blocks: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_PLAN_BLOCKS)]


class AdvancePlan(msgspec.Struct, tag="advance", frozen=True):
    """Say that the reader has passed all places of its plan before this one; answered by `Done`."""

    position: Annotated[int, msgspec.Meta(ge=0)]


class ReplacePlan(msgspec.Struct, tag="replace", frozen=True):
    """Drop what lies ahead in this connection's plan; answered by `Done`."""


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """First message of a server."""

    version: int
    pid: int


class Inline(msgspec.Struct, tag="inline", frozen=True):
    """A block in the message itself."""

    source: str
    data: bytes


class Passed(msgspec.Struct, tag="passed", frozen=True):
    """A block in the next descriptor. `verify`: a trailer follows the data, and it has to be read and checked."""

    source: str
    length: int
    verify: bool


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """What went wrong, with one block or with a whole request."""

    kind: str
    message: str
    uri: str | None = None


class Blocks(msgspec.Struct, tag="blocks", frozen=True):
    """The next blocks of a request, in its order."""

    items: Annotated[list[Inline | Passed | Failed], msgspec.Meta(max_length=MAX_BLOCKS)]
    last: bool


class Object(msgspec.Struct, tag="object", frozen=True):
    """A whole object: `data`, or None when its `size_bytes` are in the descriptor beside the message."""

    version: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    data: bytes | None


class Listing(msgspec.Struct, tag="listing", frozen=True):
    """The next objects of a listing."""

    objects: list[ObjectMeta]
    last: bool


class Meta(msgspec.Struct, tag="meta", frozen=True):
    """One object's description."""

    meta: ObjectMeta


class Statistics(msgspec.Struct, tag="stats", frozen=True):
    """Numbers, as JSON types."""

    stats: dict[str, Any]


class PlanOpened(msgspec.Struct, tag="plan", frozen=True):
    """A plan has begun; `table_known` or not."""

    table_known: bool


class Done(msgspec.Struct, tag="done", frozen=True):
    """Nothing to say but that it happened."""


class Waiting(msgspec.Struct, tag="waiting", frozen=True):
    """The server lives and is at it; the answer follows."""


Request: TypeAlias = (
    Hello
    | ReadBlocks
    | ReadObject
    | ListObjects
    | Head
    | Stats
    | ReportBad
    | OpenPlan
    | TablePage
    | ExtendPlan
    | AdvancePlan
    | ReplacePlan
    | Order
)
Reply: TypeAlias = (
    Welcome | Blocks | Object | Listing | Meta | Statistics | PlanOpened | Report | Done | Waiting | Failed
)

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_M = TypeVar("_M")


def encode(message: Request | Reply) -> bytes:
    """Return the frame of a message.

    Raises:
        BadInputError: A text in it has no UTF-8 form (the name of a file may be any bytes), or a number has no room.
    """
    frame = bytearray(_LENGTH.size)
    try:
        _encoder.encode_into(message, frame, _LENGTH.size)
    except UnicodeEncodeError as error:
        raise BadInputError(f"{error.object!r} cannot be sent to a cache server: it is not UTF-8") from error
    except OverflowError as error:
        raise BadInputError("a number of more than 64 bits cannot be sent to a cache server") from error
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return bytes(frame)


class FrameReader(Generic[_M]):
    """Cuts a stream into messages, whatever pieces it arrives in. Made by `requests` and `replies`."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[_M], max_bytes: int) -> None:
        self._decoder = decoder
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: Buffer) -> Iterator[_M]:
        """Take what arrived and yield every message that it completes.

        Raises:
            DataError: With kind `PROTOCOL`: what arrived is no frame of ours. The connection cannot be used further.
        """
        # What begins here is cut where it lies; only a frame that arrives in pieces has to be put together.
        whole = data
        if self._buffer:
            self._buffer += data
            whole = self._buffer
        begin = 0
        try:
            while len(whole) - begin >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(whole, begin)
                if length > self._max_bytes:
                    raise _garbage(f"a frame of {length} bytes is above the limit of {self._max_bytes}")
                end = begin + _LENGTH.size + length
                if len(whole) < end:
                    break
                with memoryview(whole) as view, view[begin + _LENGTH.size : end] as body:
                    message = self._decode(body)
                begin = end
                yield message
        finally:
            if whole is self._buffer:
                del self._buffer[:begin]
            else:
                self._buffer += whole[begin:]

    def _decode(self, body: memoryview) -> _M:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _garbage(f"a frame that cannot be read ({error})") from error

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)


def requests() -> FrameReader[Request]:
    """Return the reader for a server's side of a connection."""
    return FrameReader(_requests, MAX_REQUEST_BYTES)


def replies() -> FrameReader[Reply]:
    """Return the reader for a client's side of a connection."""
    return FrameReader(_replies, MAX_REPLY_BYTES)


def failure_of(error: DataError) -> Failed:
    """Describe an error for the other side."""
    return Failed(error.kind.value, str(error), error.uri)


def error_of(failure: Failed) -> DataError:
    """Rebuild the error that the other side described."""
    return error_from_kind(failure.kind, failure.message, failure.uri)


def _garbage(found: str) -> DataError:
    return DataError(f"the other side of a cache connection sent {found}", kind=ErrorKind.PROTOCOL)

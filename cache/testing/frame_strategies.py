"""Hypothesis strategies for what stands on the wire: messages of either side, and what is none."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from cache import frames, orders
from cache.block_table import TablePage
from cache.frames import encode
from cache.keys import KEY_BYTES, BlockRef
from connectors.objects import ObjectMeta

__all__ = ["garbage", "reply_messages", "request_messages"]

_text = st.text(max_size=30)
_sizes = st.integers(0, 2**63 - 1)
_failures = st.builds(frames.Failed, _text, _text, st.none() | _text)
_metas = st.builds(ObjectMeta, _text, _sizes, _text)


def _columns(width: int) -> st.SearchStrategy[bytes]:
    """One column of a table: about three numbers of `width` bytes."""
    return st.integers(0, 3).map(lambda rows: bytes(rows * width)) | st.binary(max_size=3 * width)


def request_messages(uris: st.SearchStrategy[str] = _text) -> st.SearchStrategy[frames.Request]:
    """Everything that a client may say, sensible or not; its objects are of `uris`."""
    refs = st.builds(
        BlockRef, uris, _text, st.integers(0, 2**62), st.integers(1, 2**62 - 1), st.none() | st.integers(0, 2**32 - 1)
    )
    pages = st.builds(
        TablePage,
        st.lists(uris, max_size=3),
        st.lists(_text, max_size=3),
        _columns(4),
        _columns(8),
        st.just(struct.pack("<3q", 1, 1, 1)) | _columns(8),
        st.none() | _columns(4),
    )
    return st.one_of(
        st.builds(frames.Hello, st.integers(0, 2**31)),
        st.builds(frames.ReadBlocks, st.lists(refs, max_size=8)),
        st.builds(frames.ReadObject, uris),
        st.builds(frames.ListObjects, uris),
        st.builds(frames.Head, uris),
        st.builds(frames.Stats),
        st.builds(frames.ReportBad, st.lists(refs, max_size=4)),
        st.builds(frames.OpenPlan, st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.integers(1, 9)),
        pages,
        st.builds(frames.ExtendPlan, st.binary(max_size=20)),
        st.builds(frames.AdvancePlan, _sizes),
        st.builds(frames.ReplacePlan),
        st.builds(orders.AskUsage, uris, st.integers(0, 1), _text),
        st.builds(orders.PinPrefix, uris, _sizes, st.none() | st.floats(0, exclude_min=True, allow_nan=False)),
        st.builds(orders.UnpinPrefix, uris),
        st.builds(orders.EvictPrefix, uris),
        st.builds(orders.ResizeTier, _text, _sizes, st.none() | _sizes),
    )


def reply_messages() -> st.SearchStrategy[frames.Reply]:
    """Everything that a server may say."""
    items = st.one_of(
        st.builds(frames.Inline, _text, st.binary(max_size=99)),
        st.builds(frames.Passed, _text, _sizes, st.booleans()),
        _failures,
    )
    return st.one_of(
        st.builds(frames.Welcome, _sizes, _sizes),
        st.builds(frames.Blocks, st.lists(items), st.booleans()),
        st.builds(frames.Object, _text, st.integers(0, 2**31), st.none() | st.binary()),
        st.builds(frames.Listing, st.lists(_metas), st.booleans()),
        st.builds(frames.Meta, _metas),
        st.builds(frames.Statistics, st.dictionaries(_text, _sizes)),
        st.builds(frames.PlanOpened, st.booleans()),
        st.builds(orders.PinsKept, st.booleans()),
        st.builds(orders.Removed, st.builds(orders.Evicted, _sizes, _sizes)),
        st.builds(orders.Held, st.lists(st.builds(orders.Usage, _text, st.dictionaries(_text, _sizes))), st.booleans()),
        st.builds(frames.Done),
        st.builds(frames.Waiting),
        _failures,
    )


def garbage() -> st.SearchStrategy[bytes]:
    """Bytes, framed bytes, and requests with one byte changed."""

    def damaged(frame: bytes, place: int, byte: int) -> bytes:
        place %= len(frame)
        return frame[:place] + bytes([byte]) + frame[place + 1 :]

    return st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(lambda body: struct.pack("<I", len(body)) + body),
        st.builds(damaged, request_messages().map(encode), st.integers(0, 10**6), st.integers(0, 255)),
    )

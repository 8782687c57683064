import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import frames
from cache.frames import Blocks, Failed, Inline, Passed, ReadBlocks, ReportBad, encode, replies, requests
from cache.keys import BlockRef
from connectors.errors import ChangedError, DataError, ErrorKind
from connectors.objects import ObjectMeta

text = st.text(max_size=30)
sizes = st.integers(0, 2**63 - 1)
refs = st.builds(BlockRef, text, text, sizes, st.integers(1, 2**62), st.none() | st.integers(0, 2**32 - 1))
failures = st.builds(Failed, text, text, st.none() | text)
metas = st.builds(ObjectMeta, text, sizes, text)
request_messages = st.one_of(
    st.builds(frames.Hello, st.integers(0, 2**31)),
    st.builds(ReadBlocks, st.lists(refs, max_size=8)),
    st.builds(frames.ReadObject, text),
    st.builds(frames.ListObjects, text),
    st.builds(frames.Head, text),
    st.builds(frames.Stats),
    st.builds(ReportBad, st.lists(refs, max_size=4)),
)
reply_messages = st.one_of(
    st.builds(frames.Welcome, sizes, sizes),
    st.builds(
        Blocks,
        st.lists(
            st.builds(Inline, text, st.binary(max_size=99)) | st.builds(Passed, text, sizes, st.booleans()) | failures
        ),
        st.booleans(),
    ),
    st.builds(frames.Object, text, sizes, st.none() | st.binary()),
    st.builds(frames.Listing, st.lists(metas), st.booleans()),
    st.builds(frames.Meta, metas),
    st.builds(frames.Statistics, st.dictionaries(text, sizes)),
    st.builds(frames.Done),
    st.builds(frames.Waiting),
    failures,
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(messages=st.lists(request_messages, max_size=5), cuts=st.lists(st.integers(0, 10**6), max_size=10))
def test_requests_arrive_whole_and_in_order_however_the_stream_is_cut(messages, cuts):
    reader, stream = requests(), b"".join(encode(message) for message in messages)
    assert [found for piece in pieces(stream, cuts) for found in reader.feed(piece)] == messages
    assert reader.pending_bytes == 0


@given(messages=st.lists(reply_messages, max_size=5), cuts=st.lists(st.integers(0, 10**6), max_size=10))
def test_replies_arrive_whole_and_in_order_however_the_stream_is_cut(messages, cuts):
    reader, stream = replies(), b"".join(encode(message) for message in messages)
    assert [found for piece in pieces(stream, cuts) for found in reader.feed(piece)] == messages


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


garbage = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=60).map(framed),
    st.tuples(request_messages.map(encode), st.integers(0, 10**6), st.integers(0, 255)).map(
        lambda made: made[0][: made[1] % len(made[0])] + bytes([made[2]]) + made[0][made[1] % len(made[0]) + 1 :]
    ),
)


@given(stream=st.lists(garbage, max_size=4).map(b"".join), cuts=st.lists(st.integers(0, 10**6), max_size=10))
@pytest.mark.parametrize(
    ("reader_of", "limit"), [(requests, frames.MAX_REQUEST_BYTES), (replies, frames.MAX_REPLY_BYTES)]
)
def test_any_bytes_give_messages_or_one_protocol_error(reader_of, limit, stream, cuts):
    reader = reader_of()
    for piece in pieces(stream, cuts):
        try:
            list(reader.feed(piece))
        except DataError as error:
            assert error.kind is ErrorKind.PROTOCOL  # noqa: PT017  either outcome is right
            return
        assert reader.pending_bytes <= limit + 4


@pytest.mark.parametrize("reader_of", [requests, replies])
def test_a_frame_above_the_limit_is_refused_by_its_length_alone(reader_of):
    reader = reader_of()
    with pytest.raises(DataError, match="above the limit") as caught:
        list(reader.feed(struct.pack("<I", 2**31)))
    assert caught.value.kind is ErrorKind.PROTOCOL
    assert reader.pending_bytes == 4


def test_messages_before_the_garbage_are_delivered():
    found = requests().feed(encode(frames.Stats()) + framed(b"\xc1"))
    assert next(found) == frames.Stats()
    with pytest.raises(DataError):
        next(found)


@pytest.mark.parametrize(
    "body",
    [
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": -1, "length": 5}]},
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": 0, "length": 0}]},
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": 0, "length": 1}] * (frames.MAX_BLOCKS + 1)},
        {"type": "bad", "refs": [{"uri": "u", "version": "v", "offset": 0}]},
        {"type": "unheard of"},
    ],
)
def test_a_request_that_makes_no_sense_is_a_protocol_error(body):
    with pytest.raises(DataError) as caught:
        list(requests().feed(framed(msgspec.msgpack.encode(body))))
    assert caught.value.kind is ErrorKind.PROTOCOL


def test_an_error_keeps_class_kind_message_and_object_across_the_wire():
    error = ChangedError("gone other", uri="s3://b/k")
    [failure] = replies().feed(encode(frames.failure_of(error)))
    found = frames.error_of(failure)
    assert (type(found), found.kind, str(found), found.uri) == (
        ChangedError,
        ErrorKind.CHANGED,
        "gone other",
        "s3://b/k",
    )

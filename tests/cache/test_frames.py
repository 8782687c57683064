import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import frames
from cache.frames import encode, replies, requests
from cache.orders import ResizeTier
from cache.testing import garbage, reply_messages, request_messages
from connectors.errors import BadInputError, ChangedError, DataError, ErrorKind


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(messages=st.lists(request_messages(), max_size=5), cuts=st.lists(st.integers(0, 10**6), max_size=10))
def test_requests_arrive_whole_and_in_order_however_the_stream_is_cut(messages, cuts):
    reader, stream = requests(), b"".join(encode(message) for message in messages)
    assert [found for piece in pieces(stream, cuts) for found in reader.feed(piece)] == messages
    assert reader.pending_bytes == 0


@given(messages=st.lists(reply_messages(), max_size=5), cuts=st.lists(st.integers(0, 10**6), max_size=10))
def test_replies_arrive_whole_and_in_order_however_the_stream_is_cut(messages, cuts):
    reader, stream = replies(), b"".join(encode(message) for message in messages)
    assert [found for piece in pieces(stream, cuts) for found in reader.feed(piece)] == messages


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@given(stream=st.lists(garbage(), max_size=4).map(b"".join), cuts=st.lists(st.integers(0, 10**6), max_size=10))
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
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": 2**63 - 5, "length": 5}]},
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": 0, "length": 1, "crc32c": 2**32}]},
        {"type": "blocks", "refs": [{"uri": "u", "version": "v", "offset": 0, "length": 1, "crc32c": -1}]},
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


@pytest.mark.parametrize("size_bytes", [-1, 2**31 + 1])
def test_an_object_of_a_size_that_cannot_be_is_a_protocol_error(size_bytes):
    body = {"type": "object", "version": "v", "size_bytes": size_bytes, "data": None}
    with pytest.raises(DataError) as caught:
        list(replies().feed(framed(msgspec.msgpack.encode(body))))
    assert caught.value.kind is ErrorKind.PROTOCOL


def test_a_number_that_does_not_fit_the_wire_is_bad_input():
    with pytest.raises(BadInputError, match="64 bits"):
        encode(ResizeTier("ram", 1 << 64, None))

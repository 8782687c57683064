"""A block file says everything about itself, and nothing wrong passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.block import CHUNK_BYTES, block_path, encode_trailer, file_bytes, parse_name, trailer_bytes, verify
from cache.keys import KEY_BYTES
from cache.testing import block_contents
from connectors.errors import CorruptError

KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
KEY = bytes(range(KEY_BYTES))


def assert_rejected(key: bytes, content: bytes, length: int) -> None:
    with pytest.raises(CorruptError, match=key.hex()):
        verify(key, content[:length], content[length:])


@given(KEYS, block_contents())
def test_what_was_written_verifies(key: bytes, data: bytes) -> None:
    trailer = encode_trailer(key, data)
    assert len(data) + len(trailer) == file_bytes(len(data)) == len(data) + trailer_bytes(len(data))
    verify(key, memoryview(data), memoryview(trailer))


@given(KEYS, block_contents(), st.data())
def test_any_flipped_bit_is_found(key: bytes, data: bytes, choose: st.DataObject) -> None:
    content = bytearray(data + encode_trailer(key, data))
    content[choose.draw(st.integers(0, len(content) - 1))] ^= 1 << choose.draw(st.integers(0, 7))
    assert_rejected(key, bytes(content), len(data))


def test_every_flipped_bit_of_a_trailer_is_found() -> None:
    data = bytes(CHUNK_BYTES + 1)
    for position in range(trailer_bytes(len(data)) * 8):
        trailer = bytearray(encode_trailer(KEY, data))
        trailer[position // 8] ^= 1 << position % 8
        assert_rejected(KEY, data + trailer, len(data))


@given(KEYS, block_contents(), st.data())
def test_every_truncation_is_found(key: bytes, data: bytes, choose: st.DataObject) -> None:
    content = data + encode_trailer(key, data)
    assert_rejected(key, content[: choose.draw(st.integers(0, len(content) - 1))], len(data))
    assert_rejected(key, content + b"\0", len(data))


@given(KEYS, KEYS, block_contents())
def test_the_file_of_another_block_is_found(key: bytes, other: bytes, data: bytes) -> None:
    if key != other:
        assert_rejected(key, data + encode_trailer(other, data), len(data))


def test_zeros_as_a_power_failure_leaves_them_are_found() -> None:
    assert_rejected(KEY, bytes(file_bytes(5000)), 5000)


@given(KEYS, st.integers(1, 10**17))
def test_a_name_gives_back_key_and_length(key: bytes, length: int) -> None:
    folder, name = block_path(key, length).split("/")
    assert parse_name(name) == (key, length)
    assert folder == f"{key[-1]:02x}"


@pytest.mark.parametrize(
    "name", ["", "notes.txt", KEY.hex(), KEY.hex() + "-", KEY.hex() + "-0", KEY.hex() + "-5.tmp", "-5"]
)
def test_a_foreign_name_is_nobodys(name: str) -> None:
    assert parse_name(name) is None

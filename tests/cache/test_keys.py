"""A reference is one that can be read, and each of its parts is part of the name."""

from dataclasses import replace

import pytest

from cache.keys import KEY_BYTES, BlockRef, block_key
from connectors.errors import BadInputError

REF = BlockRef("s3://b/k", "v", 5, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": -1},
        {"length": 0},
        {"offset": 2**63 - 7},
        {"offset": 2**64},
        {"length": 2**63},
        {"crc32c": -1},
        {"crc32c": 2**32},
    ],
)
def test_what_no_object_can_hold_is_refused_by_name(wrong):
    with pytest.raises(BadInputError, match="s3://b/k") as caught:
        replace(REF, **wrong)
    assert caught.value.uri == REF.uri


def test_every_part_is_in_the_name():
    others = [
        replace(REF, uri="s3://b/kv", version=""),
        replace(REF, uri="s3://b/j"),
        replace(REF, version="w"),
        replace(REF, offset=6),
        replace(REF, length=8),
        replace(REF, crc32c=0),
        replace(REF, crc32c=1),
        replace(REF, offset=2**63 - 8),
    ]
    names = {block_key(ref) for ref in (REF, *others)}
    assert len(names) == len(others) + 1
    assert {len(name) for name in names} == {KEY_BYTES}
    assert block_key(replace(REF)) in names

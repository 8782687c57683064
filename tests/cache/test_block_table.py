"""A table gives back the blocks that it was made of, page by page."""

import numpy as np
import pytest

from cache.block_table import PAGE_BLOCKS, BlockTable, TablePage
from cache.keys import BlockRef
from connectors.errors import BadInputError


def columns(blocks: int, objects: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        "object_of": np.sort(rng.integers(0, objects, blocks)).astype(np.int32),
        "offset": rng.integers(0, 1 << 50, blocks),
        "length": rng.integers(1, 1 << 33, blocks),
        "crc32c": rng.integers(0, 1 << 32, blocks).astype(np.uint32),
    }


@pytest.mark.parametrize("blocks", [1, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 1, 3 * PAGE_BLOCKS + 7])
@pytest.mark.parametrize("checked", [True, False])
def test_every_block_comes_back(blocks: int, checked: bool) -> None:
    uris, versions = [f"s3://b/{n}" for n in range(50)], [f"v{n}" for n in range(50)]
    parts = columns(blocks, 50) | ({} if checked else {"crc32c": None})
    table = BlockTable.from_columns(uris, versions, **parts)
    assert len(table) == blocks
    for block in {0, blocks // 2, blocks - 1, min(PAGE_BLOCKS, blocks - 1)}:
        place = int(parts["object_of"][block])
        crc32c = int(parts["crc32c"][block]) if checked else None
        offset, length = int(parts["offset"][block]), int(parts["length"][block])
        assert table.ref(block) == BlockRef(uris[place], versions[place], offset, length, crc32c)


def test_a_page_names_only_its_own_objects() -> None:
    blocks = 2 * PAGE_BLOCKS
    parts = columns(blocks, 50) | {"object_of": np.arange(blocks, dtype=np.int32)}
    names = [f"s3://b/{n}" for n in range(blocks)]
    table = BlockTable.from_columns(names, names, **parts)
    assert [len(page.uris) for page in table.pages] == [PAGE_BLOCKS, PAGE_BLOCKS]


def test_the_digest_tells_tables_apart() -> None:
    parts = columns(10, 2)
    table = BlockTable.from_columns(["a", "b"], ["1", "1"], **parts)
    assert table.digest == BlockTable.from_columns(["a", "b"], ["1", "1"], **parts).digest
    assert table.digest != BlockTable.from_columns(["a", "b"], ["1", "2"], **parts).digest


GOOD = {"uris": ["a"], "versions": ["1"], "object": bytes(4), "offset": bytes(8), "length": b"\1" + bytes(7)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"object": b""},
        {"object": bytes(3)},
        {"object": b"\1\0\0\0"},
        {"object": b"\xff\xff\xff\xff"},
        {"offset": bytes(7)},
        {"offset": b"\xff" * 8},
        {"length": bytes(8)},
        {"length": b""},
        {"crc32c": b"\0"},
        {"versions": []},
        {"object": bytes(4 * PAGE_BLOCKS + 4)},
    ],
)
def test_a_page_whose_columns_do_not_fit_is_refused(wrong: dict) -> None:
    TablePage(**{"crc32c": None} | GOOD).check()
    with pytest.raises(BadInputError):
        TablePage(**{"crc32c": None} | GOOD | wrong).check()


def test_only_the_last_page_may_be_short() -> None:
    page = TablePage(**{"crc32c": None} | GOOD)
    with pytest.raises(BadInputError):
        BlockTable([page, page])
    assert len(BlockTable([])) == 0

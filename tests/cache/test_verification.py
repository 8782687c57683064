"""Whatever is wrong with a block on disk is found, and only that is removed."""

import os

import pytest

from cache.directory_shelf import DirectoryShelf
from cache.testing import make_block, make_key
from cache.verification import verify_directory
from connectors.errors import BadInputError


@pytest.fixture
def directory(tmp_path):
    shelf = DirectoryShelf(str(tmp_path), medium="ram", system=os)
    shelf.lock()
    for number in range(20):
        shelf.write(make_block(number, bytes([number]) * 5000))
    shelf.close()
    return tmp_path


def files(directory):
    return sorted((directory / "blocks-1").glob("*/*"))


def test_whole_blocks_are_counted_and_stay(directory):
    *_, found = verify_directory(directory, remove=True)
    assert (found.blocks, found.bad, found.foreign) == (20, (), 0)
    assert found.size_bytes == sum(file.stat().st_size for file in files(directory))
    assert len(files(directory)) == 20
    assert found.folders == found.num_folders


@pytest.mark.parametrize("remove", [False, True])
def test_each_kind_of_damage_is_found_and_removed_on_request(directory, remove):
    flipped, cut, grown, swapped, *_ = files(directory)
    content = bytearray(flipped.read_bytes())
    content[17] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    grown.write_bytes(grown.read_bytes() + b"x")
    swapped.write_bytes(files(directory)[-1].read_bytes())
    (files(directory)[0].parent / "notes.txt").write_text("mine")
    *_, found = verify_directory(directory, remove=remove)
    assert set(found.bad) == {str(path) for path in (flipped, cut, grown, swapped)}
    assert (found.blocks, found.foreign) == (20, 1)
    assert len(files(directory)) == (17 if remove else 21)
    assert make_key(0).hex() in str(found.bad)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="no directory of a cache"):
        next(verify_directory(tmp_path))

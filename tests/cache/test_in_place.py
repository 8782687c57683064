import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from crc32c import crc32c

from cache.access import BlockReader, open_reader
from cache.in_place import READ_WHOLE_BYTES, InPlaceReader
from cache.keys import BlockRef
from cache.testing import send_blocks
from connectors import open_store, run_sync
from connectors.errors import BadInputError, ChangedError, NotFoundError, PermissionDeniedError
from connectors.objects import normalise_url

LARGE = READ_WHOLE_BYTES * 2


def write(path: Path, size_bytes: int, fill: bytes = b"ab") -> str:
    path.write_bytes((fill * size_bytes)[:size_bytes])
    return normalise_url(path)


def token(path: Path) -> str:
    found = path.stat()
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def ref_of(path: Path, offset: int = 0, length: int | None = None, *, with_crc: bool = False) -> BlockRef:
    length = path.stat().st_size - offset if length is None else length
    crc = crc32c(path.read_bytes()[offset : offset + length]) if with_crc else None
    return BlockRef(normalise_url(path), "digest" if with_crc else token(path), offset, length, crc)


@pytest.fixture(params=[LARGE, 1000], ids=["mapped", "read"])
def path(request, tmp_path):
    path = tmp_path / "data set.bin"
    path.write_bytes(os.urandom(request.param))
    return path


@pytest.fixture
def checked(monkeypatch) -> list[int]:
    """Sizes of the blocks whose checksums this process computes."""
    sizes = []

    def counted(data):
        sizes.append(len(data))
        return crc32c(data)

    monkeypatch.setattr("cache.in_place.crc32c", counted)
    return sizes


@pytest.mark.parametrize("with_crc", [False, True])
def test_blocks_come_in_the_order_asked_and_read_only(path, with_crc):
    refs = [ref_of(path, offset, 100, with_crc=with_crc) for offset in (500, 0, 777, 0)]
    blocks = InPlaceReader().read_blocks(refs)
    content = path.read_bytes()
    assert [bytes(block.view) for block in blocks] == [content[ref.offset : ref.offset + 100] for ref in refs]
    assert {block.source for block in blocks} == {"in_place"}
    assert all(block.view.readonly for block in blocks)


def test_open_reader_reads_a_local_folder_in_place(path):
    for cache in ("auto", None):
        reader = open_reader(path.parent, cache)
        assert isinstance(reader, InPlaceReader)
        assert isinstance(reader, BlockReader)


@pytest.mark.parametrize("with_crc", [False, True])
def test_a_file_overwritten_in_place_is_named(path, with_crc):
    reader, ref = InPlaceReader(), ref_of(path, 0, 100, with_crc=with_crc)
    reader.read_blocks([ref])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"x" * size)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ChangedError, match="data%20set") as caught:
        reader.read_blocks([ref])
    assert caught.value.uri == ref.uri


@pytest.mark.parametrize("with_crc", [False, True])
def test_a_file_replaced_by_rename_is_named_and_old_views_live_on(path, with_crc):
    reader, ref = InPlaceReader(), ref_of(path, 0, 100, with_crc=with_crc)
    [block] = reader.read_blocks([ref])
    old = bytes(block.view)
    other = path.with_name("other")
    other.write_bytes(b"y" * path.stat().st_size)
    other.rename(path)
    with pytest.raises(ChangedError, match="data%20set"):
        reader.read_blocks([ref])
    assert bytes(block.view) == old


@pytest.mark.parametrize("with_crc", [False, True])
def test_a_truncated_file_is_an_error_before_any_byte_is_touched(path, with_crc):
    reader, ref = InPlaceReader(), ref_of(path, 0, 1000, with_crc=with_crc)
    reader.read_blocks([ref])
    os.truncate(path, 999)
    with pytest.raises(ChangedError, match="data%20set"):
        reader.read_blocks([ref])
    with pytest.raises(ChangedError):
        InPlaceReader().read_blocks([ref])


def test_a_wrong_checksum_names_file_and_offset_and_is_not_remembered_as_good(path):
    good = ref_of(path, 100, 200, with_crc=True)
    bad = BlockRef(good.uri, good.version, 100, 200, good.crc32c ^ 1)
    reader = InPlaceReader()
    for _ in range(2):
        with pytest.raises(ChangedError, match=r"offset 100 .*data%20set"):
            reader.read_blocks([bad])
    reader.read_blocks([good])
    assert len(InPlaceReader(verify=False).read_blocks([bad])) == 1


def test_a_checksum_is_computed_once_per_block(path, checked):
    reader, ref = InPlaceReader(max_maps=1), ref_of(path, 0, 300, with_crc=True)
    other = path.with_name("other.bin")
    write(other, LARGE)
    for _ in range(3):
        reader.read_blocks([ref, ref_of(other, 0, 10)])
    assert checked == [300]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_verify_a_block_once_among_them_but_a_changed_file_again(path, checked):
    reader, ref = InPlaceReader(), ref_of(path, 0, 300, with_crc=True)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=send_blocks, args=(reader, [ref], there))
    child.start()
    there.close()
    assert here.recv_bytes() == path.read_bytes()[:300]
    child.join()
    reader.read_blocks([ref])
    assert checked == []
    os.utime(path, ns=(0, 0))
    reader._reset()  # as in another child: it sees the file for the first time
    reader.read_blocks([ref])
    assert checked == [300]


def test_a_block_that_another_is_about_to_verify_comes_last_and_is_verified_all_the_same(path, checked):
    reader = InPlaceReader()
    refs = [ref_of(path, 0, size, with_crc=True) for size in (100, 200, 300)]
    other = InPlaceReader()
    other._verified = reader._verified
    claim, claimed = reader._verified.claim, []

    def other_is_first(name):
        if not claimed:
            claimed.append(claim(name))
        return claim(name)

    reader._verified.claim = other_is_first
    reader.read_blocks(refs)
    assert checked == [200, 300, 100]
    other.read_blocks(refs)
    assert checked == [200, 300, 100]


def test_a_changed_file_is_still_noticed_after_its_map_was_dropped(tmp_path):
    paths = [tmp_path / str(i) for i in range(3)]
    for path in paths:
        write(path, LARGE)
    refs = [ref_of(path, 0, 10, with_crc=True) for path in paths]
    reader = InPlaceReader(verify=False, max_maps=1)
    for ref in refs:
        reader.read_blocks([ref])
    os.utime(paths[0], ns=(0, 0))
    with pytest.raises(ChangedError):
        reader.read_blocks([refs[0]])


def test_a_batch_looks_once_at_each_file(tmp_path, monkeypatch):
    paths = [tmp_path / str(number) for number in range(3)]
    for path in paths:
        write(path, LARGE)
    refs = [ref_of(path, offset, 10) for path in paths for offset in range(50)]
    reader, looks, real = InPlaceReader(), [], os.stat
    reader.read_blocks(refs)
    monkeypatch.setattr("cache.in_place.os.stat", lambda path: (looks.append(path), real(path))[1])
    reader.read_blocks(refs)
    assert looks == [str(path) for path in paths]


def test_maps_are_bounded_and_views_outlive_them(tmp_path):
    paths = [tmp_path / str(i) for i in range(6)]
    for number, path in enumerate(paths):
        write(path, LARGE, bytes([number]))
    reader = InPlaceReader(max_maps=2)
    before = len(os.listdir("/proc/self/fd"))
    views = [reader.read_blocks([ref_of(path, LARGE - 10, 10)])[0].view for path in paths]
    assert [bytes(view) for view in views] == [bytes([number]) * 10 for number in range(6)]
    del views
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_block_past_the_end_is_refused(path):
    size = path.stat().st_size
    ref = BlockRef(normalise_url(path), token(path), size - 5, 10)
    with pytest.raises(BadInputError, match=str(size)):
        InPlaceReader().read_blocks([ref])
    short = BlockRef(normalise_url(path), "digest", size - 5, 10, crc32c=1)
    with pytest.raises(ChangedError, match="too few"):
        InPlaceReader().read_blocks([short])


def test_what_is_not_a_readable_file_has_a_clear_error(tmp_path):
    reader = InPlaceReader()
    with pytest.raises(NotFoundError, match="absent"):
        reader.read_blocks([BlockRef(normalise_url(tmp_path / "absent"), "v", 0, 1)])
    with pytest.raises(BadInputError, match="regular"):
        reader.read_object(normalise_url(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInputError, match="regular"):
        reader.read_object(normalise_url(tmp_path / "pipe"))
    with pytest.raises(BadInputError):
        reader.read_object("s3://bucket/key")
    if os.geteuid() != 0:
        (tmp_path / "secret").touch(0)
        with pytest.raises(PermissionDeniedError):
            reader.read_object(normalise_url(tmp_path / "secret"))


def test_an_object_comes_whole_with_its_version(path):
    found = InPlaceReader().read_object(normalise_url(path))
    assert found.data == path.read_bytes()
    assert found.version == token(path)


def test_a_folder_is_listed_as_the_file_store_lists_it(tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden", "." + "0" * 16 + ".dataflow-partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    listed = InPlaceReader().list_objects(normalise_url(tmp_path))
    assert [meta.key for meta in listed] == [".hidden", "a.png", "b/1.png", "b/2.png"]
    assert (listed[1].size_bytes, listed[1].version) == (5, token(tmp_path / "a.png"))

    async def stored():
        store = open_store(tmp_path)
        found = [meta async for meta in store.list()]
        await store.close()
        return found

    assert listed == run_sync(stored())
    assert InPlaceReader().list_objects(normalise_url(tmp_path / "absent")) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_used_reader_works_in_a_child_even_when_its_lock_is_held(path, method):
    reader, ref = InPlaceReader(), ref_of(path, 3, 90)
    expected = bytes(reader.read_blocks([ref])[0].view)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    with reader._lock:
        child = context.Process(target=send_blocks, args=(reader, [ref], there))
        child.start()
    there.close()
    assert here.recv_bytes() == expected
    child.join()
    assert child.exitcode == 0


def test_a_pickled_copy_keeps_its_options(path):
    ref = ref_of(path, 0, 10, with_crc=True)
    wrong = BlockRef(ref.uri, ref.version, 0, 10, ref.crc32c ^ 1)
    copy = pickle.loads(pickle.dumps(InPlaceReader(verify=False)))
    assert len(copy.read_blocks([wrong])) == 1


def test_stats_count_blocks_and_bytes(path):
    reader = InPlaceReader()
    reader.read_blocks([ref_of(path, 0, 10), ref_of(path, 5, 20)])
    assert reader.stats()["tiers"] == [{"name": "in_place", "hits": 2, "hit_bytes": 30}]

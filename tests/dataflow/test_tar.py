"""Walking tar archives, against the standard library."""

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflow.formats.tar import TarError, members

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=300).filter(
    lambda name: name.strip(". ")
)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def build(files: list[tuple[str, bytes]], form: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "x" * 150 if form != FORMATS[0] else "x"
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS[1:])
@given(files=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6))
def test_members_lie_where_tarfile_finds_them(form: int, files: list[tuple[str, bytes]]) -> None:
    archive = build(files, form)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar]
    found = list(members(io.BytesIO(archive)))
    assert [member[:4] for member in found] == expected
    assert [archive[member.content : member.content + member.size_bytes] for member in found] == [
        data for _, data in files
    ]
    for position, member in enumerate(found):  # a range from any member on is an archive too
        rest = io.BytesIO(archive[member.offset :])
        assert [other.name for other in members(rest)] == [name for name, _, _, _ in expected[position:]]


def test_a_name_split_by_ustar_is_whole() -> None:
    name = "a" * 90 + "/" + "b" * 90
    assert [member.name for member in members(io.BytesIO(build([(name, b"x")], tarfile.USTAR_FORMAT)))] == [name]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_folders_are_no_files(kind: bytes, form: int) -> None:
    archive = build([("a", b"")], form, kind)
    assert [(member.name.rstrip("/"), member.regular) for member in members(io.BytesIO(archive))] == [("a", False)]


def test_sizes_of_more_than_8_gib_are_read() -> None:
    info = tarfile.TarInfo("a")
    info.size = 1 << 34
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(TarError, match=r"the member at offset \d+ is cut off"):
            list(members(io.BytesIO(info.tobuf(form))))


@given(st.binary(max_size=1200))
def test_any_bytes_are_an_archive_or_an_error(data: bytes) -> None:
    with suppress(TarError):
        assert all(member.content + member.size_bytes <= len(data) for member in members(io.BytesIO(data)))


@given(st.integers(0, 1023), st.integers(1, 255))
def test_a_damaged_archive_is_an_error_or_has_the_same_files(position: int, change: int) -> None:
    archive = bytearray(build([("a.txt", b"content"), ("b.txt", b"more")], tarfile.PAX_FORMAT))
    archive[position] ^= change
    try:
        found = [(member.name, member.size_bytes) for member in members(io.BytesIO(bytes(archive)))]
    except TarError:
        return
    assert position >= 512
    assert found == [("a.txt", 7), ("b.txt", 4)]


def test_a_sparse_file_is_refused() -> None:
    info = tarfile.TarInfo("a")
    info.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(TarError, match="is a sparse file"):
        list(members(io.BytesIO(info.tobuf(tarfile.PAX_FORMAT))))


@pytest.mark.parametrize("size", ["-1536", "10.24", "1_024", "", "\u0661024"])
def test_an_extended_header_whose_size_is_no_number_is_refused(size: str) -> None:
    info = tarfile.TarInfo("a")
    info.size, info.pax_headers = 1024, {"size": size}
    with pytest.raises(TarError, match="of the member at offset 1024 is damaged: its size is"):
        list(members(io.BytesIO(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))))


def test_an_extended_header_of_absurd_size_is_refused() -> None:
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with pytest.raises(TarError, match="claims 1073741824 bytes"):
        list(members(io.BytesIO(info.tobuf(tarfile.USTAR_FORMAT))))

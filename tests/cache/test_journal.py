"""Labels and pins survive torn records, failing disks and a rewrite that is killed anywhere."""

import contextlib
import errno
import os
import random
import struct
from pathlib import Path

import msgspec
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.journal import Journal, LabelRecord, PinRecord
from cache.labels import Label
from cache.pins import Pin, PinSet
from cache.testing import FaultySystem, make_key

PINS = PinSet(3, (Pin("s3://b/x", 5, None, 1), Pin("s3://b/y", 7, 1e9, 2)))


def journal(path: Path, system: object = os) -> Journal:
    (path / "tmp").mkdir(exist_ok=True)
    return Journal(str(path / "journal-1"), str(path / "tmp"), system=system)


def record(number: int, born_s: int = 0) -> LabelRecord:
    return LabelRecord(f"s3://b/{number % 3}", "job", born_s, make_key(number))


def label(number: int, born_s: int = 0) -> Label:
    return Label(f"s3://b/{number % 3}", "job", born_s)


def test_what_was_appended_is_found_and_the_later_counts(tmp_path: Path) -> None:
    book = journal(tmp_path)
    assert book.load() == ({}, PinSet())
    for number in (1, 2):
        book.append(record(number))
    book.append(PinRecord(PinSet(2)))
    book.append(record(1, born_s=9))
    book.append(PinRecord(PINS))
    assert journal(tmp_path).load() == ({make_key(1): label(1, 9), make_key(2): label(2)}, PINS)


@settings(max_examples=60)
@given(cut=st.integers(0, 400), flip=st.integers(0, 4000), garbage=st.binary(max_size=40))
def test_a_torn_record_costs_only_itself(tmp_path_factory, cut: int, flip: int, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("journal")
    book = journal(path)
    for number in range(4):
        book.append(record(number))
    file = path / "journal-1"
    whole = file.read_bytes()
    torn = bytearray(whole[: cut % len(whole)] + garbage)
    if torn:
        torn[flip // 8 % len(torn)] ^= 1 << flip % 8
    file.write_bytes(torn)
    book.append(record(7))
    found, _ = book.load()
    # What is found is right, and a torn end hides nothing that came later.
    assert found.items() <= {make_key(number): label(number) for number in (*range(4), 7)}.items()
    assert make_key(7) in found


def test_torn_bytes_are_passed_over_with_a_word(tmp_path: Path, caplog) -> None:
    book = journal(tmp_path)
    book.append(record(1))
    book.load()
    assert caplog.text == ""
    with open(tmp_path / "journal-1", "ab") as file:
        file.write(bytes(20))
    book.append(record(2))
    assert len(book.load()[0]) == 2
    assert "20 bytes of a cache's journal were torn" in caplog.text


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_record_that_cannot_be_written_is_an_error(tmp_path: Path, number: int) -> None:
    def fail(name: str) -> None:
        if name == "write":
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        journal(tmp_path, FaultySystem(fail)).append(record(1))
    assert journal(tmp_path).load() == ({}, PinSet())


def test_a_journal_is_open_only_while_it_is_written(tmp_path: Path) -> None:
    def before(name: str) -> None:
        if name == "write" and broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    book, open_files = journal(tmp_path, FaultySystem(before)), len(os.listdir("/proc/self/fd"))
    for broken in (False, True):
        for write in (lambda: book.append(record(1)), lambda: book.rewrite(lambda _key: True)):
            with pytest.raises(OSError, match="Input/output") if broken else contextlib.nullcontext():
                write()
            assert len(os.listdir("/proc/self/fd")) == open_files
            assert list((tmp_path / "tmp").iterdir()) == []


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.append(PinRecord(PINS))
    with pytest.raises(OSError, match="bytes at most") as refused:
        own.append(PinRecord(PinSet(4, (Pin("s3://b/" + "x" * (4 << 20), 5, None, 1),))))
    assert refused.value.errno == errno.EFBIG
    assert journal(tmp_path).load() == ({}, PINS)


def test_a_rewrite_leaves_out_what_is_gone(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(PinRecord(PINS))
    for number in range(200):
        book.append(record(number))
    before = (tmp_path / "journal-1").stat()
    book.rewrite(lambda key: key[-1] < 50)
    found, pins = book.load()
    assert found == {make_key(number): label(number) for number in range(50)}
    assert pins == PINS
    assert (tmp_path / "journal-1").stat().st_size < before.st_size / 3
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_journal_is_overgrown_when_most_of_it_is_about_blocks_that_are_gone(tmp_path: Path) -> None:
    book = journal(tmp_path)
    keys = b"".join(make_key(number) for number in range(70_000))
    for begin in range(0, len(keys), 1 << 18):
        book.append(LabelRecord("s3://b/x", "", 0, keys[begin : begin + (1 << 18)]))
    book.load()
    assert (book.overgrown(0), book.overgrown(70_000)) == (True, False)
    book.rewrite(lambda key: False)
    assert not book.overgrown(0)


def test_pins_that_are_changed_over_and_over_do_not_let_the_journal_grow_for_ever(tmp_path: Path) -> None:
    book = journal(tmp_path)
    pins = tuple(Pin(f"s3://b/{number}", 5, None, 1) for number in range(1000))
    for generation in range(68):
        assert not book.overgrown(0)
        book.append(PinRecord(PinSet(generation, pins)))
    again = journal(tmp_path)
    assert again.load() == ({}, PinSet(67, pins))
    for one in (book, again):
        assert one.overgrown(0)
    book.rewrite(lambda key: False)
    assert not book.overgrown(0)
    assert journal(tmp_path).load() == ({}, PinSet(67, pins))


def test_many_pins_are_no_reason_to_write_the_journal_anew_over_and_over(tmp_path: Path) -> None:
    pins = PinSet(1, tuple(Pin(f"m://{number}", 5, None, 1) for number in range(70_000)))
    book = journal(tmp_path)
    rewrites = 0
    for _ in range(4):
        book.append(PinRecord(pins))
        if book.overgrown(0):
            book.rewrite(lambda key: False)
            rewrites += 1
    # When the third set had made two old.
    assert rewrites == 1
    again = journal(tmp_path)
    assert again.load()[1] == pins
    assert not again.overgrown(0)


@pytest.mark.parametrize(
    ("whole", "damaged"), [(b"s3://b/0", b"s3://b/\xff"), (b"uri", b"u\xffi"), (b"job", b"jo\xff")]
)
def test_a_record_that_is_whole_and_no_text_costs_only_itself(tmp_path: Path, whole: bytes, damaged: bytes) -> None:
    body = msgspec.msgpack.encode(record(0)).replace(whole, damaged)
    assert damaged in body
    (tmp_path / "journal-1").write_bytes(struct.pack("<II", len(body), crc32c(body)) + body)
    book = journal(tmp_path)
    book.append(record(1))
    book.rewrite(lambda key: True)
    assert book.load() == ({make_key(1): label(1)}, PinSet())


def test_a_rewrite_that_ends_before_any_system_call_loses_nothing(tmp_path: Path) -> None:
    for last in range(20):
        path = tmp_path / str(last)
        path.mkdir()
        book = journal(path)
        for number in range(20):
            book.append(record(number))
        calls = iter(range(100))

        def die(name: str, calls: object = calls, last: int = last) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            journal(path, FaultySystem(die)).rewrite(lambda key: key[-1] >= 10)
            break
        found, _ = journal(path).load()
        assert {make_key(number): label(number) for number in range(10, 20)}.items() <= found.items()
    assert last >= 3


def test_many_keys_of_any_labels_come_back(tmp_path: Path) -> None:
    chance = random.Random(1)
    wanted = {chance.randbytes(16): label(number, number % 7) for number in range(3000)}
    book = journal(tmp_path)
    for key, found in wanted.items():
        book.append(LabelRecord(found.uri, found.job, found.born_s, key))
    book.rewrite(lambda key: True)
    assert book.load()[0] == wanted

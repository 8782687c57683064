"""Where records of CSV end, against a walk over the characters, one by one."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataflow.formats.csv_records import header_end, record_end

TEXTS = st.text(st.sampled_from('a",\n\r'), max_size=40).map(str.encode)


def ends(data: bytes, delimiter: bytes) -> list[int]:
    """Walk as pyarrow does: a quote opens a value at the beginning of a field, and a doubled one stays inside."""
    found, quoted, begins, position = [], False, True, 0
    while position < len(data):
        char = data[position : position + 1]
        if quoted:
            if char == b'"' and data[position + 1 : position + 2] == b'"':
                position += 1
            elif char == b'"':
                quoted = False
        elif char == b'"' and begins:
            quoted = True
        elif char == b"\n":
            found.append(position + 1)
        begins = char in (delimiter, b"\n", b"\r")
        position += 1
    return found


@example(b'5" pipe\n"a\nb"\n', 0)
@example(b'"a""\n"",\n"\n', 3)
@example(b'a""\n","\n', 0)
@given(TEXTS, st.integers(0, 50))
def test_a_record_ends_outside_of_quotes(data: bytes, least: int) -> None:
    found = ends(data, b",")
    assert record_end(data, 0, least, ",") == next((end for end in found if end > least), 0)
    for begin in found:  # the beginning of another record
        expected = next((end for end in found if end > begin + least), begin)
        assert record_end(data, begin, begin + least, ",") == expected


def test_the_delimiter_is_that_of_the_file() -> None:
    data = b'a,"b\n"\tc\n'
    assert record_end(data, 0, 0, "\t") == 5
    assert record_end(data, 0, 0, ",") == len(data)


@pytest.mark.parametrize("front", [b"", b"\xef\xbb\xbf", b"\n\r\n", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("header", [b"a,b\n", b'"a\nb",c\r\n', b'5" pipe,c\n'])
def test_blank_lines_belong_to_the_header(front: bytes, header: bytes) -> None:
    assert header_end(front + header + b"1,2\n", ",") == len(front + header)
    assert header_end(front + header.rstrip(), ",") == 0

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("67108864", 1 << 26), (" 64 MiB ", 1 << 26), ("64m", 1 << 26), ("1.5kib", 1536), ("2TB", 2 << 40)],
)
def test_a_size_is_read_in_any_of_the_usual_spellings(text, size_bytes):
    assert parse_size(text) == size_bytes


@given(st.integers(0, 1 << 70))
def test_a_number_of_bytes_is_exact_however_large(size_bytes):
    assert parse_size(str(size_bytes)) == parse_size(f"{size_bytes}B") == size_bytes


# The sixth ends in the Kelvin sign, which is a k to whoever ignores case.
@pytest.mark.parametrize("text", ["", "big", "-1", "1e9", "64 apples", "1\u212a", "64PiB", "1.", "0x10", "MiB", "1 2"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="64MiB"):
        parse_size(text)

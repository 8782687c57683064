import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.transforms import Cast, Draws, TokenWindow

RNG = np.random.default_rng(0)


def draws(*samples: int) -> Draws:
    return Draws(0, 0, np.array(samples, np.int64))


def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.zeros(shape, dtype)


@given(length=st.integers(1, 40), size=st.integers(0, 60), start=st.sampled_from(["random", "first"]), n=st.integers(0))
def test_a_window_is_a_part_of_the_document_and_filling(length: int, size: int, start: str, n: int) -> None:
    document = np.arange(100, 100 + size, dtype=np.uint16)
    sample = draws(n % 2**62)
    window = TokenWindow(length, start=start, filling=7)({"tokens": document, "id": n}, sample[0])
    tokens, kept = window["tokens"], min(length, size)
    assert (len(tokens), tokens.dtype, window["id"]) == (length, document.dtype, n)
    first = int(tokens[0]) - 100 if kept else 0
    assert tokens[:kept].tolist() == document[first : first + kept].tolist()
    assert tokens[kept:].tolist() == [7] * (length - kept)
    assert first == 0 or start == "random"


def test_every_window_of_a_document_comes_up() -> None:
    window = TokenWindow(8)
    firsts = {int(window({"tokens": np.arange(12)}, draws(n)[0])["tokens"][0]) for n in range(200)}
    assert firsts == {0, 1, 2, 3, 4}


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), dtype=st.sampled_from([None, "int64"]))
def test_a_batch_holds_what_its_samples_are_alone(sizes: list[int], dtype: str | None) -> None:
    window = TokenWindow(10, filling=0, dtype=dtype)
    documents = [np.arange(size, dtype=np.uint16) + 1000 for size in sizes]
    batch = window.transform_columns({"tokens": documents}, draws(*range(len(sizes))), allocate)["tokens"]
    alone = [window({"tokens": one}, draws(n)[0])["tokens"] for n, one in enumerate(documents)]
    assert np.array_equal(batch, np.stack(alone))
    assert batch.dtype == alone[0].dtype


def test_a_cast_of_a_sample_and_of_both_kinds_of_columns() -> None:
    cast = Cast("tokens", "int64")
    tokens = np.array([[1, 65535], [2, 3]], np.uint16)
    assert cast({"tokens": tokens[0]}, RNG)["tokens"].dtype == np.int64
    stacked = cast.transform_columns({"tokens": tokens, "text": ["a", "b"]}, draws(0, 1), allocate)
    assert (stacked["tokens"].dtype, stacked["tokens"].tolist()) == (np.int64, tokens.tolist())
    ragged = cast.transform_columns({"tokens": [tokens[0], tokens[1, :1]]}, draws(0, 1), allocate)["tokens"]
    assert [(one.dtype, one.tolist()) for one in ragged] == [(np.int64, [1, 65535]), (np.int64, [2])]
    assert cast.transform_columns({"tokens": []}, draws(), allocate) == {"tokens": []}


@pytest.mark.parametrize(
    ("values", "dtype"), [([70_000], "uint16"), ([-1], "uint8"), ([1.5], "int64"), (["a"], "int64"), (None, "int64")]
)
def test_a_number_that_would_become_another_is_refused(values, dtype: str) -> None:
    with pytest.raises(BadInputError, match="'tokens'"):
        Cast("tokens", dtype)({"tokens": values}, RNG)
    if values is not None:
        with pytest.raises(BadInputError, match="'tokens'"):
            Cast("tokens", dtype).transform_columns({"tokens": np.array(values)}, draws(0), allocate)


def test_what_fits_may_become_narrower() -> None:
    assert Cast("tokens", "uint8")({"tokens": np.array([0, 255])}, RNG)["tokens"].tolist() == [0, 255]
    assert Cast("x", "float16")({"x": np.array([0.5])}, RNG)["x"].tolist() == [0.5]


def test_a_short_document_without_filling_names_the_sample() -> None:
    with pytest.raises(BadInputError, match=r"sample 5: field 'tokens' has 3 tokens, fewer than the window of 4"):
        TokenWindow(4).transform_columns({"tokens": [np.arange(9), np.arange(3)]}, draws(2, 5), allocate)
    with pytest.raises(BadInputError, match="2 dimensions"):
        TokenWindow(1)({"tokens": np.zeros((2, 2))}, RNG)
    with pytest.raises(BadInputError, match="does not fit"):
        TokenWindow(4, filling=-1)({"tokens": np.arange(2, dtype=np.uint16)}, RNG)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 4, "start": "last"}, {"length": 4, "dtype": "int99"}])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(BadInputError, match=r"length|start|type"):
        TokenWindow(**options)

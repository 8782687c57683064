"""Which files a URL means: a folder, a file, or those whose names fit."""

import logging
import uuid
from pathlib import Path

import pytest

from connectors.errors import NotFoundError
from dataflow.convert import convert
from dataflow.dataset import open_dataset
from dataflow.formats.destination import Destination
from dataflow.formats.place import Place
from dataflow.indexing import build_index

pytestmark = pytest.mark.usefixtures("kept_scans")

NAMES = [
    "data/test-0.jsonl",
    "data/train-0.jsonl",
    "data/train-1.jsonl",
    "data/.train-2.jsonl",
    "more/a b/train-0.jsonl",
]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place with files, each of which holds its number."""
    root = f"file://{tmp_path}/set" if request.param == "file" else f"memory://{uuid.uuid4().hex}/set"
    with Destination(root) as destination:
        for number, name in enumerate(NAMES):
            destination.put(name, [f'{{"n":{number}}}\n'.encode()])
    return root


def numbers(url: str) -> list[int]:
    return sorted(row["n"] for row in open_dataset(url))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data/train-*.jsonl", [1, 2]),
        ("data/*", [0, 1, 2]),
        ("*/train-*", [1, 2]),
        ("**/train-*", [1, 2, 4]),
        ("**", [0, 1, 2, 4]),
        ("more/a b/*-0.*", [4]),
        ("data/*train-1.jsonl", [2]),
    ],
)
def test_stars_stand_for_names(url: str, pattern: str, expected: list[int]) -> None:
    assert numbers(f"{url}/{pattern}") == expected


def test_a_star_that_fits_nothing_is_nothing(url: str) -> None:
    with pytest.raises(NotFoundError, match=r"nothing at .*/data/train\*\.csv"):
        open_dataset(f"{url}/data/train*.csv")


def test_chosen_files_are_converted_and_indexed_without_the_others(url: str, tmp_path: Path) -> None:
    chosen = f"{url}/data/train-*"
    assert build_index(chosen).num_files == 2
    assert numbers(chosen) == [1, 2]
    convert(chosen, tmp_path / "out", verify=True)
    assert numbers(str(tmp_path / "out")) == [1, 2]


def test_an_index_of_chosen_files_elsewhere_is_believed_without_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text('{"n":1}\n')
    chosen, index = f"{tmp_path}/set/train-*", tmp_path / "chosen.arrow"
    build_index(chosen, out=index)
    monkeypatch.setattr(Place, "files", property(lambda _place: pytest.fail("listed")))
    assert len(open_dataset(chosen, index=index)) == 2


def test_a_file_is_meant_by_its_name_though_it_has_a_star(tmp_path: Path) -> None:
    for number, name in enumerate(["a*.jsonl", "ab.jsonl"]):
        (tmp_path / name).write_text(f'{{"n":{number}}}\n')
    assert numbers(str(tmp_path / "a*.jsonl")) == [0]


def test_splits_in_one_folder_are_read_and_told(url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert numbers(f"{url}/data") == [0, 1, 2]
    told = f"{url}/data is read as one dataset, and has files of test, train; name those that you want, as"
    assert caplog.messages == [f"{told} {url}/data/train*"]
    caplog.clear()
    assert numbers(f"{url}/data/train*") == [1, 2]
    assert numbers(f"{url}/data/*") == [0, 1, 2]
    assert numbers(f"{url}/more") == [4]
    assert not caplog.records


def test_folders_of_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("Train/cat/a.txt", "val/cat/b.txt", "other/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("x\n")
    with caplog.at_level(logging.WARNING):
        open_dataset(tmp_path)
    root = f"file://{tmp_path}"
    told = f"{root} is read as one dataset, and has files of train, val; name those that you want, as"
    assert caplog.messages == [f"{told} {root}/Train"]


@pytest.mark.parametrize("names", [["train-0.csv", "train-1.csv"], ["test.csv", "val.csv"], ["trains.csv", "test.csv"]])
def test_names_that_are_no_splits_for_training_are_not_told(
    tmp_path: Path, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / name).write_text("n\n1\n")
    open_dataset(tmp_path)
    assert not caplog.records

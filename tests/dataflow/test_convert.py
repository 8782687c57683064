"""Conversion: planned from the index, the same bytes whoever writes them, resumable after any kill."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from connectors.errors import BadInputError, CorruptError, DataError
from connectors.limits import FIRST_ANSWER_VARIABLE
from dataflow.convert import Progress, convert
from dataflow.convert.job import Job, ShardJob, Work, run_job
from dataflow.convert.lineage import without_credentials
from dataflow.convert.plan import cut
from dataflow.convert.workers import run_here, run_in_processes
from dataflow.dataset import open_dataset
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.protocol import Part

SIZES = {"shard_size_bytes": 500, "block_size_bytes": 300}
COUNT = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        folder = root / f"class-{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((8 + number % 4, 8), number, np.uint8)).save(folder / f"{number:03d}.png")
    return root


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_shards_hold_what_the_folder_holds(images: Path, tmp_path: Path) -> None:
    result = convert(images, tmp_path / "out", **SIZES)
    source, written = open_dataset(images), open_dataset(tmp_path / "out")
    assert written.source.format == "arrow"
    assert (result.num_samples, result.num_shards) == (COUNT, len(written.index.shards))
    assert result.num_shards > 1
    assert written.schema.equals(source.schema, check_metadata=True)
    for expected, actual in zip(source, written, strict=True):
        assert actual["label"] == expected["label"]
        np.testing.assert_array_equal(actual["image"], expected["image"])
    assert written.source.lineage["source"]["fingerprint"] == source.fingerprint
    assert not list((tmp_path / "out").glob("*.part"))


def test_the_bytes_do_not_depend_on_the_number_of_workers(images: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        convert(images, tmp_path / str(workers), workers=workers, **SIZES)
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "3")


@pytest.mark.parametrize(("job_s", "is_worthwhile"), [(0.0, False), (60.0, True)])
def test_other_processes_do_what_is_worth_their_start(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_s: float, is_worthwhile: bool
) -> None:
    now_s, shared = iter([0.0, job_s]), []
    monkeypatch.setattr("dataflow.convert.stages.WORTHWHILE_S", 60.0)
    monkeypatch.setattr("dataflow.convert.stages.time", SimpleNamespace(perf_counter=lambda: next(now_s)))
    monkeypatch.setattr("dataflow.convert.stages.os.sched_getaffinity", lambda pid: {0, 1, 2})

    def run_in_processes(work: Work, jobs: Sequence[ShardJob], *, workers: int) -> Iterator[tuple[Job, Part]]:
        shared.append((len(jobs), workers))
        return run_here(work, jobs)

    monkeypatch.setattr("dataflow.convert.stages.run_in_processes", run_in_processes)
    result = convert(images, tmp_path / "adaptive", **SIZES)
    assert shared == ([(result.num_shards - 1, 3)] if is_worthwhile else [])
    monkeypatch.undo()
    convert(images, tmp_path / "alone", workers=1, **SIZES)
    assert content(tmp_path / "adaptive") == content(tmp_path / "alone")


def test_native_shards_convert_to_other_native_shards(images: Path, tmp_path: Path) -> None:
    convert(images, tmp_path / "one", **SIZES)
    convert(tmp_path / "one", tmp_path / "two", compression="zstd", fields=["label"])
    two = open_dataset(tmp_path / "two")
    assert two.schema.names == ["label"]
    assert (
        two.get_batch(range(COUNT))["label"].tolist() == open_dataset(images).get_batch(range(COUNT))["label"].tolist()
    )
    assert two.source.lineage["source"]["lineage"]["source"]["format"] == "folder"


def test_a_data_set_remembers_the_file_that_it_was_made_of_and_not_its_folder(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "other.jsonl").write_text('{"n": 2}\n')
    convert(tmp_path / "one.jsonl", tmp_path / "out")
    assert open_dataset(tmp_path / "out").source.lineage["source"]["url"] == (tmp_path / "one.jsonl").as_uri()


def test_an_empty_dataset_converts_to_one(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "one", pa.schema([("n", pa.int64())])):
        pass
    assert convert(tmp_path / "one", tmp_path / "two").num_shards == 0
    assert len(open_dataset(tmp_path / "two")) == 0


def test_progress_counts_up_to_everything(images: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    convert(images, tmp_path / "out", progress=seen.append, **SIZES)
    first, last = seen[0], seen[-1]
    assert (first.shards, first.samples, first.source_bytes) == (0, 0, 0)
    assert (last.shards, last.samples, last.source_bytes) == (last.num_shards, COUNT, last.num_source_bytes)
    assert [state.shards for state in seen] == list(range(last.num_shards + 1))


# Plans


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 20)), min_size=1, max_size=30), st.integers(1, 3000))
def test_a_plan_covers_every_sample_once_in_order(blocks: list[tuple[int, int]], shard_size_bytes: int) -> None:
    length, num_samples = (np.array(column, np.int64) for column in zip(*blocks, strict=True))
    ranges = cut(np.concatenate([[0], np.cumsum(num_samples)]), length, shard_size_bytes)
    covered = [sample for first, last, _ in ranges for sample in range(first, last)]
    assert covered == list(range(num_samples.sum()))
    assert all(last > first for first, last, _ in ranges)


# Refusals


def test_a_destination_that_holds_something_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(BadInputError, match=r"notes\.txt"):
            convert(images, tmp_path / "out", **settings)
    assert content(tmp_path / "out") == {"notes.txt": b"mine"}


def test_overwriting_replaces_a_dataset(images: Path, tmp_path: Path) -> None:
    convert(images, tmp_path / "out", **SIZES)
    convert(images, tmp_path / "out", overwrite=True)
    convert(images, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("destination", ["", "inside", ".."])
def test_source_and_destination_must_not_contain_each_other(images: Path, destination: str) -> None:
    before = content(images)
    with pytest.raises(BadInputError, match="must not contain each other"):
        convert(images, images / destination, overwrite=True)
    assert content(images) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"overwrite": True, "resume": True},
        {"workers": -1},
        {"fields": ["nothing"]},
        {"shard_size_bytes": 0},
        {"compression": "x"},
    ],
)
def test_senseless_settings_are_refused(images: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(BadInputError):
        convert(images, tmp_path / "out", **settings)
    assert not list(tmp_path.rglob("*.json"))


# Breaking off and going on


class _BreakOffError(Exception):
    pass


def break_off(images: Path, path: Path, after: int) -> None:
    def stop(state: Progress) -> None:
        if state.shards == after:
            raise _BreakOffError

    with pytest.raises(_BreakOffError):
        convert(images, path, progress=stop, **SIZES)
    assert not (path / "dataset.json").exists()


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(images, tmp_path / "whole", **SIZES)
    return content(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_conversion_keeps_what_is_finished_and_ends_the_same(
    images: Path, tmp_path: Path, whole: dict[str, bytes], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    break_off(images, path, after)
    redone: list[int] = []

    def remember(work: object, job: object, destination: object) -> object:
        redone.append(job.number)
        return run_job(work, job, destination)

    monkeypatch.setattr("dataflow.convert.workers.run_job", remember)
    result = convert(images, path, resume=True, **SIZES)
    assert result.num_resumed == after
    assert redone == list(range(after, result.num_shards))
    assert content(path) == whole


def test_a_shard_without_its_record_is_written_again(images: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "out"
    break_off(images, path, 2)
    (path / "shard-00001.arrow.part").unlink()
    assert convert(images, path, resume=True, **SIZES).num_resumed == 1
    assert content(path) == whole


def test_a_record_whose_shard_is_gone_or_short_does_not_count(
    images: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    path = tmp_path / "out"
    break_off(images, path, 3)
    (path / "shard-00000.arrow").unlink()
    os.truncate(path / "shard-00001.arrow", 100)
    assert convert(images, path, resume=True, **SIZES).num_resumed == 1
    assert content(path) == whole


def test_resuming_with_another_setting_or_source_is_refused(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "out"
    break_off(images, path, 1)
    with pytest.raises(BadInputError, match="parts of another conversion"):
        convert(images, path, resume=True, **(SIZES | {"block_size_bytes": 200}))


def test_resuming_a_finished_conversion_is_refused(images: Path, tmp_path: Path) -> None:
    convert(images, tmp_path / "out", **SIZES)
    with pytest.raises(BadInputError, match="finished dataset already"):
        convert(images, tmp_path / "out", resume=True, **SIZES)


@pytest.mark.parametrize("content", [b"{", b'{"plan": "\xff"}'])
def test_a_broken_record_is_named(images: Path, tmp_path: Path, content: bytes) -> None:
    break_off(images, tmp_path / "out", 1)
    (tmp_path / "out" / "shard-00000.arrow.part").write_bytes(content)
    with pytest.raises(CorruptError, match=r"shard-00000\.arrow\.part"):
        convert(images, tmp_path / "out", resume=True, **SIZES)


def test_an_unfinished_conversion_says_how_to_finish_it(images: Path, tmp_path: Path) -> None:
    break_off(images, tmp_path / "out", 1)
    with pytest.raises(BadInputError, match="--resume"):
        convert(images, tmp_path / "out", **SIZES)
    with pytest.raises(BadInputError, match="--resume"):
        open_dataset(tmp_path / "out")


KILLED_AT = """
import os, signal, sys
from dataflow.convert import convert

source, destination, workers, shards, resume = sys.argv[1:]

def kill(state):
    if state.shards == int(shards):
        os.kill(os.getpid(), signal.SIGKILL)

convert(source, destination, workers=int(workers), resume=resume == "True", progress=kill,
        shard_size_bytes=500, block_size_bytes=300)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_shard_it_ends_the_same_and_leaves_no_process(
    images: Path, tmp_path: Path, whole: dict[str, bytes], workers: int
) -> None:
    path = tmp_path / "out"
    for kill_at in (1, 3, 6):
        arguments = [images, path, workers, kill_at, kill_at > 1]
        process = subprocess.run([sys.executable, "-c", KILLED_AT, *map(str, arguments)], check=False)
        assert process.returncode == -signal.SIGKILL
        assert not (path / "dataset.json").exists()
    assert convert(images, path, resume=True, **SIZES).num_resumed >= 6
    assert content(path) == whole


def test_a_failing_source_ends_the_workers_and_names_the_file(images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "c"
    copy.mkdir(parents=True)
    for number in range(20):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(copy / f"{number:02d}.png")
    changed: list[Progress] = []

    def change(state: Progress) -> None:
        if not changed:
            Image.fromarray(np.full((9, 9), 0, np.uint8)).save(copy / "19.png")
        changed.append(state)

    with pytest.raises(DataError, match=r"19\.png"):
        convert(copy.parent, tmp_path / "out", workers=2, progress=change, shard_size_bytes=400, block_size_bytes=400)
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize("before_its_work", [True, False])
def test_a_worker_that_dies_is_an_error_and_not_a_hang(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_its_work: bool
) -> None:
    started: list[subprocess.Popen] = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            started.append(self)
            if len(started) == 2:
                self.kill()
                if before_its_work:
                    self.wait()

    monkeypatch.setattr("dataflow.convert.workers.subprocess.Popen", Popen)
    with pytest.raises(DataError, match=r"a worker process ended with -9"):
        convert(images, tmp_path / "out", workers=2, **SIZES)
    assert [process.poll() is not None for process in started] == [True, True]


TELLING = """
import os, sys
from multiprocessing.connection import Connection
with Connection(int(sys.argv[1])) as connection:
    connection.recv()
    while (name := connection.recv()) is not None:
        connection.send(os.environ.get(name))
"""


@pytest.mark.parametrize(("set_to", "told"), [(None, "60"), ("3", "3")])
def test_workers_wait_for_a_store_that_their_parent_has_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_to: str | None, told: str
) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if set_to is None:
        monkeypatch.delenv(FIRST_ANSWER_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(FIRST_ANSWER_VARIABLE, set_to)
    (found,) = run_in_processes(None, [FIRST_ANSWER_VARIABLE], workers=1, module="telling")
    assert found == (FIRST_ANSWER_VARIABLE, told)


INTERRUPTED = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGINT)
from dataflow.convert.worker import main
main(int(sys.argv[1]), lambda connection: connection.send(connection.recv()))
"""


def test_an_interrupt_while_workers_start_is_their_parents_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (found,) = run_in_processes("work", ["job"], workers=1, module="interrupted")
    assert found == ("job", "work")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_credentials_in_a_url_are_not_kept() -> None:
    assert without_credentials("https://me:secret@host/set?signature=x") == "https://host/set"
    assert without_credentials("file:///a%20b/c") == "file:///a%20b/c"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(images: Path, tmp_path: Path) -> None:
    planned = convert(images, tmp_path / "out", dry_run=True, **SIZES)
    assert not (tmp_path / "out").exists()
    done = convert(images, tmp_path / "out", **SIZES)
    assert (planned.num_samples, planned.num_shards, planned.size_bytes) == (COUNT, done.num_shards, 0)
    before = content(tmp_path / "out")
    convert(images, tmp_path / "out", dry_run=True, overwrite=True, **SIZES)
    with pytest.raises(BadInputError, match="is not empty"):
        convert(images, tmp_path / "out", dry_run=True, **SIZES)
    assert content(tmp_path / "out") == before


def test_a_dry_run_of_a_resume_counts_what_is_finished(images: Path, tmp_path: Path) -> None:
    break_off(images, tmp_path / "out", 2)
    before = content(tmp_path / "out")
    assert convert(images, tmp_path / "out", dry_run=True, resume=True, **SIZES).num_resumed == 2
    assert content(tmp_path / "out") == before

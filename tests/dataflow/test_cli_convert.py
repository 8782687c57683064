"""`dataflow convert` and `dataflow inspect`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from connectors.errors import BadInputError
from dataflow import ShardWriter, audio_field, open_dataset
from dataflow.cli.main import main
from dataflow.cli.sizes import format_size
from dataflow.convert import convert
from dataflow.testing.media import encode_audio, sound


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(12):
        folder = tmp_path / "images" / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(folder / f"{number:02d}.png")
    return tmp_path / "images"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_convert_says_what_it_wrote_and_where(images: Path, tmp_path: Path) -> None:
    assert run("convert", images, tmp_path / "out").startswith("12 samples in 1 shard: ")
    assert run("convert", images, tmp_path / "quiet", "--quiet") == ""


def test_convert_leaves_no_folder_behind_among_those_of_modules(images: Path, tmp_path: Path) -> None:
    before = list(sys.path)
    for _ in range(2):  # done, then refused
        CliRunner().invoke(main, ["convert", str(images), str(tmp_path / "out"), "--quiet"])
        assert sys.path == before


def test_convert_as_json_ends_with_the_result(images: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run("convert", images, tmp_path / "out", "--json").splitlines()]
    assert [line["event"] for line in lines] == ["progress", "progress", "done"]
    assert lines[-1]["num_samples"] == 12
    assert lines[0]["bytes_per_s"] is None
    assert {name: lines[1][name] for name in ("stage", "samples", "num_samples", "left_s")} == {
        "stage": "write",
        "samples": 12,
        "num_samples": 12,
        "left_s": 0,
    }


def test_convert_shows_how_far_every_stage_is(images: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(images), str(tmp_path / "out"), "--filter", "label > 0"])
    assert "clean 12 of 12 samples" in result.stderr
    assert "write 8 of 8 samples" in result.stderr


def test_convert_refuses_with_one_line_and_exit_code_2(images: Path, tmp_path: Path) -> None:
    run("convert", images, tmp_path / "out", "--quiet")
    result = CliRunner().invoke(main, ["convert", str(images), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is not empty" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_place_that_takes_no_folder_is_named(images: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(images), "/proc/out"])
    assert result.exit_code == 1
    assert "cannot make the folder /proc/out: its parent" in result.stderr


def test_convert_refuses_what_is_no_size(images: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(images), str(tmp_path / "out"), "--shard-size", "big"])
    assert result.exit_code == 2
    assert "'big' is not a size" in result.stderr


def test_inspect_as_json_says_everything(images: Path, tmp_path: Path) -> None:
    run("convert", images, tmp_path / "out", "--quiet", "--block-size", "300", "--shard-size", "700")
    report = json.loads(run("inspect", tmp_path / "out", "--json", "--samples", "2"))
    assert (report["format"], report["num_samples"]) == ("arrow", 12)
    assert sum(shard["num_samples"] for shard in report["shards"]) == 12
    assert report["num_shards"] == len(report["shards"]) > 1
    assert report["fields"][0]["kind"] == "image"
    assert report["fields"][1]["classes"] == ["class-0", "class-1", "class-2"]
    assert report["samples"] == [{"image": "uint8[8, 8]", "label": 0}] * 2
    assert report["lineage"]["source"]["url"] == images.as_uri()


@pytest.mark.parametrize("place", ["images", "out"])
def test_inspect_shows_tables(images: Path, tmp_path: Path, place: str) -> None:
    run("convert", images, tmp_path / "out", "--quiet")
    shown = run("inspect", tmp_path / place)
    for word in ("fingerprint", "samples", "12", "uint8[8, 8]"):
        assert word in shown


def test_inspect_names_the_codec_of_media(tmp_path: Path) -> None:
    sounds = [encode_audio(sound(0)), b"noise"]
    with ShardWriter(tmp_path / "set", pa.schema([audio_field("x")])) as writer:
        for data in sounds:
            writer.write({"x": data})
    report = json.loads(run("inspect", tmp_path / "set", "--json"))
    assert report["fields"][0]["kind"] == "audio"
    assert report["samples"] == [{"x": f"{len(sounds[0])} bytes of flac"}, {"x": "5 bytes"}]


def test_inspect_shows_that_a_sample_is_damaged_and_goes_on(images: Path, tmp_path: Path) -> None:
    victim = images / "class-0" / "03.png"
    victim.write_bytes(victim.read_bytes()[:40])
    run("convert", images, tmp_path / "out", "--quiet")
    for place in (images, tmp_path / "out"):
        samples = json.loads(run("inspect", place, "--json"))["samples"]
        assert [sample["image"] for sample in samples] == ["uint8[8, 8]", "damaged: 40 bytes", "uint8[8, 8]"]
        assert [sample["label"] for sample in samples] == [0] * 3


def test_a_format_that_no_name_gives_away_is_told(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{number}.txt").write_text(f"first\nsecond of {number}")
    found = json.loads(run("inspect", tmp_path / "in", "--format", "text-folder", "--json"))
    assert (found["format"], found["num_samples"]) == ("text-folder", 3)
    assert "3" in run("verify", tmp_path / "in", "--format", "text-folder")
    run("convert", tmp_path / "in", tmp_path / "out", "--from", "text-folder", "--quiet")
    written = open_dataset(tmp_path / "out")
    assert [sample["text"] for sample in written] == [f"first\nsecond of {number}" for number in range(3)]
    run("convert", tmp_path / "in", tmp_path / "out", "--from", "text-folder", "--append", "--quiet")
    assert len(open_dataset(tmp_path / "out")) == 6


def test_samples_of_python_have_no_format(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="have none"):
        convert([{"x": 1}], tmp_path / "out", format="jsonl")


def test_inspect_shows_nulls_and_numbers_that_json_lacks(tmp_path: Path) -> None:
    columns = {
        "n": pa.array([1, None, 3]),
        "x": pa.array([math.nan, math.inf, None]),
        "t": pa.array(["a", None, "b"]),
        "many": pa.array([[], None, [4, None]]),
        "at": pa.array([1, None, 2], pa.timestamp("ns")),
    }
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    shown = run("inspect", tmp_path / "set.parquet", "--json")
    assert "NaN" not in shown
    assert "Infinity" not in shown
    assert json.loads(shown)["samples"] == [
        {"n": 1, "x": "nan", "t": "a", "many": "[]", "at": "1970-01-01 00:00:00.000000001"},
        {"n": None, "x": "inf", "t": None, "many": None, "at": None},
        {"n": 3, "x": None, "t": "b", "many": "[4, None]", "at": "1970-01-01 00:00:00.000000002"},
    ]
    assert "None" in run("inspect", tmp_path / "set.parquet")


def test_inspect_shows_any_text_as_it_is(tmp_path: Path) -> None:
    rows = [{"[/x]": "[bold]hi [/INST] :tada:", "y": "one\ntwo\x1b[31m"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run("inspect", tmp_path)
    for word in ("[/x]", "[bold]hi [/INST] :tada:", r"one\ntwo\x1b[31m"):
        assert word in shown
    assert json.loads(run("inspect", tmp_path, "--json"))["samples"] == rows


def test_inspect_cuts_no_name(tmp_path: Path) -> None:
    (tmp_path / f"{'q' * 100}.txt").write_text("x")
    assert run("inspect", tmp_path / f"{'q' * 100}.txt").count("q") == 200  # as the dataset, and as its shard


def test_inspect_of_a_file_names_it_and_obeys_no_name(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[31m\nb.jsonl"
    file.write_text('{"x": {"y\\u001b": 1}}\n')
    shown = run("inspect", file)
    assert r"a\x1b[31m\nb.jsonl" in shown
    assert "\x1b" not in shown
    assert json.loads(run("inspect", file, "--json"))["url"] == file.as_uri()


@pytest.mark.parametrize("command", [("convert", "nowhere", "out"), ("verify", "set"), ("diff", "set", "set")])
def test_no_line_is_empty_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    convert([{"x": 1}], "set")
    result = CliRunner().invoke(main, command)
    assert "" not in result.stderr.splitlines()


def test_one_is_no_plural(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_text('{"x": 1}\n')
    assert run("convert", source, out).startswith("1 sample in 1 shard: ")
    assert run("verify", out).startswith("1 of 1 sample in 1 block, ")
    assert run("diff", source, out) == "1 sample compared: no differences\n"
    assert run("index", source).startswith("1 sample in 1 block of 1 jsonl file: ")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "full")])
    assert "is not empty: it holds x; choose" in result.stderr


def test_inspect_of_nothing_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "nowhere" in result.stderr


def test_sizes_are_written() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "3.0 GiB"]

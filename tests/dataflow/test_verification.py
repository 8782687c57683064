"""Reading a whole dataset to see whether it is what it says."""

import io
import json
import tarfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.cli.main import main
from dataflow.convert import append, convert
from dataflow.dataset import open_dataset
from dataflow.dataset.keys import KeyCheck
from dataflow.dataset.verification import Verification, verify
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.arrow.census import FieldStatistics
from dataflow.formats.arrow.manifest import IndexEntry, Manifest, content_digest, dataset_fingerprint
from dataflow.formats.destination import Destination
from dataflow.formats.sidecar import Sidecar
from dataflow.index import Blocks, Shards, encode_index
from dataflow.index.storage import SIDECAR_NAME
from dataflow.indexing import build_index

COUNT = 300


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    schema = pa.schema([("n", pa.int64()), ("text", pa.string())])
    with ShardWriter(tmp_path / "set", schema, block_size_bytes=500, shard_size_bytes=3000) as writer:
        for number in range(COUNT):
            writer.write({"n": number, "text": str(number)})
    return tmp_path / "set"


def run(path: Path) -> Verification:
    return verify(open_dataset(path, verify=False))


def test_a_good_dataset_has_no_problems(path: Path) -> None:
    done: list[int] = []
    dataset = open_dataset(path)
    result = verify(dataset, progress=done.append)
    assert (result.num_samples, result.num_problems, result.problems) == (COUNT, 0, [])
    assert result.num_blocks == dataset.index.num_blocks == done[-1]
    assert len(done) == len(dataset.index.shards) > 1


@pytest.mark.parametrize("to", ["parquet", "jsonl", "tfrecord", "webdataset", "mds"])
def test_other_formats_are_decoded_whole(path: Path, tmp_path: Path, to: str) -> None:
    convert(path, tmp_path / "out", to=to, shard_size_bytes=3000)
    result = run(tmp_path / "out")
    assert (result.num_samples, result.num_problems) == (COUNT, 0)


def test_every_damaged_block_is_named_and_the_rest_is_read(path: Path) -> None:
    index = open_dataset(path).index
    broken = [2, 5]
    for block in broken:
        ref = index.block_ref(block)
        shard = Path(ref.uri.removeprefix("file://"))
        content = bytearray(shard.read_bytes())
        content[ref.offset + ref.length - 20] ^= 1
        shard.write_bytes(content)
    result = run(path)
    for block in broken:
        ref = index.block_ref(block)
        assert any(
            f"block {block} " in text and f"offset {ref.offset} of {ref.uri}" in text for text in result.problems
        )
    lost = sum(int(index.blocks.first_sample[block + 1] - index.blocks.first_sample[block]) for block in broken)
    assert result.num_samples == COUNT - lost


def test_damage_outside_the_blocks_is_noticed_too(path: Path) -> None:
    shard = path / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-12] ^= 1
    shard.write_bytes(content)
    result = run(path)
    assert result.num_samples == COUNT
    assert result.problems == [f"{shard.as_uri()} does not match its digest"]


def test_a_missing_and_a_short_shard_are_named(path: Path) -> None:
    (path / "shard-00000.arrow").unlink()
    short = path / "shard-00001.arrow"
    short.write_bytes(short.read_bytes()[:2000])
    problems = "\n".join(run(path).problems)
    assert "shard-00000.arrow" in problems
    assert f"{short.as_uri()} has 2000 bytes, the index says" in problems


def test_no_more_problems_are_kept_than_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflow.dataset.verification.MAX_PROBLEMS", 2)
    for shard in path.glob("shard-*"):
        shard.unlink()
    result = run(path)
    assert len(result.problems) == 2
    assert result.num_problems == len(open_dataset(path).index.shards)


def test_the_command_tells_the_truth_by_its_exit_code(path: Path) -> None:
    good = CliRunner().invoke(main, ["verify", str(path)])
    assert good.exit_code == 0
    assert "300 of 300 samples" in good.stdout
    (path / "shard-00000.arrow").unlink()
    bad = CliRunner().invoke(main, ["verify", str(path)])
    assert bad.exit_code == 1
    assert "shard-00000.arrow" in bad.stderr
    as_json = CliRunner().invoke(main, ["verify", str(path), "--json"])
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["num_problems"] == 1


def republish(path: Path, change: Callable[[Shards, Blocks], tuple[Shards, Blocks]], **told: Any) -> None:
    """Write index and manifest anew, consistent in themselves, after a change of the tables."""
    manifest = Manifest.from_json((path / "dataset.json").read_bytes(), uri="")
    index = open_dataset(path).index
    shards, blocks = change(index.shards, index.blocks)
    data = encode_index(shards, blocks)
    entry = IndexEntry(name=manifest.index.name, size_bytes=len(data), digest=content_digest(data))
    counted = {"num_samples": int(blocks.first_sample[-1]), "num_blocks": len(blocks), "num_shards": len(shards)}
    fingerprint = dataset_fingerprint(manifest.schema, entry.digest)
    manifest = replace(manifest, index=entry, fingerprint=fingerprint, **counted | told)
    # Beside, then over: what is open is mapped.
    (path / "new").write_bytes(data)
    (path / "new").replace(path / manifest.index.name)
    (path / "dataset.json").write_bytes(manifest.to_json())


def without(blocks: Blocks, rows: list[int]) -> Blocks:
    counts = np.delete(np.diff(blocks.first_sample), rows)
    columns = (np.delete(column, rows) for column in (blocks.shard, blocks.offset, blocks.length))
    assert blocks.crc32c is not None
    return Blocks(*columns, np.concatenate([[0], np.cumsum(counts)]), np.delete(blocks.crc32c, rows))


def test_a_block_that_the_index_leaves_out_is_a_hole(path: Path) -> None:
    ref = open_dataset(path).index.block_ref(1)
    republish(path, lambda shards, blocks: (shards, without(blocks, [1])))
    problems = run(path).problems
    assert any(
        f"{ref.length} bytes of {ref.uri} at offset {ref.offset} belong to no block" in text for text in problems
    )
    assert any("record batches, the index knows" in text for text in problems)


def test_a_shard_that_comes_twice_is_told(path: Path) -> None:
    def twice(shards: Shards, blocks: Blocks) -> tuple[Shards, Blocks]:
        names = shards.names.to_pylist()
        versions = shards.versions.to_pylist()
        sizes = shards.size_bytes.copy()
        names[1], versions[1], sizes[1] = names[0], versions[0], sizes[0]
        return Shards(pa.array(names), sizes, pa.array(versions)), blocks

    republish(path, twice)
    assert any("lists the shard shard-00000.arrow twice" in text for text in run(path).problems)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"size_bytes": 7}, "says size_bytes 7, there are"),
        ({"num_blocks": 7}, "says num_blocks 7, there are"),
        ({"statistics": {"n": FieldStatistics(1, 8 * COUNT)}}, "other statistics than its samples, of n, text"),
    ],
)
def test_a_manifest_that_counts_otherwise_is_told(path: Path, told: dict[str, Any], expected: str) -> None:
    republish(path, lambda shards, blocks: (shards, blocks), **told)
    (problem,) = run(path).problems
    assert expected in problem


def test_an_appended_dataset_has_no_problems(path: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "more", workers=0)
    append(tmp_path / "more", path, workers=0)
    result = run(path)
    assert (result.num_samples, result.problems) == (2 * COUNT, [])


@pytest.mark.parametrize("to", ["jsonl", "tfrecord", "webdataset"])
def test_an_index_that_is_not_what_a_scan_finds_is_told(path: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    convert(path, out, to=to, shard_size_bytes=3000, workers=0)
    build_index(out)
    assert run(out).problems == []
    data = (out / SIDECAR_NAME).read_bytes()
    sidecar = Sidecar.decode(data, uri="")
    blocks = sidecar.blocks
    # The first block ends early: what follows is still a range of whole blocks elsewhere.
    fewer = Blocks(
        blocks.shard[1:], blocks.offset[1:], blocks.length[1:], blocks.first_sample[1:] - blocks.first_sample[1]
    )
    (out / "new").write_bytes(replace(sidecar, blocks=fewer).encode())
    (out / "new").replace(out / SIDECAR_NAME)
    (problem,) = run(out).problems
    assert "the index has 0 samples in 0 blocks of" in problem
    assert "run `dataflow index`" in problem


def test_files_that_the_index_does_not_know_are_told(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(path, out, to="jsonl", shard_size_bytes=3000, workers=0)
    build_index(out)
    (out / "zzz.jsonl").write_bytes(next(out.glob("*.jsonl")).read_bytes())
    (problem,) = run(out).problems
    assert problem == f"{(out / 'zzz.jsonl').as_uri()} is not in the index: run `dataflow index --resume`"


def archive(path: Path, keys: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            member = tarfile.TarInfo(f"{key}.txt")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))


def test_samples_of_one_key_are_told_across_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataflow.dataset.keys.RUN_LENGTH", 2)  # spills again and again
    archive(tmp_path / "a.tar", ["one", "two", "three"])
    archive(tmp_path / "b.tar", ["four", "two", "one"])
    result = run(tmp_path)
    assert sorted(result.problems) == [
        "sample 4 has the same __key__ as sample 1",
        "sample 5 has the same __key__ as sample 0",
    ]
    assert (result.key, result.num_repeated, result.num_samples) == ("__key__", 2, 6)
    done = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert done.exit_code == 1
    assert CliRunner().invoke(main, ["verify", str(tmp_path), "--no-key"]).exit_code == 0


def test_any_field_may_be_the_key_and_nulls_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": null}\n{"id": 2}\n{"id": null}\n{"id": 1}\n')
    dataset = open_dataset(tmp_path)
    assert verify(dataset).key is None
    assert verify(dataset, key="id").problems == ["sample 4 has the same id as sample 0"]
    with pytest.raises(BadInputError, match="there is no field 'name' to compare; there are id"):
        verify(dataset, key="name")


@given(keys=st.lists(st.none() | st.integers(0, 20), max_size=60), run_length=st.integers(1, 20))
def test_repeated_keys_are_those_that_a_set_finds(keys: list[int | None], run_length: int) -> None:
    first: dict[int, int] = {}
    expected = [
        (number, first[key])
        for number, key in enumerate(keys)
        if key is not None and first.setdefault(key, number) != number
    ]
    with pytest.MonkeyPatch.context() as patch, Destination(f"memory://{uuid.uuid4().hex}") as folder:
        patch.setattr("dataflow.dataset.keys.RUN_LENGTH", run_length)
        check = KeyCheck(folder)
        for begin in range(0, len(keys), 7):
            check.add(pa.array(keys[begin : begin + 7], pa.int64()), begin)
        assert sorted(check.repeated()) == expected


def test_the_formats_are_listed() -> None:
    listed = json.loads(CliRunner().invoke(main, ["formats", "--json"]).stdout)
    assert {row["name"] for row in listed if row["write"]} >= {"arrow", "parquet", "webdataset"}
    assert "parquet" in CliRunner().invoke(main, ["formats"]).stdout

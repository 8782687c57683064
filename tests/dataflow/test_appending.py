"""Appending to a native dataset: a new version, whole or not at all, beside which the old one lives on."""

import json
import uuid
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from connectors.errors import BadInputError, CorruptError, DataError, NotFoundError
from connectors.protocols import Buffer
from dataflow import ElasticBatchSampler, ShardWriter, label_field, open_dataset
from dataflow.cli.main import main
from dataflow.convert import append, convert
from dataflow.dataset.verification import verify
from dataflow.formats.destination import Destination

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])
SIZES = {"block_size_bytes": 200, "shard_size_bytes": 500}


def write(url: str | Path, numbers: Iterable[int], schema: pa.Schema = SCHEMA) -> None:
    with ShardWriter(url, schema, **SIZES) as writer:
        for number in numbers:
            writer.write({"n": number, "text": f"sample {number}"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "set", range(100))
    write(tmp_path / "more", range(100, 160))
    return tmp_path / "set"


@pytest.fixture
def more(path: Path) -> Path:
    return path.parent / "more"


def numbers(url: str | Path, revision: int | None = None) -> list[int]:
    return [int(sample["n"]) for sample in open_dataset(url, revision=revision)]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_samples_go_behind_those_that_are_there(path: Path, more: Path) -> None:
    before = files(path)
    result = append(more, path, workers=0, **SIZES)
    assert (result.num_samples, result.url) == (60, path.as_uri())
    assert numbers(path) == list(range(160))
    after = files(path)
    # Nothing but the manifest was touched, and that is kept under its number.
    assert {name for name in before if after[name] != before[name]} == {"dataset.json"}
    assert after["dataset-00001.json"] == before["dataset.json"]
    assert verify(open_dataset(path, verify=False)).num_problems == 0


def test_who_has_the_old_version_open_goes_on_with_it(path: Path, more: Path) -> None:
    old = open_dataset(path)
    append(more, path, workers=0)
    assert [int(sample["n"]) for sample in old] == list(range(100))
    new = open_dataset(path)
    assert new.fingerprint != old.fingerprint
    again = open_dataset(path, revision=1)
    assert again.fingerprint == old.fingerprint
    assert numbers(path, revision=1) == list(range(100))
    assert numbers(path, revision=2) == list(range(160))


def test_a_state_of_the_old_version_goes_on_with_the_old_version_only(path: Path, more: Path) -> None:
    def sampler(revision: int | None) -> ElasticBatchSampler:
        return ElasticBatchSampler(open_dataset(path, revision=revision), 10, seed=3, rank=0, world_size=1)

    whole = list(sampler(None))
    state = sampler(None).state_at(4)
    append(more, path, workers=0)
    with pytest.raises(BadInputError, match=r"open_dataset\(revision=\) opens the version"):
        sampler(None).load_state_dict(state)
    resumed = sampler(1)
    resumed.load_state_dict(state)
    assert list(resumed) == whole[4:]


def test_versions_add_up(path: Path, more: Path, tmp_path: Path) -> None:
    append(more, path, workers=0)
    write(tmp_path / "third", range(160, 170))
    append(tmp_path / "third", path, workers=0)
    assert [len(open_dataset(path, revision=revision)) for revision in (1, 2, 3)] == [100, 160, 170]
    assert numbers(path) == list(range(170))
    manifest = json.loads((path / "dataset.json").read_text())
    assert (manifest["revision"], manifest["num_samples"]) == (3, 170)
    shown = CliRunner().invoke(main, ["inspect", str(path)], env={"COLUMNS": "200"}).stdout
    assert "3; older ones by open_dataset(revision=)" in shown
    assert manifest["statistics"]["text"]["lengths"]["count"] == 170
    assert [entry["source"]["url"] for entry in manifest["lineage"]["appended"]] == [
        more.as_uri(),
        (tmp_path / "third").as_uri(),
    ]
    with pytest.raises(NotFoundError, match="no version 4; its newest is 3"):
        open_dataset(path, revision=4)


def test_what_was_added_does_not_depend_on_workers_or_place(path: Path, more: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/set"
    write(url, range(100))
    append(more, url, workers=0, **SIZES)
    append(more, path, workers=2, **SIZES)
    assert open_dataset(path).fingerprint == open_dataset(url).fingerprint
    assert numbers(url) == list(range(160))


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("allowed", range(12))
def test_killed_before_any_write_the_old_version_is_whole_and_resume_ends_as_if_nothing_happened(
    path: Path, more: Path, tmp_path: Path, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "other", range(100))
    append(more, tmp_path / "other", workers=0, shard_size_bytes=2000)
    undisturbed = files(tmp_path / "other")
    done: list[str] = []
    put = Destination.put

    def dying(self: Destination, name: str, chunks: Iterable[Buffer]) -> None:
        if len(done) == allowed:
            raise Killed
        done.append(name)
        put(self, name, chunks)

    monkeypatch.setattr(Destination, "put", dying)
    try:
        append(more, path, workers=0, shard_size_bytes=2000)
    except Killed:
        assert numbers(path) == list(range(100))
        monkeypatch.setattr(Destination, "put", put)
        if allowed:
            with pytest.raises(BadInputError, match="broke off: finish it with --resume"):
                append(more, path, workers=0, shard_size_bytes=2000)
        append(more, path, workers=0, shard_size_bytes=2000, resume=bool(allowed))
    else:
        # Killed behind the last write: there is nothing to do again, and nothing is added twice.
        assert len(done) < 12
        with pytest.raises(BadInputError, match="nothing to resume"):
            append(more, path, workers=0, shard_size_bytes=2000, resume=True)
    assert files(path) == undisturbed


def test_an_append_that_is_all_but_published_is_not_mistaken_for_another(
    path: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflow.convert.appending.publish_revision", _die)
    with pytest.raises(Killed):
        append(more, path, workers=0)
    monkeypatch.undo()
    write(tmp_path / "third", range(7))
    with pytest.raises(BadInputError, match="the append that broke off was of"):
        append(tmp_path / "third", path, workers=0, resume=True)
    result = append(more, path, resume=True)
    assert (result.num_samples, result.num_shards) == (60, result.num_resumed)
    assert numbers(path) == list(range(160))


def _die(*_: object) -> None:
    raise Killed


def test_two_that_append_at_once_do_not_lose_each_others_samples(
    path: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((path / "dataset.json").read_text())
    put = Destination.put

    def meanwhile(self: Destination, name: str, chunks: Iterable[Buffer]) -> None:
        put(self, name, chunks)
        if name == "dataset-00001.json":
            write(path.parent / "new", range(5))
            (path / "dataset.json").write_bytes((path.parent / "new" / "dataset.json").read_bytes())

    monkeypatch.setattr(Destination, "put", meanwhile)
    with pytest.raises(BadInputError, match="changed by somebody else"):
        append(more, path, workers=0)
    assert json.loads((path / "dataset.json").read_text())["num_samples"] == 5
    assert content["num_samples"] == 100


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (pa.schema([("n", pa.int32()), ("text", pa.string())]), r"field 'n': int64 and int32"),
        (pa.schema([pa.field("n", pa.int64(), nullable=False), ("text", pa.string())]), "int64 and int64 not null"),
        (pa.schema([label_field("n", ["a", "b"]).with_nullable(True), ("text", pa.string())]), "dataflow.classes"),
        (pa.schema([*SCHEMA, ("more", pa.int8())]), "the dataset has not the field 'more'"),
        (pa.schema([SCHEMA.field(0)]), "the samples to append have not the field 'text'"),
    ],
)
def test_other_fields_are_refused_before_anything_is_written(
    path: Path, tmp_path: Path, schema: pa.Schema, told: str
) -> None:
    before = files(path)
    row = {"n": 1, "text": "x", "more": 1}
    with ShardWriter(tmp_path / "other", schema) as writer:
        writer.write({name: row[name] for name in schema.names})
    with pytest.raises(BadInputError, match=told):
        append(tmp_path / "other", path, workers=0)
    assert files(path) == before


def test_fields_are_taken_in_the_order_of_the_dataset(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "turned", range(100, 103), pa.schema([SCHEMA.field(1), SCHEMA.field(0)]))
    append(tmp_path / "turned", path, workers=0)
    assert numbers(path) == list(range(103))
    write(tmp_path / "wide", range(103, 105))
    append(tmp_path / "wide", path, workers=0, fields=["n", "text"], filter="n > 103")
    assert numbers(path)[-2:] == [102, 104]


def test_a_map_may_make_the_fields_and_is_checked_before_publishing(path: Path) -> None:
    before = files(path)
    append(({"m": number} for number in range(3)), path, workers=0, map=_to_sample)
    assert numbers(path)[-3:] == [0, 1, 2]
    after = files(path)
    with pytest.raises(BadInputError, match="differ"):
        append(({"m": number} for number in range(3)), path, workers=0)
    assert files(path) == after
    assert numbers(path)[-3:] == [0, 1, 2]
    assert before.items() - files(path).items() == {("dataset.json", before["dataset.json"])}


def _to_sample(sample: dict[str, int]) -> dict[str, object]:
    return {"n": sample["m"], "text": "made"}


def test_only_native_datasets_have_versions(path: Path, more: Path, tmp_path: Path) -> None:
    convert(path, tmp_path / "lines", to="jsonl", workers=0)
    with pytest.raises(BadInputError, match="is no native dataset"):
        append(more, tmp_path / "lines")
    with pytest.raises(BadInputError, match="only native datasets have versions"):
        open_dataset(tmp_path / "lines", revision=1)
    with pytest.raises(BadInputError, match="compression cannot be chosen"):
        append(more, path, compression="zstd")
    with pytest.raises(BadInputError, match="give one of them"):
        open_dataset(path, revision=1, index="x")


def test_a_dataset_of_many_versions_can_be_overwritten(path: Path, more: Path) -> None:
    append(more, path, workers=0)
    convert(more, path, overwrite=True, workers=0)
    assert numbers(path) == list(range(100, 160))
    assert not [name for name in files(path) if "rev" in name or "0000" in name.replace("shard-0000", "")]


def test_a_damaged_index_is_not_built_upon(path: Path, more: Path) -> None:
    (path / "index.arrow").write_bytes(b"something")
    with pytest.raises(CorruptError, match=r"index\.arrow"):
        append(more, path, workers=0)


def test_a_dry_run_writes_nothing(path: Path, more: Path) -> None:
    before = files(path)
    assert append(more, path, dry_run=True).num_samples == 60
    assert files(path) == before


def test_the_command_appends(path: Path, more: Path) -> None:
    done = CliRunner().invoke(main, ["convert", str(more), str(path), "--append", "--workers", "0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["num_samples"] == 60
    assert numbers(path) == list(range(160))
    refused = CliRunner().invoke(main, ["convert", str(more), str(path), "--append", "--to", "jsonl"])
    assert refused.exit_code == 2
    assert "--to cannot be chosen with --append" in refused.output
    resumed = CliRunner().invoke(main, ["convert", str(more), str(path), "--append", "--resume"])
    assert resumed.exit_code == 2
    assert "nothing to resume" in resumed.output


def test_an_append_that_fails_leaves_the_old_version_and_can_be_finished(path: Path, more: Path) -> None:
    shard = max(more.glob("shard-*.arrow"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-300] + bytes(300))
    with pytest.raises(DataError):
        append(more, path, workers=0, **SIZES)
    assert numbers(path) == list(range(100))

"""What conversion leaves out, changes and mixes: exact, resumable, the same bytes from any number of workers."""

import gzip
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from connectors.errors import BadInputError, CorruptError, DataError
from dataflow.cli.main import main
from dataflow.convert import Conversion, Progress, convert, parse_rule
from dataflow.dataset import open_dataset
from dataflow.formats import tensor_field
from dataflow.formats.arrow import ShardWriter
from dataflow.formats.destination import Destination

COUNT = 200
SIZES = {"shard_size_bytes": 1500, "block_size_bytes": 300}
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("text", pa.string()),
        tensor_field("matrix", np.int16, (2, 2)),
    ]
)

FUNCTIONS = """
import pyarrow as pa

def even(sample):
    return sample["id"] % 2 == 0

def picky(sample):
    if sample["id"] == 31:
        raise KeyError("31 is not welcome")
    return True

def double(sample):
    return {"id": sample["id"], "twice": 2 * sample["id"], "matrix": sample["matrix"] * 2}

def fails(sample):
    if sample["id"] >= 199:
        raise ValueError("no more")
    return sample

def grows(sample):
    return {"id": sample["id"], "extra": "text" if sample["id"] >= 190 else sample["id"]}

def declared(sample):
    return {"id": sample["id"], "extra": None if sample["id"] < 190 else "late"}

declared.schema = pa.schema([pa.field("id", pa.int64()), pa.field("extra", pa.string())])

def turned(sample):
    return {name: value if value is None or value.ndim == 0 else value[::-1] for name, value in sample.items()}

def any_tensor(sample):
    return sample["bool"].any()

def nothing(sample):
    return None

limit = 3
"""


def sample(number: int) -> dict:
    return {
        "id": number,
        "value": None if number % 20 == 7 else float(number % 13),
        "text": f"text {number % 50}",
        "matrix": np.full((2, 2), number, np.int16),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "set"
    with ShardWriter(path, SCHEMA, **SIZES) as writer:
        for number in range(COUNT):
            writer.write(sample(number))
    return path


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's; every test has its own, under its own name."""
    name = "functions_" + "".join(letter for letter in tmp_path.name if letter.isalnum())
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(folder))
    return name


def ids(path: Path) -> list[int]:
    dataset = open_dataset(path, columns=["id"])
    return dataset.get_batch(range(len(dataset)))["id"].tolist()


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def adds_up(result: Conversion) -> bool:
    dropped = sum(row.dropped for row in result.rules)
    out = result.num_filtered + dropped + result.num_errors + result.num_not_drawn
    return result.num_source == result.num_samples + out


# Filters


def test_a_filter_keeps_what_the_expression_says(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", filter="id >= 150 and value > 3", **SIZES)
    expected = [n for n in range(150, COUNT) if sample(n)["value"] is not None and sample(n)["value"] > 3]
    assert ids(tmp_path / "out") == expected
    assert (result.num_samples, result.num_filtered) == (len(expected), COUNT - len(expected))
    assert adds_up(result)
    assert open_dataset(tmp_path / "out").source.lineage["filter"] == "id >= 150 and value > 3"


def test_a_filter_may_ask_for_a_field_that_is_not_written(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", filter="text == 'text 3'", fields=["id"])
    assert ids(tmp_path / "out") == [3, 53, 103, 153]
    assert open_dataset(tmp_path / "out").schema.names == ["id"]


def test_a_filter_may_be_a_function(source: Path, tmp_path: Path, functions: str) -> None:
    convert(source, tmp_path / "out", filter=f"{functions}:even")
    assert ids(tmp_path / "out") == list(range(0, COUNT, 2))


def test_a_filter_that_keeps_nothing_leaves_an_empty_dataset(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", filter="id < 0")
    assert (result.num_samples, result.num_shards) == (0, 0)
    assert len(open_dataset(tmp_path / "out")) == 0


# Maps


def test_a_map_may_change_fields_and_their_types(source: Path, tmp_path: Path, functions: str) -> None:
    convert(source, tmp_path / "out", map=f"{functions}:double", **SIZES)
    written = open_dataset(tmp_path / "out")
    assert written.schema.names == ["id", "twice", "matrix"]
    assert written.schema.field("matrix").equals(SCHEMA.field("matrix"))
    assert written.get_batch(range(COUNT))["twice"].tolist() == list(range(0, 2 * COUNT, 2))
    assert written[9]["matrix"].tolist() == [[18, 18], [18, 18]]


def test_a_declared_schema_holds_what_the_first_results_do_not_show(
    source: Path, tmp_path: Path, functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflow.convert.conversion.SAMPLES_TO_INFER", 20)
    convert(source, tmp_path / "out", map=f"{functions}:declared")
    assert open_dataset(tmp_path / "out")[195]["extra"] == "late"
    with pytest.raises(DataError, match=r"map failed on sample 190 .*'extra' cannot hold"):
        convert(source, tmp_path / "other", map=f"{functions}:grows")


@pytest.mark.parametrize("name", ["nothing", "missing", "limit"])
def test_what_is_no_map_is_refused(source: Path, tmp_path: Path, functions: str, name: str) -> None:
    with pytest.raises(BadInputError, match=name):
        convert(source, tmp_path / "out", map=f"{functions}:{name}")
    assert not (tmp_path / "out").exists()


def test_a_function_that_other_processes_cannot_import_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="put it at the top of a module"):
        convert(source, tmp_path / "out", map=lambda row: row)


# Parts and orders


def test_parts_are_datasets_of_exact_sizes(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", split={"train": 0.9, "val": 0.1}, filter="id != 5", **SIZES)
    train, val = ids(tmp_path / "out" / "train"), ids(tmp_path / "out" / "val")
    assert (len(train), len(val)) == (179, 20)
    assert sorted(train + val) == [n for n in range(COUNT) if n != 5]
    assert train == sorted(train)
    assert [(part.name, part.num_samples) for part in result.splits] == [("train", 179), ("val", 20)]
    assert open_dataset(tmp_path / "out" / "val").source.lineage["split"] == "val"
    assert adds_up(result)


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_a_shuffle_keeps_every_sample_whole(source: Path, tmp_path: Path, shuffle: str) -> None:
    convert(source, tmp_path / "out", shuffle=shuffle, seed=4, **SIZES)
    written = ids(tmp_path / "out")
    assert sorted(written) == list(range(COUNT))
    assert written != sorted(written)
    for row in open_dataset(tmp_path / "out", columns=["id", "text", "matrix"]):
        expected = sample(int(row["id"]))
        assert row["text"] == expected["text"]
        np.testing.assert_array_equal(row["matrix"], expected["matrix"])


def test_a_fraction_is_exact(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", sample_fraction=0.25, seed=1, **SIZES)
    assert len(ids(tmp_path / "out")) == 50
    assert (result.num_not_drawn, adds_up(result)) == (150, True)


def test_parts_of_files_without_a_manifest_are_written_too(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", to="jsonl", split={"a": 1, "b": 1}, **SIZES)
    rows = [json.loads(line) for file in (tmp_path / "out").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list(range(COUNT))
    convert(source, tmp_path / "out", to="jsonl", split={"a": 1, "b": 1}, overwrite=True)
    assert len(list((tmp_path / "out").rglob("*.jsonl"))) == 2


# Everything at once


def everything(functions: str) -> dict:
    return {
        "shard_size_bytes": 4000,
        "block_size_bytes": 300,
        "filter": f"{functions}:picky",
        "rules": [
            parse_rule(text)
            for text in ["missing field=value fill=median", "zscore field=value limit=1.6", "duplicates fields=text"]
        ],
        "map": f"{functions}:double",
        "split": {"train": 3, "val": 1},
        "sample_fraction": 0.9,
        "shuffle": "full",
        "seed": 11,
        "on_error": "quarantine",
    }


class _BreakOffError(Exception):
    pass


def test_all_options_together_give_the_same_bytes_from_any_workers_and_after_any_break(
    source: Path, tmp_path: Path, functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflow.convert.survey.RANGE_BYTES", 6000)
    settings = everything(functions)
    steps: list[Progress] = []
    whole = convert(source, tmp_path / "one", workers=0, progress=steps.append, **settings)
    assert adds_up(whole)
    assert whole.num_errors == 1
    assert {step.stage for step in steps} == {"measure", "clean", "write"}
    two = convert(source, tmp_path / "two", workers=2, **settings)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert content(tmp_path / "one.quarantine").keys() == content(tmp_path / "two.quarantine").keys()
    assert (two.num_samples, two.rules, two.errors) == (whole.num_samples, whole.rules, whole.errors)
    for number in (1, len(steps) // 2, len(steps) - 2):  # in each of the stages
        seen: list[Progress] = []

        def stop(state: Progress, seen: list[Progress] = seen, number: int = number) -> None:
            seen.append(state)
            if len(seen) == number + 1:
                raise _BreakOffError

        path = tmp_path / f"broken-{number}"
        with pytest.raises(_BreakOffError):
            convert(source, path, progress=stop, **settings)
        assert not list(path.rglob("dataset.json"))
        resumed = convert(source, path, resume=True, **settings)
        assert content(path) == content(tmp_path / "one")
        assert content(tmp_path / f"broken-{number}.quarantine").keys() == content(tmp_path / "one.quarantine").keys()
        assert (resumed.num_samples, resumed.num_errors, resumed.rules) == (whole.num_samples, 1, whole.rules)


def test_broken_off_while_records_are_removed_it_can_still_be_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rules": [parse_rule("zscore field=value limit=1.6"), parse_rule("duplicates fields=text")]}
    convert(source, tmp_path / "whole", **settings)
    delete, removed = Destination.delete, []

    def stop(destination: Destination, names: Iterable[str]) -> None:
        for name in names:
            if len(removed) == limit:
                raise _BreakOffError
            delete(destination, [name])
            removed.append(name)

    for limit in itertools.count():
        removed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Destination, "delete", stop)
            try:
                convert(source, tmp_path / f"{limit}", **settings)
                break
            except _BreakOffError:
                pass
        convert(source, tmp_path / f"{limit}", resume=True, **settings)
        assert content(tmp_path / f"{limit}") == content(tmp_path / "whole")
    assert {name.split("-")[0] for name in removed} == {"survey", "shard"}


@pytest.mark.parametrize("setting", [{"seed": 12}, {"filter": "id > 3"}, {"rules": []}, {"on_error": "skip"}], ids=str)
def test_resuming_with_another_setting_is_refused(source: Path, tmp_path: Path, functions: str, setting: dict) -> None:
    def stop(state: Progress) -> None:
        if state.stage == "write" and state.shards == 1:
            raise _BreakOffError

    with pytest.raises(_BreakOffError):
        convert(source, tmp_path / "out", progress=stop, **everything(functions))
    with pytest.raises(BadInputError, match="parts of another conversion"):
        convert(source, tmp_path / "out", resume=True, **(everything(functions) | setting))


def test_a_function_whose_text_has_changed_is_another_function(source: Path, tmp_path: Path, functions: str) -> None:
    from dataflow.convert.functions import Function

    before = Function(f"{functions}:even").identity()
    file = tmp_path / "code" / f"{functions}.py"
    file.write_text(FUNCTIONS + "\n# changed\n")
    assert Function(f"{functions}:even").identity() != before


def test_a_dry_run_looks_at_the_source_and_writes_nothing(source: Path, tmp_path: Path, functions: str) -> None:
    before = set(tmp_path.iterdir())
    planned = convert(source, tmp_path / "out", dry_run=True, **everything(functions))
    assert set(tmp_path.iterdir()) == before
    done = convert(source, tmp_path / "out", **everything(functions))
    assert (planned.num_samples, planned.rules, planned.num_errors) == (done.num_samples, done.rules, done.num_errors)
    assert planned.num_shards == done.num_shards


# Cleaning


def test_rules_say_what_they_did(source: Path, tmp_path: Path) -> None:
    rules = ["missing field=value fill=mean", "range field=value max=11", "duplicates fields=text"]
    result = convert(source, tmp_path / "out", rules=map(parse_rule, rules), **SIZES)
    values = [sample(n)["value"] for n in range(COUNT)]
    mean = np.mean([value for value in values if value is not None])
    large = [n for n in range(COUNT) if values[n] is not None and values[n] > 11]
    first = {}
    for n in sorted(set(range(COUNT)) - set(large)):
        first.setdefault(sample(n)["text"], n)
    assert [(row.kept, row.changed, row.dropped) for row in result.rules] == [
        (190, 10, 0),
        (COUNT - len(large), 0, len(large)),
        (len(first), 0, COUNT - len(large) - len(first)),
    ]
    assert ids(tmp_path / "out") == sorted(first.values())
    dataset = open_dataset(tmp_path / "out")
    filled = [row["value"] for row in dataset if int(row["id"]) % 20 == 7]
    assert filled == pytest.approx([mean] * len(filled))
    assert dataset.source.lineage["rules"][0] == {"rule": "missing value", "kept": 190, "changed": 10, "dropped": 0}


def test_duplicates_are_found_across_parts_that_are_merged_one_after_the_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataflow.convert.survey.RANGE_BYTES", 1000)
    monkeypatch.setattr("dataflow.convert.digests.MERGE_BYTES", 100)
    convert(source, tmp_path / "out", rules=[parse_rule("duplicates fields=text")])
    assert ids(tmp_path / "out") == list(range(50))
    convert(source, tmp_path / "all", rules=[parse_rule("duplicates")])
    assert ids(tmp_path / "all") == list(range(COUNT))


# Bad samples


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> tuple[Path, set[int]]:
    """A copy of the source with a flipped byte, and the samples that are lost by it."""
    copy = tmp_path / "damaged"
    convert(source, copy, **SIZES)
    dataset = open_dataset(copy)
    block = dataset.index.num_blocks // 2
    ref = dataset.index.block_ref(block)
    file = Path(ref.uri.removeprefix("file://"))
    data = bytearray(file.read_bytes())
    data[ref.offset + ref.length // 2] ^= 1
    file.write_bytes(data)
    return copy, set(range(*dataset.index.blocks.first_sample[block : block + 2].tolist()))


def test_a_bad_block_ends_the_conversion_unless_told_otherwise(damaged: tuple[Path, set[int]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="offset"):
        convert(damaged[0], tmp_path / "out")


@pytest.mark.parametrize("shuffle", [None, "full"])
@pytest.mark.parametrize("chosen", [None, "id >= 0"])
def test_a_bad_block_is_left_out_and_counted(
    damaged: tuple[Path, set[int]], tmp_path: Path, chosen: str | None, shuffle: str | None
) -> None:
    path, lost = damaged
    result = convert(path, tmp_path / "out", on_error="skip", filter=chosen, shuffle=shuffle, **SIZES)
    assert set(ids(tmp_path / "out")) == set(range(COUNT)) - lost
    assert (result.num_errors, adds_up(result)) == (len(lost), True)
    assert f"sample {min(lost)}: read: " in " ".join(result.errors) or shuffle
    assert open_dataset(tmp_path / "out").source.lineage["lost"] == len(lost)


def test_too_many_bad_samples_end_the_conversion(damaged: tuple[Path, set[int]], tmp_path: Path) -> None:
    path, lost = damaged
    with pytest.raises(DataError, match=r"more than 1 samples \(max_errors\) are bad"):
        convert(path, tmp_path / "out", on_error="skip", max_errors=1)
    assert convert(path, tmp_path / "fine", on_error="skip", max_errors=len(lost)).num_errors == len(lost)
    with pytest.raises(BadInputError, match="on_error"):
        convert(path, tmp_path / "none", max_errors=1)


def test_a_quarantine_says_what_where_and_why(damaged: tuple[Path, set[int]], tmp_path: Path, functions: str) -> None:
    path, lost = damaged
    result = convert(
        path,
        tmp_path / "out",
        on_error="quarantine",
        map=f"{functions}:fails",
        rules=[parse_rule("range field=value max=10"), parse_rule("duplicates fields=text")],
        filter="id in (0, 1, 11, 12, 51, 199) or text == 'text 49' or id >= " + str(min(lost)),
    )
    assert result.quarantine == f"{(tmp_path / 'out').as_uri()}.quarantine"
    rejects = list(open_dataset(tmp_path / "out.quarantine"))
    stages = {stage: {int(row["sample"]) for row in rejects if row["stage"] == stage} for stage in ("read", "map")}
    assert stages["read"] == lost
    reasons = {row["reason"].split(" sample")[0] for row in rejects if row["stage"] == "clean"}
    assert reasons == {"range value", "equals"}
    for row in rejects:
        assert row["uri"].startswith(path.as_uri())
        if row["stage"] == "clean" and row["record"] is not None:
            (kept,) = pa.ipc.open_stream(row["record"]).read_all().to_pylist()
            assert kept["id"] == row["sample"]
            assert kept["value"] > 10
    assert len(rejects) == result.num_errors + sum(row.dropped for row in result.rules)
    assert adds_up(result)


NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
TENSORS = ["bool", *NUMBERS, "float16", "float32", "float64"]


def test_functions_see_and_give_tensors_of_every_type(tmp_path: Path, functions: str) -> None:
    schema = pa.schema([tensor_field(name, name, (3, 2)) for name in TENSORS])
    arrays = {name: (np.arange(5 * 6) % 7 % 5).reshape(5, 3, 2).astype(name) for name in TENSORS}
    arrays["bool"][2] = False
    with ShardWriter(tmp_path / "in", schema, block_size_bytes=300) as writer:
        writer.write_columns(arrays)
    convert(tmp_path / "in", tmp_path / "out", map=f"{functions}:turned", filter=f"{functions}:any_tensor", verify=True)
    turned = open_dataset(tmp_path / "out").get_batch(range(4))
    for name in TENSORS:
        np.testing.assert_array_equal(turned[name], np.delete(arrays[name], 2, axis=0)[:, ::-1], strict=True)


@pytest.mark.parametrize("dtype", ["bool", "float16"])
def test_functions_see_missing_tensors_and_turned_axes(tmp_path: Path, functions: str, dtype: str) -> None:
    missing = tensor_field("missing", dtype, (2, 2)).with_nullable(True)
    turned = pa.field("turned", pa.fixed_shape_tensor(pa.from_numpy_dtype(dtype), (2, 3), permutation=[1, 0]))
    values = (np.arange(24) % 5 % 2).astype(dtype).reshape(4, 3, 2)  # as readers see them: axes in their order
    rows = [{"missing": None if n % 2 else value[:2], "turned": value} for n, value in enumerate(values)]
    with ShardWriter(tmp_path / "in", pa.schema([missing, turned])) as writer:
        for row in rows:
            writer.write(row)
    convert(tmp_path / "in", tmp_path / "out", map=f"{functions}:turned")
    written = open_dataset(tmp_path / "out", columns=["turned"]).get_batch(range(4))["turned"]
    np.testing.assert_array_equal(written, values[:, ::-1], strict=True)
    convert(tmp_path / "out", tmp_path / "lines", to="jsonl")
    lines = [json.loads(line) for line in (tmp_path / "lines" / "shard-00000.jsonl").read_text().splitlines()]
    assert lines == [
        {"missing": None if n % 2 else value[:2][::-1].tolist(), "turned": value[::-1].tolist()}
        for n, value in enumerate(values)
    ]


def test_a_failing_map_is_an_error_of_its_sample(source: Path, tmp_path: Path, functions: str) -> None:
    with pytest.raises(DataError, match=r"map failed on sample 199 .* ValueError: no more"):
        convert(source, tmp_path / "out", map=f"{functions}:fails")
    result = convert(source, tmp_path / "skipped", map=f"{functions}:fails", on_error="skip")
    assert (result.num_samples, result.errors) == (199, ("sample 199: map: ValueError: no more",))


def test_nothing_rejected_leaves_no_quarantine(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "out", on_error="quarantine")
    assert result.quarantine is None
    assert not (tmp_path / "out.quarantine").exists()


def test_a_quarantine_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.quarantine").mkdir()
    (tmp_path / "out.quarantine" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BadInputError, match=r"mine\.txt"):
            convert(source, tmp_path / "out", on_error="quarantine", overwrite=overwrite)
    with pytest.raises(BadInputError, match="must not contain each other"):
        convert(source, tmp_path / "out", on_error="quarantine", quarantine=tmp_path / "out" / "bad")


def test_a_damaged_record_is_named(source: Path, tmp_path: Path) -> None:
    def stop(state: Progress) -> None:
        if state.stage == "write":
            raise _BreakOffError

    with pytest.raises(_BreakOffError):
        convert(source, tmp_path / "out", progress=stop, filter="id > 3")
    (tmp_path / "out" / "survey-clean-00000.part").write_bytes(b"{")
    with pytest.raises(CorruptError, match=r"survey-clean-00000\.part"):
        convert(source, tmp_path / "out", resume=True, filter="id > 3")


# The command line


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    return result.exit_code, result.stdout


def test_the_command_tells_the_truth(damaged: tuple[Path, set[int]], tmp_path: Path) -> None:
    path, lost = damaged
    (tmp_path / "rules.toml").write_text('[[rule]]\nrule = "range"\nfield = "value"\nmax = 11\n')
    code, output = run(
        path, tmp_path / "out", "--on-error", "quarantine", "--filter", "id >= 10", "--clean", tmp_path / "rules.toml",
        "--rule", "missing field=value", "--split", "train=.9,val=.1", "--shuffle", "--seed", 3,
        "--sample-fraction", 0.5,
    )  # fmt: skip
    assert code == 3
    assert "range value: " in output
    assert "missing value: " in output
    assert "10 filtered, " in output
    assert f"{len(lost)} bad" in output
    assert "train: " in output
    assert "rejected samples are at " in output
    assert run(path, tmp_path / "quiet", "--on-error", "skip", "--quiet") == (3, "")
    assert run(path, tmp_path / "failed")[0] == 1
    assert run(path, tmp_path / "wrong", "--filter", "nothing > 3")[0] == 2


def test_functions_are_found_in_this_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions_of_this_folder.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    code, output = run(source, tmp_path / "out", "--map", "functions_of_this_folder:double", "--workers", 0)
    assert (code, "200 samples" in output) == (0, True)


@pytest.mark.parametrize("split", ["train", "train=a", "a=1,a=2"])
def test_what_is_no_split_is_refused(source: Path, tmp_path: Path, split: str) -> None:
    assert run(source, tmp_path / "out", "--split", split)[0] == 2


# Damaged records, found by the scan


def lines(path: Path, content: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in content))
    return path


@pytest.mark.usefixtures("kept_scans")
@pytest.mark.parametrize("block_bytes", [40, 1 << 20])
def test_bad_lines_are_quarantined_with_their_place_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("dataflow.formats.text.BLOCK_BYTES", block_bytes)
    bad = {3: '{"id": 3,', 4: "[1]", 9: '{"id": "nine"}', 19: "\x00"}
    written = [bad.get(n, json.dumps({"id": n, "name": f"é{n}"})) for n in range(20)]
    source = lines(tmp_path / "in.jsonl", written)
    with pytest.raises(DataError):
        convert(source, tmp_path / "strict")
    for name in ("first", "from the kept scan"):
        result = convert(source, tmp_path / name, on_error="quarantine")
        assert ids(tmp_path / name) == [n for n in range(20) if n not in bad]
        assert (result.num_errors, adds_up(result)) == (4, True)
        rejects = list(open_dataset(tmp_path / f"{name}.quarantine"))
        assert [row["stage"] for row in rejects] == ["scan"] * 4
        starts = [len("".join(line + "\n" for line in written[:n]).encode()) for n in bad]
        assert [int(row["offset"]) for row in rejects] == starts
        assert [row["record"] for row in rejects] == [f"{text}\n".encode() for text in bad.values()]
        assert {row["uri"] for row in rejects} == {source.as_uri()}
    with pytest.raises(DataError, match="more than 3"):
        convert(source, tmp_path / "few", on_error="skip", max_errors=3)
    with pytest.raises(DataError):
        open_dataset(source)


@pytest.mark.usefixtures("kept_scans")
def test_bad_lines_of_csv_are_passed_over(tmp_path: Path) -> None:
    source = lines(tmp_path / "in.csv", ["id,name", "1,a", "2,b,c", '3,"d\ne"', "4", "5,f"])
    assert convert(source, tmp_path / "out", on_error="skip").num_errors == 2
    assert ids(tmp_path / "out") == [1, 3, 5]


@pytest.mark.usefixtures("kept_scans")
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_bad_records_of_tfrecord_are_passed_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("dataflow.formats.tfrecord.BLOCK_BYTES", block_bytes)
    convert(source, tmp_path / "in", to="tfrecord", fields=["id"], filter="id < 20")
    file = tmp_path / "in" / "shard-00000.tfrecord"
    data = bytearray(file.read_bytes())
    size_bytes = len(data) // 20
    data[5 * size_bytes + 20] ^= 1  # the content of the sixth record
    data[12 * size_bytes] ^= 1  # the length of the thirteenth
    file.write_bytes(data)
    result = convert(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert ids(tmp_path / "out") == [n for n in range(12) if n != 5]
    assert result.num_errors == 2
    assert f"offset {12 * size_bytes}" in result.errors[1]
    file.write_bytes(data[: 3 * size_bytes - 1])
    convert(tmp_path / "in", tmp_path / "cut", on_error="skip")
    assert ids(tmp_path / "cut") == [0, 1]


@pytest.mark.usefixtures("kept_scans")
def test_a_damaged_compressed_file_is_passed_over_whole(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n'))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(b"damaged")
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(b"")
    assert convert(tmp_path / "in", tmp_path / "out", on_error="quarantine").num_errors == 2
    assert ids(tmp_path / "out") == [1]

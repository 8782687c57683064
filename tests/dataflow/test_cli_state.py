import argparse
import copy
import functools
import json
import operator
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset
from dataflow.cli.main import main


def run(*arguments):
    return CliRunner().invoke(main, ["state", *map(str, arguments)])


def words_of(result):
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    for name, rows in (("set", 40), ("other", 41)):
        with ShardWriter(folder / name, pa.schema([("number", pa.int64())])) as writer:
            for number in range(rows):
                writer.write({"number": number})
    return folder


@pytest.fixture(scope="module")
def loader(folder):
    dataset = open_dataset(folder / "set")
    loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 8, seed=4))
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    return loader


@pytest.fixture(scope="module")
def saved(folder, loader):
    file = folder / "state.json"
    file.write_text(json.dumps(loader.state_dict()))
    return file


def test_show_says_where_a_loader_stood(saved, loader):
    result = run("show", saved)
    assert result.exit_code == 0
    assert "stands at epoch 0, step 2, 16 samples" in words_of(result)
    assert "sampler.seed 4" in words_of(result)
    assert json.loads(run("show", saved, "--json").output) == loader.state_dict()


def test_a_state_is_found_inside_a_checkpoint_of_torch(tmp_path, saved, loader):
    file = tmp_path / "model.ckpt"
    loops = {"fit_loop": {"state_dict": {"combined_loader": [loader.state_dict()]}}}
    torch.save({"epoch": 3, "version": 9, "model": {"weight": torch.ones(2)}, "loops": loops}, file)
    assert run("show", file).output == run("show", saved).output


def test_a_state_of_torchs_samplers_is_shown(tmp_path):
    loader = DataLoader(list(range(40)), batch_size=4, shuffle=True)
    file = tmp_path / "state.json"
    file.write_text(json.dumps(loader.state_dict()))
    assert "stands at the beginning of epoch 0" in words_of(run("show", file))
    iterator = iter(loader)
    next(iterator)
    file.write_text(json.dumps(loader.state_dict()))
    shown = words_of(run("show", file))
    assert "stands at epoch 0, 1 batches" in shown
    assert "epoch.landmark.batch 0" in shown
    assert run("check", file).exit_code == 0
    state = loader.state_dict()
    state["epoch"]["landmark"]["batch"] = 2
    file.write_text(json.dumps(state))
    assert "is damaged" in words_of(run("check", file))


def test_diff_names_what_differs(tmp_path, saved, loader):
    state = loader.state_dict()
    state["sampler"]["position"] += 8
    del state["ahead"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(state))
    result = run("diff", saved, other)
    assert (result.exit_code, result.output) == (1, "sampler.position: 16 -> 24\nahead: [] -> (absent)\n")
    assert run("diff", saved, saved).output == "the states are equal\n"


def test_check_knows_the_data_set(folder, saved):
    result = run("check", saved, "--dataset", folder / "set")
    assert (result.exit_code, result.output.split(" in /")[0]) == (0, "ok: epoch 0, step 2, 16 samples of 40")
    wrong = run("check", saved, "--dataset", folder / "other")
    assert wrong.exit_code == 2
    assert "belongs to another dataset" in wrong.output


def test_check_refuses_another_version(tmp_path, loader):
    file = tmp_path / "state.json"
    file.write_text(json.dumps({**loader.state_dict(), "version": 99}))
    result = run("check", file)
    assert result.exit_code == 2
    assert "version 99" in result.output


@pytest.fixture(scope="module")
def states(loader):
    """States of all kinds, by name: ours, torch's, and a sampler's alone."""
    shuffled = DataLoader(list(range(40)), batch_size=4, shuffle=True)
    between = shuffled.state_dict()
    next(iter(shuffled))
    ours = loader.state_dict()
    return {"elastic": ours, "sampler": ours["sampler"], "between": between, "torch": shuffled.state_dict()}


@pytest.mark.parametrize(
    ("kind", "path", "damage"),
    [
        ("elastic", ("sampler", "epoch"), "x"),
        ("elastic", ("sampler", "position"), None),
        ("elastic", ("sampler", "step"), -1),
        ("elastic", ("sampler",), {}),
        ("elastic", ("ahead",), ["x"]),
        ("sampler", ("position",), [1]),
        ("torch", ("epoch",), "x"),
        ("torch", ("epoch", "batches"), "many"),
        ("torch", ("epoch", "order"), {}),
        ("between", ("order",), None),
        ("between", ("next_epoch",), None),
    ],
)
def test_check_refuses_a_damaged_state_and_show_shows_it(tmp_path, states, kind, path, damage):
    file, state = tmp_path / "state.json", copy.deepcopy(states[kind])
    file.write_text(json.dumps(state))
    assert run("check", file).exit_code == 0
    *outer, last = path
    functools.reduce(operator.getitem, outer, state)[last] = damage
    file.write_text(json.dumps(state))
    result = run("check", file)
    assert result.exit_code == 2
    assert "is damaged" in words_of(result)
    shown = run("show", file)
    assert shown.exit_code == 0
    assert "stands at" in shown.output


@pytest.mark.parametrize(
    ("kind", "path"), [("elastic", ("sampler",)), ("elastic", ()), ("sampler", ()), ("torch", ()), ("between", ())]
)
def test_check_knows_the_version_of_each_part(tmp_path, states, kind, path):
    file, state = tmp_path / "state.json", copy.deepcopy(states[kind])
    functools.reduce(operator.getitem, path, state)["version"] = 7
    file.write_text(json.dumps(state))
    result = run("check", file)
    assert result.exit_code == 2
    assert "version 7 and this release reads 1" in words_of(result)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "neither JSON nor a checkpoint"),
        (b"{}", "holds no state of a loader"),
        (b"\x80\x02no pickle", "neither JSON nor a checkpoint"),
        (b"", "neither JSON nor a checkpoint"),
        (b"nonsense", "neither JSON nor a checkpoint"),
    ],
    ids=["nested", "empty object", "pickle", "empty", "text"],
)
def test_a_file_without_a_state_is_refused(tmp_path, content, message):
    file = tmp_path / "state"
    file.write_bytes(content)
    result = run("show", file)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"), reason="torch before 2.6")
@pytest.mark.parametrize(
    "other",
    [argparse.Namespace(rate=1), functools.partial(print, 1), Path("here"), torch.nn.Linear(2, 2), print],
    ids=["namespace", "partial", "path", "module", "function"],
)
def test_other_objects_in_a_checkpoint_are_passed_over(tmp_path, loader, other):
    torch.save({"arguments": other, "loader": loader.state_dict()}, tmp_path / "model.ckpt")
    assert json.loads(run("show", tmp_path / "model.ckpt", "--json").output) == loader.state_dict()


class _RunsCode:
    def __reduce__(self):
        return exec, ("open('run', 'w')",)


class _Rows(list):
    pass


def test_nothing_of_a_checkpoint_is_run(tmp_path, loader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"other": _RunsCode(), "loader": loader.state_dict()}, "model.ckpt")
    run("show", "model.ckpt")
    assert not Path("run").exists()


def test_a_checkpoint_that_cannot_be_read_without_running_it_says_what_to_do(tmp_path, loader):
    torch.save({"other": _Rows([1]), "loader": loader.state_dict()}, tmp_path / "model.ckpt")
    result = run("show", tmp_path / "model.ckpt")
    assert result.exit_code == 2
    assert "save the loader's state to a file of its own" in words_of(result)
    assert "weights_only" not in result.output  # torch's advice is to run it


def test_a_checkpoint_of_the_form_before_zip_files_is_read(tmp_path, loader):
    torch.save(loader.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert run("show", tmp_path / "old.pt").exit_code == 0


def test_two_states_in_one_file_are_named(tmp_path, loader):
    file = tmp_path / "state.json"
    file.write_text(json.dumps({"train": loader.state_dict(), "val": loader.state_dict()}))
    assert "(train, val)" in run("show", file).output


def test_a_missing_file_is_named(tmp_path):
    result = run("show", tmp_path / "none")
    assert result.exit_code == 1
    assert "no file at" in result.output

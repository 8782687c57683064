"""Real ranks under torchrun: what each reads is what was planned, also after a rank is killed and others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dataflow.order import (
    BalancedParts,
    Division,
    EqualParts,
    Filtered,
    Mesh,
    Mixture,
    PackedBatches,
    Schedule,
    Selection,
    Shuffle,
    WeightedParts,
    divide,
)

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)

# One rank: reads step by step, notes what it saw, and lets rank 0 save the state when all have seen the step.
RANK = """
import contextlib, json, os, signal, sys
import torch.distributed as dist
sys.path.insert(0, {here!r})
from test_ranks import DIVISIONS, Numbers, schedule
from dataflow import DataLoader
from dataflow.loaders import ScheduleSampler, WeightTuner
from dataflow.order import Mesh

folder, die_at = sys.argv[1], int(sys.argv[2])
division, peers = DIVISIONS.get(sys.argv[4], DIVISIONS["equal"]), int(sys.argv[5])
dist.init_process_group("gloo")
mesh = None
if peers > 1:
    from torch.distributed.device_mesh import init_device_mesh
    device_mesh = init_device_mesh("cpu", (dist.get_world_size() // peers, peers), mesh_dim_names=("dp", "tp"))
    mesh = Mesh.from_device_mesh(device_mesh, ("dp",))
sampler = ScheduleSampler(schedule(), fingerprint="numbers", mesh=mesh, division=division)
loader = DataLoader(Numbers(), batch_sampler=sampler, num_workers=int(sys.argv[3]), collate_fn=list)
state = folder + "/state.json"
busy_s = 0.0
tuner = WeightTuner(sampler, every_steps=3, clock=lambda: busy_s) if sys.argv[4] == "tuned" else None
if os.path.exists(state):
    loader.load_state_dict(json.load(open(state)))
with open(folder + "/rank-" + str(dist.get_rank()) + ".jsonl", "a") as trace:
    batches = iter(loader)
    step = sampler.first_step
    for batch in batches:
        with contextlib.nullcontext() if tuner is None else tuner.computing(len(batch)):
            busy_s += len(batch) / (1 + dist.get_rank())  # rank 1 is twice as fast as rank 0
        trace.write(json.dumps(dict(step=step, world=dist.get_world_size(), rank=dist.get_rank(), saw=batch)) + "\\n")
        trace.flush()
        step += 1
        dist.barrier()
        if dist.get_rank() == 0:
            with open(state + ".part", "w") as file:
                json.dump(loader.state_dict(), file)
            os.replace(state + ".part", state)
        dist.barrier()
        if step == die_at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
dist.destroy_process_group()
"""


class Numbers:
    """A pack's "data" are the numbers of its samples."""

    def __getitem__(self, pack: list[int]) -> list[int]:
        return pack


def schedule() -> Schedule:
    """Everything at once: blocks, a filter, a mixture and packing."""
    blocks = Shuffle(200, np.arange(0, 201, 8), "block", 5, 4)
    kept = Filtered(blocks, Selection(np.random.default_rng(1).random(200) < 0.7))
    mixture = Mixture((kept, Shuffle(100, None, "full", 6, 1)), (200, 100), (1.0, 2.0), 600, 30, 7)
    return Schedule(mixture, PackedBatches(LENGTHS, 64, 9, window_samples=110, seed=1))


DIVISIONS: dict[str, Division] = {
    "equal": EqualParts(),
    "weighted": WeightedParts((1.0, 2.0)),
    "balanced": BalancedParts(LENGTHS),
}


@pytest.fixture(autouse=True)
def _the_launcher_leaves_no_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Not `tmp_path`, for a socket's path is no longer than 107 bytes. Workers of a killed rank may be just leaving.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert not list(Path(folder).glob("torchelastic_*"))


def torchrun(
    folder: Path, world_size: int, *, die_at: int, num_workers: int, division: str = "equal", peers: int = 1
) -> int:
    script = folder / "rank.py"
    script.write_text(RANK.format(here=str(Path(__file__).parent)))
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    logs = f"--log-dir={folder / 'logs'}"  # else a new folder under /tmp, which stays
    running = subprocess.Popen(
        [*command, logs, str(script), str(folder), str(die_at), str(num_workers), division, str(peers)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = running.communicate(timeout=90)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    if die_at < 0 and running.returncode:
        pytest.fail(output.decode())
    return running.returncode


Seen = dict[int, dict[tuple[int, int], list[list[int]]]]


def what_ranks_saw(folder: Path) -> Seen:
    """By step, then by (world size, rank)."""
    seen: Seen = {}
    for trace in folder.glob("rank-*.jsonl"):
        for line in map(json.loads, trace.read_text().splitlines()):
            at_step = seen.setdefault(line["step"], {})
            assert (line["world"], line["rank"]) not in at_step, "a step was read twice by the same ranks"
            at_step[line["world"], line["rank"]] = line["saw"]
    return seen


def assert_as_planned(seen: Seen, jobs: dict[int, tuple[str, Mesh]]) -> None:
    """Every rank saw its part of the plan, and every step was read whole by some job; `jobs` by their world size."""
    epoch = schedule().epoch(0)
    batches = list(epoch.batches())
    assert sorted(seen) == list(range(len(batches)))
    whole_steps = dict.fromkeys(jobs, 0)
    for step, batch in enumerate(batches):
        for (world_size, rank), saw in seen[step].items():
            division, mesh = jobs[world_size]
            units = divide(DIVISIONS[division], batch, mesh.num_replicas).of(mesh.replica_of(rank)).tolist()
            assert saw == [epoch.order.at(batch.positions_of(np.array([unit]))).tolist() for unit in units]
        # A kill may cut a step in two; the ranks that follow then read it whole.
        whole = [world for world in jobs if all((world, rank) in seen[step] for rank in range(world))]
        assert whole
        for world_size in whole:
            whole_steps[world_size] += 1
    assert all(whole_steps.values())


def data_parallel(world_size: int, peers: int = 1) -> Mesh:
    return Mesh.from_sizes({"dp": world_size // peers, "tp": peers}, ("dp",))


@pytest.mark.slow
def test_killed_ranks_are_followed_by_another_number_that_goes_on_with_the_plan(tmp_path: Path) -> None:
    assert torchrun(tmp_path, 4, die_at=6, num_workers=0) != 0
    assert torchrun(tmp_path, 2, die_at=13, num_workers=1, division="balanced") != 0
    assert torchrun(tmp_path, 1, die_at=-1, num_workers=2) == 0
    jobs = {4: ("equal", data_parallel(4)), 2: ("balanced", data_parallel(2)), 1: ("equal", data_parallel(1))}
    assert_as_planned(what_ranks_saw(tmp_path), jobs)


@pytest.mark.slow
def test_weighted_replicas_of_a_device_mesh_are_disjoint_and_their_peers_identical(tmp_path: Path) -> None:
    assert torchrun(tmp_path, 4, die_at=6, num_workers=0, division="weighted", peers=2) != 0
    assert torchrun(tmp_path, 1, die_at=-1, num_workers=0) == 0
    seen = what_ranks_saw(tmp_path)
    assert_as_planned(seen, {4: ("weighted", data_parallel(4, peers=2)), 1: ("equal", data_parallel(1))})
    for step in range(5):
        first, peer, other, other_peer = (seen[step][4, rank] for rank in range(4))
        assert first == peer
        assert other == other_peer
        assert (len(first), len(other)) == (3, 6)
        assert not {tuple(pack) for pack in first} & {tuple(pack) for pack in other}


@pytest.mark.slow
def test_ranks_agree_on_weights_while_they_train_and_go_on_with_them_after_a_kill(tmp_path: Path) -> None:
    assert torchrun(tmp_path, 2, die_at=12, num_workers=1, division="tuned") != 0
    state = json.loads((tmp_path / "state.json").read_text())
    ((_, weights),) = state["sampler"]["replica_weights"]
    assert weights[1] == 2 * weights[0]
    begun = what_ranks_saw(tmp_path)
    for trace in tmp_path.glob("rank-*.jsonl"):
        trace.unlink()
    assert torchrun(tmp_path, 2, die_at=-1, num_workers=0, division="tuned") == 0
    resumed = what_ranks_saw(tmp_path)
    epoch = schedule().epoch(0)
    sizes = []
    for step, batch in enumerate(epoch.batches()):
        seen = begun[step] if step in begun and len(begun[step]) == 2 and step not in resumed else resumed[step]
        packs = [epoch.order.at(batch.positions_of(np.array([unit]))).tolist() for unit in range(batch.num_units)]
        assert seen[2, 0] + seen[2, 1] == packs
        if batch.num_units == 9:
            sizes.append((len(seen[2, 0]), len(seen[2, 1])))
    change = sizes.index((3, 6))
    assert 3 <= change < 12
    assert sizes == [(4, 5)] * change + [(3, 6)] * (len(sizes) - change)

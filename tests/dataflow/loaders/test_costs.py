import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectors.errors import BadInputError
from dataflow.loaders import DataLoader, ElasticBatchSampler, MeasuredCosts, TimedDataset
from dataflow.order import BalancedParts, EqualParts
from dataflow.order.plan import BlockTable, plan_epoch

NUM_SAMPLES = 64


class Uneven:
    """Eight samples of each 32 are much work, as its own clock says."""

    now_ns = 0

    def clock_ns(self) -> int:
        return self.now_ns

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < NUM_SAMPLES:
            raise IndexError(number)
        self.now_ns += 900_000 if number % 32 < 8 else 100_500
        return number


class Batched(Uneven):
    """Tells how it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getitem__(self, number: int) -> int:
        self.asked.append(number)
        return super().__getitem__(number)

    def __getitems__(self, numbers: Any) -> list[int]:
        self.asked.append(list(numbers))
        return [super(Batched, self).__getitem__(number) for number in numbers]


def test_workers_measure_and_the_costs_balance_what_ranks_decode(tmp_path: Path) -> None:
    costs = MeasuredCosts(tmp_path / "costs.npy", NUM_SAMPLES)
    sampler = ElasticBatchSampler(Uneven(), 32, shuffle=False)
    dataset = Uneven()
    timed = TimedDataset(dataset, costs, clock_ns=dataset.clock_ns)
    loader = DataLoader(timed, batch_sampler=sampler, num_workers=2)
    assert [number for batch in loader for number in batch.tolist()] == list(range(NUM_SAMPLES))
    assert costs.num_measured == NUM_SAMPLES
    known = MeasuredCosts(tmp_path / "costs.npy", NUM_SAMPLES).agreed()
    assert known.tolist() == ([900] * 8 + [100] * 24) * (NUM_SAMPLES // 32)
    table = BlockTable(np.array([0, NUM_SAMPLES]), np.array([NUM_SAMPLES]))
    equal, balanced = (
        plan_epoch(sampler.schedule, division, 2, table, epoch=0, max_steps=None, costs=known)
        for division in (EqualParts(), BalancedParts(known))
    )
    assert balanced.equal_costs == equal.balance_costs
    assert balanced.balance_costs < 1.2 < 1.5 < equal.balance_costs


def test_samples_are_measured_once_and_read_in_batches_ever_after(tmp_path: Path) -> None:
    dataset = Batched()
    timed = TimedDataset(dataset, MeasuredCosts(tmp_path / "costs.npy", NUM_SAMPLES))
    assert timed.__getitems__([3, 1]) == [3, 1]
    assert timed.__getitems__([1, 3]) == [1, 3]
    assert timed.__getitems__([1, 2]) == [1, 2]
    assert dataset.asked == [3, 1, [1, 3], 1, 2]
    assert timed[5] == 5
    with pytest.raises(IndexError):
        timed[NUM_SAMPLES]


def test_a_copy_in_another_process_writes_to_the_same_file(tmp_path: Path) -> None:
    costs = MeasuredCosts(tmp_path / "costs.npy", NUM_SAMPLES)
    TimedDataset(Uneven(), pickle.loads(pickle.dumps(costs)))[7]
    assert costs.num_measured == 1
    assert costs.microseconds[7] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["costs.npy"]


def test_what_nobody_measured_is_taken_for_the_median(tmp_path: Path) -> None:
    costs = MeasuredCosts(tmp_path / "costs.npy", 5)
    assert costs.agreed().tolist() == [1] * 5
    costs.microseconds[:4] = [10, 20, 30, 0]
    assert costs.agreed().tolist() == [10, 20, 30, 20, 20]


RANK = """
import sys
import numpy as np
import torch.distributed
from dataflow.loaders import MeasuredCosts
number = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/rendezvous", rank=number, world_size=2)
costs = MeasuredCosts(f"{sys.argv[2]}/costs-{number}.npy", 4)
costs.microseconds[:] = [[5, 0, 7, 0], [9, 6, 0, 0]][number]
print(costs.agreed().tolist())
torch.distributed.destroy_process_group()
"""


def test_ranks_of_different_nodes_agree(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(number), tmp_path], stdout=-1, text=True, env=environment)
        for number in range(2)
    ]
    try:
        assert [process.communicate(timeout=100)[0] for process in ranks] == ["[5, 6, 7, 6]\n"] * 2
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    MeasuredCosts(tmp_path / "costs.npy", 5)
    with pytest.raises(BadInputError, match="not the costs of 6 samples"):
        MeasuredCosts(tmp_path / "costs.npy", 6)
    (tmp_path / "other.npy").write_text("nothing of the kind")
    with pytest.raises(BadInputError, match="holds no measured costs"):
        MeasuredCosts(tmp_path / "other.npy", 5)
    with pytest.raises(BadInputError, match="costs are of 5 samples"):
        TimedDataset(Uneven(), MeasuredCosts(tmp_path / "costs.npy", 5))

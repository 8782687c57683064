import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.errors import BadInputError
from dataflow.order import EqualParts, FullOrder, GlobalBatch, LocalParts, SequentialOrder, divide


def local_share(parts, homes: np.ndarray, nodes: list[int]) -> float:
    node_of_unit = np.repeat(nodes, np.diff(parts.starts))
    return float((node_of_unit == homes[parts.units]).mean())


@given(
    homes=st.lists(st.integers(-1, 6), min_size=1, max_size=80),
    nodes=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_the_batch_and_the_sizes_of_parts_never_change(homes: list[int], nodes: list[int]) -> None:
    array = np.array(homes)
    batch = GlobalBatch(SequentialOrder(len(homes)), np.arange(len(homes)), None, 0)
    equal = divide(EqualParts(), batch, len(nodes))
    local = divide(LocalParts(lambda samples: array[samples], tuple(nodes)), batch, len(nodes))
    assert np.array_equal(np.sort(local.units), np.arange(len(homes)))
    assert local.starts.tolist() == equal.starts.tolist()
    # As many as fit stay at home: no other dealing of equal parts could keep more.
    room = dict.fromkeys(nodes, 0)
    for node, size in zip(nodes, np.diff(equal.starts).tolist(), strict=True):
        room[node] += size
    best = sum(min(room[node], homes.count(node)) for node in room)
    assert local_share(local, array, nodes) * len(homes) == pytest.approx(best)


@pytest.mark.parametrize(("ranks", "per_rank", "at_least"), [(8, 256, 0.97), (64, 32, 0.9), (1024, 8, 0.85)])
def test_most_reads_are_local_whatever_the_number_of_nodes(ranks: int, per_rank: int, at_least: float) -> None:
    # Blocks hashed to nodes, one rank a node: the hardest case.
    num_samples = ranks * per_rank * 4
    home = np.random.default_rng(0).integers(0, ranks, num_samples)
    order = FullOrder(num_samples, 0, 0)
    found, plain = [], []
    for start in range(0, num_samples, ranks * per_rank):
        batch = GlobalBatch(order, np.arange(start, start + ranks * per_rank), None, 0)
        homes = home[batch.samples()]
        division = LocalParts(lambda samples: home[samples], tuple(range(ranks)))
        found.append(local_share(divide(division, batch, ranks), homes, list(range(ranks))))
        plain.append(local_share(divide(EqualParts(), batch, ranks), homes, list(range(ranks))))
    assert np.mean(found) >= at_least
    assert np.mean(plain) < 2 / ranks


def test_a_pack_lives_where_its_first_sample_does() -> None:
    batch = GlobalBatch(SequentialOrder(6), np.arange(6), np.array([0, 2, 3, 6]), 0)
    parts = divide(LocalParts(lambda samples: np.array([1, 0, 0, 1, 0, 0])[samples], (0, 1, 1)), batch, 3)
    assert parts.of(0).tolist() == [1]


def test_nodes_must_be_known_for_every_replica() -> None:
    batch = GlobalBatch(SequentialOrder(6), np.arange(6), None, 0)
    with pytest.raises(BadInputError, match="nodes of 2 replicas, and there are 3"):
        divide(LocalParts(lambda samples: samples, (0, 1)), batch, 3)

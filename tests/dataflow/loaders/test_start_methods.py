"""However workers are started, values of every kind arrive as they are made in the trainer's process."""

import numpy as np
import pytest
import torch

from dataflow.loaders import DataLoader
from dataflow.loaders.testing import Records


def plain(value):
    """What a value is made of, for comparison."""
    if isinstance(value, dict):
        return type(value), {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(inner) for inner in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return type(value), value.dtype, value.tolist()
    return value


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_values_of_every_kind_arrive_however_workers_are_started(method):
    """As they are and nested: `list` leaves samples alone."""
    inline = DataLoader(Records(6), batch_size=2, collate_fn=list)
    workers = DataLoader(Records(6), batch_size=2, collate_fn=list, num_workers=1, multiprocessing_context=method)
    assert [plain(batch) for batch in workers] == [plain(batch) for batch in inline]

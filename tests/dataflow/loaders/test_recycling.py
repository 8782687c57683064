import gc
import os
import platform
import subprocess
import sys
import textwrap
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflow.loaders import DataLoader
from dataflow.loaders.recycling import RECYCLE_BYTES, Recycler

ROW = RECYCLE_BYTES // 16  # float32: a batch of four has the least size that is used again


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_of_it_is_gone() -> None:
    recycler = Recycler()
    first = recycler.allocate(RECYCLE_BYTES)
    where, view = address(first), torch.from_numpy(first[:8].view(np.int64))
    del first
    other = recycler.allocate(RECYCLE_BYTES)
    assert address(other) != where  # the view still lives
    del view
    assert address(recycler.allocate(RECYCLE_BYTES)) == where
    assert address(other) != where


def test_what_was_let_go_of_last_is_given_first() -> None:
    recycler = Recycler()
    first, last = recycler.allocate(RECYCLE_BYTES), recycler.allocate(RECYCLE_BYTES)
    where = address(last)
    del first, last  # in this order
    for _ in range(3):
        assert address(recycler.allocate(RECYCLE_BYTES)) == where  # still in the processor's cache


def test_small_ones_are_left_to_the_allocator() -> None:
    assert Recycler().allocate(RECYCLE_BYTES - 1) is None


def test_memory_that_is_far_too_large_is_not_given() -> None:
    recycler = Recycler()
    where = address(recycler.allocate(3 * RECYCLE_BYTES))
    small = recycler.allocate(RECYCLE_BYTES)
    assert address(small) != where
    assert address(recycler.allocate(2 * RECYCLE_BYTES)) == where


def test_a_view_outlives_the_recycler() -> None:
    recycler = Recycler()
    memory, gone = recycler.allocate(RECYCLE_BYTES), weakref.ref(recycler)
    memory[:] = 7
    del recycler
    assert gone() is None  # and the view holds nothing but its own memory
    assert (memory == 7).all()


def test_what_is_kept_has_a_limit_and_goes_for_batches_of_another_size() -> None:
    recycler = Recycler()
    small = [recycler.allocate(RECYCLE_BYTES) for _ in range(10)]
    small.clear()
    assert [block.size for block in recycler._free] == [RECYCLE_BYTES] * 8
    assert not recycler._lent
    del small
    recycler.allocate(3 * RECYCLE_BYTES)
    assert [block.size for block in recycler._free] == [RECYCLE_BYTES] * 7 + [3 * RECYCLE_BYTES]


@given(st.lists(st.one_of(st.integers(1, 3), st.integers(-8, -1)), max_size=30))
@settings(max_examples=30)
def test_no_memory_is_given_twice(steps: list[int]) -> None:
    """A positive step allocates so many times the least size, a negative one lets go of what was allocated then."""
    recycler, held = Recycler(), {}
    for number, step in enumerate(steps):
        if step < 0:
            held.pop(number + step, None)
            continue
        memory = recycler.allocate(step * RECYCLE_BYTES)
        assert memory.size == step * RECYCLE_BYTES
        memory[::4096] = number
        held[number] = memory
        assert all((kept[::4096] == owner).all() for owner, kept in held.items())


class Rows:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((ROW,), float(number))


def test_batches_that_are_kept_stay_what_they_are() -> None:
    kept = list(DataLoader(Rows(), batch_size=4))
    assert [batch[:, 0].tolist() for batch in kept] == [[4.0 * n + i for i in range(4)] for n in range(16)]
    assert len({batch.data_ptr() for batch in kept}) == 16


def test_a_loop_that_keeps_nothing_uses_few_places() -> None:
    gc.collect()
    places = set()
    for batch in DataLoader(Rows(), batch_size=4):
        places.add(batch.data_ptr())
        batch.fill_(-1)  # a batch may be written to
    assert len(places) <= 3


def test_what_cannot_be_written_in_place_is_collated_as_torch_does() -> None:
    class Mixed(Rows):
        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.ones(ROW, dtype=torch.float32 if number % 2 else torch.float64)

    class Learned(Rows):
        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.ones(ROW, requires_grad=True)

    for dataset in (Mixed(), Learned()):
        ours, torchs = (next(iter(kind(dataset, batch_size=4))) for kind in (DataLoader, torch.utils.data.DataLoader))
        assert (ours.dtype, ours.requires_grad) == (torchs.dtype, torchs.requires_grad)
        assert torch.equal(ours, torchs)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_kept_for_the_next_batch_of_files():
    code = """
        import resource
        from dataflow.loaders.recycling import keep_freed_memory

        def faults_of_batches():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                [bytes(100_000) for _ in range(64)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        keep_freed_memory()
        faults_of_batches()
        print(faults_of_batches())
    """
    tuning = ("MALLOC_", "GLIBC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # a page each 4 KiB would be 32,000

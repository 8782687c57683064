"""What ours does beyond torch's: native batches, stats, devices."""

import gc
import itertools
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import default_collate

import dataflow.loaders.device
from dataflow import loaders, open_dataset
from dataflow.loaders import DataLoader, ElasticBatchSampler, LoaderStats
from dataflow.loaders.stats import Percentiles
from dataflow.loaders.testing import Failing, Numbers, Point, Stream
from dataflow.observe import count, stage


def test_it_is_torchs_loader():
    assert issubclass(DataLoader, torch.utils.data.DataLoader)
    assert {"DataLoader", "ElasticBatchSampler", "LoaderStats"} <= set(loaders.__all__)


# --- native datasets


class Columns:
    """A dataset that is read by whole columns, and must never be read in another way."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get_batch(self, numbers, allocate=None):
        numbers = np.asarray(numbers, np.int64)
        out = allocate("wide", (len(numbers), 700), np.dtype(np.float32))
        out[:] = numbers[:, None]
        label = allocate("label", (len(numbers),), np.dtype(np.int64))
        label[:] = numbers
        return {
            "wide": out,
            "label": label,
            "text": [f"sample {number}" for number in numbers],
            "list": [np.arange(3) + number for number in numbers],
        }

    def sample(self, number):
        return {name: column[0] for name, column in self.get_batch([number], lambda _, *how: np.empty(*how)).items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_native_batches_are_what_default_collate_makes_of_the_samples(num_workers):
    dataset = Columns(20)
    batches = list(DataLoader(dataset, batch_size=8, num_workers=num_workers))
    for batch, first in zip(batches, (0, 8, 16), strict=True):
        expected = default_collate([dataset.sample(number) for number in range(first, min(first + 8, 20))])
        assert list(batch) == list(expected)
        assert batch["text"] == expected["text"]
        for name in ("wide", "label", "list"):
            assert batch[name].dtype == expected[name].dtype
            assert torch.equal(batch[name], expected[name])
        batch["wide"] += 1


class Refilling:
    """A batch sampler that yields one list again and again."""

    def __init__(self, num_batches):
        self.num_batches = num_batches

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        batch = []
        for number in range(self.num_batches):
            batch[:] = (2 * number, 2 * number + 1)
            yield batch


@pytest.mark.parametrize(("num_workers", "workers"), [(0, "process"), (2, "process"), (2, "thread")])
def test_a_sampler_may_fill_the_same_list_for_each_batch(num_workers, workers):
    def begin(state=None):
        loader = DataLoader(range(80), batch_sampler=Refilling(40), num_workers=num_workers, workers=workers)
        if state is not None:
            loader.load_state_dict(state)
        return loader, (batch.tolist() for batch in loader)

    loader, batches = begin()
    expected = [[2 * number, 2 * number + 1] for number in range(40)]
    assert [*itertools.islice(batches, 25)] == expected[:25]
    _, rest = begin(loader.state_dict())
    assert [*rest] == expected[25:]


def test_a_native_batch_without_samples_has_empty_columns():
    batch = next(iter(DataLoader(Columns(4), batch_sampler=[[]])))
    assert batch["wide"].shape == (0, 700)
    assert batch["text"] == []


class Ragged(Columns):
    def get_batch(self, numbers, allocate=None):
        return {"values": [np.arange(number + 1) for number in numbers]}


def test_columns_that_cannot_be_stacked_are_torchs_error():
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(Ragged(4), batch_size=2)))


def test_a_native_dataset_with_another_collate_function_is_read_by_samples():
    class Both(Columns):
        def __getitems__(self, numbers):
            return [self.sample(number)["label"].item() for number in numbers]

    assert list(DataLoader(Both(4), batch_size=2, collate_fn=sum)) == [1, 5]


def test_a_method_that_only_shares_its_name_with_native_ones_is_not_called():
    class Homonym(Numbers):
        def get_batch(self, index):
            raise AssertionError

    assert len(list(DataLoader(Homonym(4), batch_size=2))) == 2


def test_an_elastic_sampler_has_each_epoch_once_with_and_without_workers():
    orders = []
    for num_workers in (0, 2):
        sampler = ElasticBatchSampler(Numbers(20), 5, rank=0, world_size=1)
        loader = DataLoader(Numbers(20), batch_sampler=sampler, num_workers=num_workers)
        orders.append([[batch.flatten().tolist() for batch in loader] for _ in range(3)])
    assert orders[0] == orders[1]
    assert len({str(epoch) for epoch in orders[0]}) == 3


# --- stats


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self):
        return self.now_s


class Timed(Numbers):
    """Numbers that take a second of fetching, ten of decoding and count themselves."""

    clock = None

    def __getitem__(self, index):
        with stage("decode"):
            self.clock.now_s += 10
        self.clock.now_s += 1
        count("samples.read")
        return super().__getitem__(index)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dataflow.loaders.stats.time", clock)
    monkeypatch.setattr("dataflow.observe.stages.time", clock)
    return clock


def test_every_second_of_the_loop_is_accounted_for(clock):
    dataset = Timed(6)
    dataset.clock = clock
    loader = DataLoader(dataset, batch_size=2)
    clock.now_s += 1000  # before the loop
    for _ in loader:
        clock.now_s += 100
    clock.now_s += 5000  # behind it
    stats = loader.stats()
    assert stats.seconds == {"fetch": 6, "decode": 60, "transform": 0, "collate": 0, "wait": 66, "model": 300}
    assert (stats.batches, stats.samples) == (3, 6)
    assert stats.counts == {"samples.read": 6}


class Read(Numbers):
    """Numbers whose bytes come from two places."""

    def __getitem__(self, index):
        with stage("fetch.ram" if index % 2 else "fetch.origin"):
            return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reads_are_told_apart_by_where_they_came_from(num_workers):
    loader = DataLoader(Read(4), num_workers=num_workers)
    list(loader)
    assert list(loader.stats().seconds)[:4] == ["fetch", "fetch.origin", "fetch.ram", "decode"]


def test_a_loop_left_early_does_not_count_what_comes_after_as_model(clock):
    loader = DataLoader(Numbers(6))
    for _ in loader:
        clock.now_s += 1
        break
    clock.now_s += 500
    for _ in loader:
        clock.now_s += 1
    assert loader.stats().seconds["model"] == 6  # the step that broke off is unknown


def test_percentiles_are_those_of_whole_steps(clock):
    loader = DataLoader(Numbers(101))
    for number, _ in enumerate(loader):
        clock.now_s += number
    stats = loader.stats()
    assert stats.step_s == Percentiles(p50=50, p95=95, p99=99)
    assert stats.wait_s == Percentiles(0, 0, 0)


class Late(Numbers):
    """Numbers whose decoding takes as many seconds as they are; the ones are not decoded."""

    def __getitem__(self, index):
        if index != 1:
            with stage("decode"):
                self.clock.now_s += index
        return super().__getitem__(index)


def test_percentiles_of_a_stage_are_those_of_the_batches_that_it_was_part_of(clock):
    dataset = Late(102)
    dataset.clock = clock
    loader = DataLoader(dataset)
    list(loader)
    # 0, 2, 3, ... 101
    assert loader.stats().stage_s["decode"] == Percentiles(p50=51, p95=96, p99=100)
    assert loader.stats().stage_s["fetch"] == Percentiles(0, 0, 0)


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_workers_report_how_long_each_batch_took(workers):
    loader = DataLoader(Numbers(40), batch_size=2, num_workers=2, workers=workers)
    list(loader)
    stats = loader.stats()
    for name in ("fetch", "collate"):
        assert 0 < stats.stage_s[name].p50 <= stats.stage_s[name].p99 <= stats.seconds[name]


def test_the_progress_line_says_what_limits_the_loop(clock):
    dataset = Timed(6)
    dataset.clock = clock
    loader = DataLoader(dataset, batch_size=2)
    assert "nothing: no batch was asked for yet" in loader.stats().progress_line
    for _ in loader:
        clock.now_s += 22
    line = loader.stats().progress_line
    assert line.startswith(
        "rank 0: 3 steps, 6 samples (0/s), waiting 50%, step p50 44000.0 ms p99 44000.0 ms, limited by"
    )
    assert "decoding: more workers" in line


def test_workers_report_their_stages_and_counts():
    class Counting(Numbers):
        def __getitem__(self, index):
            count("samples.read")
            with stage("transform"):
                return super().__getitem__(index)

    loader = DataLoader(Counting(20), batch_size=2, num_workers=2)
    list(loader)
    list(loader)
    stats = loader.stats()
    assert stats.counts == {"samples.read": 40}
    assert (stats.batches, stats.samples, stats.num_workers) == (20, 40, 2)
    assert all(stats.seconds[name] > 0 for name in ("fetch", "transform", "collate", "handover", "wait", "model"))


class Waiting(Numbers):
    """Numbers that are held up in any thread but the main one."""

    def __init__(self, length):
        super().__init__(length)
        self.is_entered, self.may_go_on = threading.Event(), threading.Event()

    def __getitem__(self, index):
        if threading.current_thread() is not threading.main_thread():
            count("held.up")
            self.is_entered.set()
            assert self.may_go_on.wait(60)
        return super().__getitem__(index)


def test_each_thread_records_the_steps_of_its_own_iterator():
    dataset = Waiting(4)
    loader = DataLoader(dataset)
    with ThreadPoolExecutor(1) as other:
        batches = other.submit(list, loader)
        try:
            assert dataset.is_entered.wait(60)
            assert len(list(loader)) == 4
            assert loader.stats().counts == {}
        finally:
            dataset.may_go_on.set()
        assert len(batches.result()) == 4
    assert loader.stats().counts == {"held.up": 4}


def test_stats_are_json():
    loader = DataLoader(Stream(4), batch_size=2)
    assert loader.stats().seconds["wait"] == 0
    list(loader)
    stats = loader.stats()
    assert isinstance(stats, LoaderStats)
    assert json.loads(json.dumps(stats.as_dict())) == stats.as_dict()
    assert stats.samples == 0


def test_a_batch_that_raised_is_a_step_of_the_loop():
    loader = DataLoader(Failing(6, {2: ValueError()}), batch_size=2)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ValueError):
        next(iterator)
    assert (loader.stats().batches, loader.stats().samples) == (2, 4)
    assert [batch.flatten().tolist() for batch in iterator] == [[4, 5]]


# --- devices


class Backend:
    """A device's module as torch knows them, which writes down what is asked of it."""

    def __init__(self):
        self.log = []
        self.current = "default stream"

    def Stream(self, device):  # noqa: N802  the name is torch's
        return SideStream(self)

    def stream(self, stream):
        backend = self

        class Entered:
            def __enter__(self):
                self.before, backend.current = backend.current, stream

            def __exit__(self, *error):
                backend.current = self.before

        return Entered()

    def current_stream(self, device):
        return CurrentStream(self)

    def current_device(self):
        return 0

    def set_device(self, index):
        self.log.append(f"set device {index}")


class SideStream:
    def __init__(self, backend):
        self.backend = backend

    def record_event(self):
        self.backend.log.append("copied aside")
        return len(self.backend.log)


class CurrentStream:
    def __init__(self, backend):
        self.backend = backend

    def wait_event(self, event):
        self.backend.log.append("model waits")


@pytest.fixture
def backend(monkeypatch):
    """A backend with streams behind the device "meta", whose tensors exist everywhere."""
    backend = Backend()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: backend)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: backend.log.append("stream recorded"))
    return backend


def test_batches_go_to_the_device_on_a_stream_of_their_own(backend):
    loader = DataLoader(Numbers(6, 600), batch_size=2, num_workers=1, device="meta")
    assert loader.device == torch.device("meta")
    batches = list(loader)
    assert [batch.device.type for batch in batches] == ["meta"] * 3
    assert backend.log.count("copied aside") == 3
    assert backend.log.count("model waits") == 3
    assert backend.log.count("stream recorded") == 3
    assert backend.log.index("copied aside") < backend.log.index("model waits")
    assert backend.log[0] == "set device 0"


def test_the_next_batch_is_staged_while_the_model_works(backend):
    loader = DataLoader(Numbers(4, 600), batch_size=1, num_workers=1, device="meta")
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
        while iterator._find_ready() is None:  # batches may arrive together
            iterator._attend(None)
    iterator._stage_ahead()
    assert [owed.staged is not None for owed in iterator._owed.values()] == [True, False]
    assert loader.state_dict()["epoch"]["batches"] == 2
    assert len(list(iterator)) == 2


def test_a_device_without_streams_is_copied_to_all_the_same():
    for num_workers in (0, 1):
        batches = list(DataLoader(Numbers(3), num_workers=num_workers, device="meta"))
        assert [batch.device.type for batch in batches] == ["meta"] * 3


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_the_cpu_needs_no_staging(device):
    iterator = iter(DataLoader(Numbers(3), device=device))
    assert iterator._staging is None
    assert next(iterator).device.type == "cpu"


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_subclass_may_have_attributes_of_its_own_with_our_names(num_workers, is_early):
    class Own(DataLoader):
        def __init__(self, dataset, device, workers):
            if is_early:
                self.device, self.workers, self.num_shards = device, workers, 7
            super().__init__(dataset, num_workers=num_workers)
            if not is_early:
                self.device, self.workers, self.num_shards = device, workers, 7

        def __iter__(self):
            return (batch.to(self.device) for batch in super().__iter__())

    for device in ("cpu", "meta"):
        loader = Own(Numbers(3), device, workers=4)
        assert [batch.device.type for batch in loader] == [device] * 3
        assert (loader.device, loader.workers, loader.has_worker_processes) == (device, 4, num_workers > 0)


def test_staging_leaves_the_trainer_its_threads():
    def train():
        staging = dataflow.loaders.device.Staging.for_loader(torch.device("meta"), pins=False, pin_device=None)
        staging.finish(staging.begin(torch.ones(2)))
        staging.close()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as fresh:  # a thread that has not used an operator yet
            assert fresh.submit(train).result() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_batch_was_stays_what_it_is_when_its_tensors_are_brought_over():
    inside = {"x": torch.ones(2)}
    batch = MappingProxyType({"inside": inside})  # a mapping that nobody can write to
    brought = dataflow.loaders.device.map_tensors(batch, lambda tensor: tensor + 1)
    assert type(brought) is MappingProxyType
    assert brought["inside"]["x"].tolist() == [2, 2]
    assert inside["x"].tolist() == [1, 1]


def test_containers_keep_their_types_on_the_way():
    moved = dataflow.loaders.device.map_tensors(
        {"a": [torch.tensor(1), "x"], "b": Point(torch.tensor(2), (torch.tensor(3), None))}, lambda tensor: tensor + 1
    )
    assert moved == {"a": [2, "x"], "b": Point(3, (4, None))}
    assert isinstance(moved["b"], Point)


class Pinnable:
    def __init__(self, values):
        self.values = torch.stack(values)
        self.is_pinned = False

    def pin_memory(self):
        self.is_pinned = True
        return self


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator, as far as anybody looks for one before memory is pinned."""
    known = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda
    monkeypatch.setattr(known, "is_available", lambda: True)
    monkeypatch.setattr(known, "current_accelerator", lambda: torch.device("meta"), raising=False)
    monkeypatch.setattr(dataflow.loaders.device, "accelerator", lambda: torch.device("meta"))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_is_pinned_by_torchs_own_rules(monkeypatch, num_workers):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor + 100)
    plain = DataLoader(Numbers(3, 600), pin_memory=True, num_workers=num_workers)
    assert [batch[0, 0].item() for batch in plain] == [100, 101, 102]
    custom = DataLoader(Numbers(3, 600), pin_memory=True, num_workers=num_workers, collate_fn=Pinnable)
    assert all(batch.is_pinned for batch in custom)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("named", ["meta", None])
def test_the_thread_that_pins_is_told_which_device_is_current(monkeypatch, named):
    told = []

    class Meta:
        @staticmethod
        def current_device():
            return 3

        @staticmethod
        def set_device(index):
            told.append((index, threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(torch, "get_device_module", {torch.device("meta"): Meta}.__getitem__)
    monkeypatch.setattr(dataflow.loaders.device, "pin_memory", lambda batch, device: (batch, device))
    staging = dataflow.loaders.device.Staging.for_loader(None, pins=True, pin_device=named)
    assert staging.finish(staging.begin(5)) == (5, named)
    staging.close()
    assert told == [(3, False)]


@pytest.mark.usefixtures("accelerator")
def test_errors_of_staging_reach_the_caller(monkeypatch):
    def fail(batch, device):
        raise MemoryError("no pinned memory left")

    monkeypatch.setattr(dataflow.loaders.device, "pin_memory", fail)
    with pytest.raises(MemoryError, match="no pinned memory left"):
        list(DataLoader(Numbers(3), pin_memory=True, num_workers=1))


# --- memory


class Reusing:
    """A collate function that makes each batch in the same memory."""

    def __init__(self, memory):
        self.memory = memory

    def __call__(self, samples):
        self.memory[:] = samples[0]
        return self.memory


@pytest.mark.parametrize(
    "memory", [np.zeros(700, np.int64), torch.zeros(700, dtype=torch.int64)], ids=["numpy", "torch"]
)
def test_a_collate_function_may_use_its_memory_again(memory):
    batches = DataLoader(range(200), num_workers=1, collate_fn=Reusing(memory))
    assert all((batch == number).all() for number, batch in enumerate(batches))


def test_batches_kept_beyond_the_limit_are_copies_of_their_own():
    kept = list(DataLoader(Numbers(100, 600), num_workers=2))
    assert [int(batch[0, 5]) for batch in kept] == list(range(100))
    for batch, number in zip(kept, itertools.count(), strict=False):
        batch += 1000
        assert (batch == number + 1000).all()


class Mixed:
    """Two long rows of different types."""

    def __init__(self, *dtypes):
        self.dtypes = dtypes

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return torch.full((3000,), number + 0.5, dtype=self.dtypes[number])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_rows_of_several_types_become_what_torch_makes_of_them(dtypes, num_workers):
    torchs, ours = (
        next(iter(kind(Mixed(*dtypes), batch_size=2, num_workers=num_workers)))
        for kind in (torch.utils.data.DataLoader, DataLoader)
    )
    assert ours.dtype == torchs.dtype
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_of_a_local_dataset_ends_without_a_garbage_collection(tmp_path, num_workers):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    gc.collect()
    gc.disable()

    def train():
        loader = DataLoader(open_dataset(tmp_path), num_workers=num_workers, persistent_workers=num_workers > 0)
        assert len(list(loader)) == 2
        return weakref.ref(loader)

    try:
        assert train()() is None
    finally:
        gc.enable()

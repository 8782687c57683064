"""Worker threads: the batches, order and states of worker processes, and nothing left behind."""

import dataclasses
import gc
import math
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import SpawnContext

import pytest
import torch
from torch.utils.data import get_worker_info

from connectors.errors import BadInputError
from dataflow.loaders import BadSamples, DataLoader, ElasticBatchSampler
from dataflow.loaders.process_iterator import ProcessIterator
from dataflow.loaders.testing import Failing, Noisy, Numbers, Stream
from dataflow.loaders.thread_iterator import ThreadIterator
from dataflow.loaders.threads import Order, Threads
from dataflow.transforms import TransformedDataset


def numbers_of(batch):
    return batch[:, 0].tolist()


def open_loader(dataset=None, **options):
    dataset = Noisy(40) if dataset is None else dataset
    return DataLoader(dataset, **{"batch_size": 4, "num_workers": 2, "workers": "thread", **options})


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "dataflow-worker"]


def all_end():
    gc.collect()
    for thread in workers():
        thread.join(60)
    return workers() == []


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert all_end()


class Waits(Numbers):
    """Numbers of which one does not come, the first time or each time, until it is let go."""

    def __init__(self, length, at, *, once=True):
        super().__init__(length)
        self.at, self.once, self.asked = at, once, 0
        self.let_go = threading.Event()

    def __getitem__(self, index):
        if index == self.at:
            self.asked += 1
            if self.asked == 1 or not self.once:
                assert self.let_go.wait(100)
        return super().__getitem__(index)


@pytest.mark.parametrize("options", [{}, {"prefetch_factor": 1, "drop_last": True}], ids=["ahead", "one"])
@pytest.mark.parametrize("persistent", [False, True])
def test_two_shuffled_epochs_are_those_of_processes(options, persistent):
    def epochs(kind):
        loader = open_loader(
            shuffle=True, workers=kind, persistent_workers=persistent,
            generator=torch.Generator().manual_seed(6), **options,
        )  # fmt: skip
        return [[numbers_of(batch) for batch in loader] for _ in range(2)]

    assert epochs("thread") == epochs("process")


def test_a_state_of_threads_goes_on_in_processes_and_back():
    def open_elastic(kind):
        dataset = Noisy(40)
        sampler = ElasticBatchSampler(dataset, 4, seed=2, shuffle="full")
        return DataLoader(dataset, batch_sampler=sampler, num_workers=2, workers=kind)

    whole = [numbers_of(batch) for batch in open_elastic("thread")]
    for first_kind, second_kind in (("thread", "process"), ("process", "thread")):
        loader = open_elastic(first_kind)
        iterator = iter(loader)
        seen = [numbers_of(next(iterator)) for _ in range(3)]
        resumed = open_elastic(second_kind)
        resumed.load_state_dict(loader.state_dict())
        assert seen + [numbers_of(batch) for batch in resumed] == whole


def test_a_shuffled_epoch_of_torchs_sampler_is_resumed():
    loader = open_loader(shuffle=True)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    resumed = open_loader(shuffle=True)
    resumed.load_state_dict(loader.state_dict())
    assert [numbers_of(batch) for batch in resumed] == [numbers_of(batch) for batch in iterator]


def test_a_stream_is_read_by_one_thread_and_resumed():
    whole = [numbers_of(batch) for batch in DataLoader(Stream(30), batch_size=4)]
    loader = open_loader(Stream(30))
    iterator = iter(loader)
    seen = [numbers_of(next(iterator)) for _ in range(3)]
    resumed = open_loader(Stream(30))
    resumed.load_state_dict(loader.state_dict())
    assert seen + [numbers_of(batch) for batch in resumed] == whole
    assert seen + [numbers_of(batch) for batch in iterator] == whole


class Counted(Stream):
    """A stream with a state of its own."""

    def __init__(self, length):
        super().__init__(length)
        self.next = 0

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            yield torch.tensor([self.next - 1])
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_the_state_of_a_stateful_stream_is_that_of_the_batch_handed_out():
    loader = open_loader(Counted(30))
    iterator = iter(loader)
    seen = [numbers_of(next(iterator)) for _ in range(2)]
    state = loader.state_dict()
    assert state["epoch"]["shard_states"] == [{"dataset": {"next": 8}}]
    rest = [numbers_of(batch) for batch in iterator]
    resumed = open_loader(Counted(30))
    resumed.load_state_dict(state)
    assert [numbers_of(batch) for batch in resumed] == rest
    assert [number for batch in seen + rest for number in batch] == list(range(30))


def test_an_epoch_without_prefetching_is_torchs_error_not_an_empty_one():
    with pytest.raises(AssertionError, match="prefetch_factor must be greater than 0"):
        iter(open_loader(prefetch_factor=0))


def test_out_of_order_batches_come_as_they_are_made():
    dataset = Waits(16, at=0)
    iterator = iter(open_loader(dataset, in_order=False))
    assert [numbers_of(next(iterator))[0] for _ in range(3)] == [4, 8, 12]
    dataset.let_go.set()
    assert numbers_of(next(iterator)) == [0, 1, 2, 3]


def test_errors_keep_their_type_and_the_loader_goes_on():
    loader = open_loader(Failing(12, {5: KeyError("five")}))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(KeyError, match="five"):
        next(iterator)
    assert numbers_of(next(iterator)) == [8, 9, 10, 11]
    assert list(iterator) == []


def test_an_exit_in_a_thread_is_the_trainers():
    loader = open_loader(Failing(12, {5: SystemExit(3)}))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(SystemExit):
        next(iterator)
    assert [numbers_of(batch) for batch in iterator] == [[8, 9, 10, 11]]


def test_bad_samples_are_noted_with_their_batch():
    dataset = Failing(16, {5: ValueError(), 6: ValueError()})
    loader = open_loader(dataset, bad_samples=BadSamples("skip"))
    assert [numbers_of(batch) for batch in loader] == [[0, 1, 2, 3], [4, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert loader.state_dict()["bad_samples"] == [5, 6]


def test_a_thread_that_hangs_is_left_behind_and_its_batch_comes_in_order():
    dataset = Waits(16, at=5)
    # On a busy machine another thread may be late as well, which changes no batch.
    loader = open_loader(dataset, worker_deadline_s=1.0)
    assert [numbers_of(batch) for batch in loader] == [list(range(first, first + 4)) for first in range(0, 16, 4)]
    assert loader.stats().counts["workers.replaced"] >= 1
    dataset.let_go.set()


class Hangs:
    """A transform that never ends for one sample, the first time, until it is let go."""

    def __init__(self, at):
        self.at, self.has_begun = at, threading.Event()
        self.let_go = threading.Event()

    def __call__(self, sample):
        if sample[0] == self.at and not self.has_begun.is_set():
            self.has_begun.set()
            assert self.let_go.wait(100)
        return sample


def test_a_transform_that_hangs_leaves_the_global_generators_as_they_were():
    transform, before = Hangs(5), random.getstate()
    assert len(list(open_loader(TransformedDataset(Numbers(16), transform), worker_deadline_s=1.0))) == 4
    assert random.getstate() == before
    transform.let_go.set()


def test_so_does_one_that_hangs_when_its_iterator_ends(monkeypatch):
    monkeypatch.setattr("dataflow.loaders.threads.JOIN_TIMEOUT_S", 0.01)
    transform, before = Hangs(1), random.getstate()
    iterator = iter(open_loader(TransformedDataset(Numbers(16), transform), num_workers=1))
    assert transform.has_begun.wait(60)
    del iterator
    assert random.getstate() == before
    transform.let_go.set()


def test_what_waits_behind_a_batch_that_hangs_is_made_by_others():
    dataset = Waits(64, at=33)
    iterator = iter(open_loader(dataset, num_workers=1, worker_deadline_s=1.0))
    iterator._depth.at_once = 2  # so that a thread takes several batches at a time
    assert [numbers_of(batch) for batch in iterator] == [list(range(first, first + 4)) for first in range(0, 64, 4)]
    dataset.let_go.set()


def test_what_a_thread_says_that_was_given_up_is_not_heard():
    iterator = iter(open_loader(in_order=False))
    iterator._attend(None)
    number = iterator._arrived[0]
    iterator._take_one(dataclasses.replace(iterator._owed[number].made, order=Order(number, [])))
    assert iterator._arrived.count(number) == 1
    assert sorted(numbers_of(batch) for batch in iterator) == [list(range(n, n + 4)) for n in range(0, 40, 4)]


@pytest.mark.parametrize("answer", ["restart", "raise"])
def test_a_batch_that_always_hangs_is_an_error(answer):
    dataset = Waits(16, at=0, once=False)
    loader = open_loader(dataset, worker_deadline_s=0.1, on_worker_failure=answer)
    with pytest.raises(RuntimeError, match="worker thread made no batch"):
        list(loader)
    dataset.let_go.set()


def test_the_callers_patience_is_torchs():
    dataset = Waits(16, at=0)
    iterator = iter(open_loader(dataset, timeout=0.05))
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0.05 seconds"):
        next(iterator)
    dataset.let_go.set()
    del iterator


class Echo:
    """Makes a batch of what is in it."""

    joins, sieve = False, None

    def __call__(self, index):
        return index


def test_an_order_says_which_thread_has_it_and_since_when():
    threads, order = Threads(1, Echo), Order(0, "index")
    threads.ask([order])
    threads.wait(None)
    (made,) = threads.take().made
    assert (made.order, made.batch) == (order, "index")
    assert order.thread in workers()
    assert order.begun_s < math.inf
    threads.close()


class OneAtATime:
    """Makes a batch, and then says whether it has gone."""

    joins, sieve = False, None

    def __init__(self):
        self.gone = threading.Event()

    def __call__(self, index):
        if index == 1:
            return self.gone.wait(20)
        batch = Echo()
        weakref.finalize(batch, self.gone.set)
        return batch


def test_a_batch_that_the_caller_lets_go_of_is_gone_while_the_next_one_is_made():
    threads = Threads(1, OneAtATime)
    threads.ask([Order(number, number) for number in range(2)])
    threads.wait(None)
    threads.take()
    threads.wait(None)
    (made,) = threads.take().made
    assert made.batch is True
    threads.close()


def test_a_thread_that_the_system_does_not_start_is_an_error_and_the_others_end(monkeypatch):
    def start(thread, start=threading.Thread.start):
        if workers():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        iter(open_loader())
    assert all_end()


def test_threads_end_with_their_iterator():
    iterator = iter(open_loader())
    next(iterator)
    assert len(workers()) == 2
    del iterator
    assert all_end()
    for _ in open_loader():
        break
    assert all_end()


def test_a_worker_thread_is_no_worker_process():
    class Tells(Numbers):
        def __getitem__(self, index):
            return torch.tensor([get_worker_info() is None, threading.current_thread().name == "dataflow-worker"])

    assert all(batch.all() for batch in open_loader(Tells(8)))


def in_a_new_thread(function):
    """Return what a function returns in a thread that has not used torch yet."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


@pytest.fixture
def _three_threads_an_operator():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class ThreadCounts(Numbers):
    def __getitem__(self, index):
        return torch.tensor([torch.get_num_threads()])


@pytest.mark.usefixtures("_three_threads_an_operator")
def test_workers_use_one_thread_an_operator_and_leave_the_trainer_its_own():
    def train():
        return [batch.tolist() for batch in open_loader(ThreadCounts(4))], torch.get_num_threads()

    assert in_a_new_thread(train) == ([[[1]] * 4], 3)
    assert in_a_new_thread(torch.get_num_threads) == 3


TRAINER = """
    import sys, threading
    from dataflow.loaders import DataLoader
    from dataflow.loaders.testing import Hanging, Numbers

    dataset = Hanging(100, at=6) if sys.argv[1] == "stuck" else Numbers(10_000, 700)
    iterator = iter(DataLoader(dataset, batch_size=2, num_workers=2, workers="thread"))
    held = [next(iterator) for _ in range(2)]
    print("trained", flush=True)
    if sys.argv[1] == "exception":
        raise ZeroDivisionError
"""


@pytest.mark.parametrize("ending", ["stuck", "exception"])
def test_a_trainer_ends_whatever_its_threads_do(ending, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    done = subprocess.run(
        [sys.executable, str(script), ending], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.returncode) == ("trained\n", int(ending == "exception"))
    assert done.stderr.count("Traceback") == (ending == "exception")


class Columns(Numbers):
    """Numbers that make whole batches, as native datasets do."""

    def get_batch(self, numbers, allocate=None):
        return {"x": torch.tensor(numbers).numpy()}


@pytest.mark.parametrize(
    ("dataset", "options", "kind"),
    [
        (Columns(8), {}, ThreadIterator),
        (Columns(8), {"collate_fn": list}, ProcessIterator),
        (Columns(8), {"worker_init_fn": id}, ProcessIterator),
        (Numbers(8), {}, ProcessIterator),
    ],
    ids=["columns", "own collate", "own init", "samples"],
)
def test_auto_takes_threads_where_whole_batches_are_made(dataset, options, kind):
    loader = open_loader(dataset, workers="auto", **options)
    assert type(iter(loader)) is kind


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(BadInputError, match="workers must be"):
        open_loader(workers="fibre")
    with pytest.raises(BadInputError, match="worker_init_fn"):
        open_loader(worker_init_fn=id)


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_a_context_whose_processes_are_threads_is_refused(workers):
    class Context(SpawnContext):
        Process = threading.Thread

    with pytest.raises(BadInputError, match=r"threads \(Thread\).*workers=.thread."):
        DataLoader(Numbers(8), num_workers=2, multiprocessing_context=Context(), workers=workers)

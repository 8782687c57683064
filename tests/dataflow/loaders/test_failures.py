"""Workers and trainers that are killed: the same batches, no hang, nothing left."""

import errno
import itertools
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import get_worker_info

from dataflow.loaders import DataLoader
from dataflow.loaders.crew import Death
from dataflow.loaders.slots import SlotMap
from dataflow.loaders.testing import (
    Draws,
    Failing,
    Hanging,
    HangsOnce,
    Noisy,
    Numbers,
    Stream,
    children,
    dies_within,
    slot_mappings,
)


def numbers_of(batch):
    assert (batch == batch[:, :1]).all()
    return batch[:, 0].tolist()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", range(4))
def test_batches_are_the_same_whichever_workers_are_killed(seed):
    rng = random.Random(seed)
    moments = set(rng.sample(range(60), 5))
    loader = DataLoader(Noisy(240, 700), batch_size=4, num_workers=2, prefetch_factor=rng.choice([1, 2, 4]))
    iterator, seen = iter(loader), []
    for step in range(60):
        if step in moments:
            kill(rng.choice(iterator._workers))
        seen.append(numbers_of(next(iterator)))
    assert seen == [list(range(first, first + 4)) for first in range(0, 240, 4)]
    assert list(iterator) == []
    assert loader.stats().counts["workers.replaced"] >= 1


def test_a_worker_may_die_any_number_of_times_that_makes_batches_in_between():
    iterator = iter(DataLoader(Numbers(6), num_workers=1, prefetch_factor=1))
    for step in range(6):
        kill(iterator._workers[0])
        iterator._workers[0].join()
        assert numbers_of(next(iterator)) == [step]


def test_all_workers_may_die_at_once_while_batches_are_kept():
    loader = DataLoader(Numbers(100, 700), batch_size=5, num_workers=2)
    iterator = iter(loader)
    kept = [next(iterator) for _ in range(6)]
    for process in iterator._workers:
        kill(process)
    kept += list(iterator)
    assert [numbers_of(batch) for batch in kept] == [list(range(first, first + 5)) for first in range(0, 100, 5)]


def test_a_stream_goes_on_behind_what_a_killed_worker_had_sent():
    loader = DataLoader(Stream(200, 600), batch_size=4, num_workers=2)
    expected = [numbers_of(batch) for batch in loader]
    iterator, seen = iter(loader), []
    for step in itertools.count():
        if step in {3, 17}:
            kill(iterator._workers[step % 2])
        batch = next(iterator, None)
        if batch is None:
            break
        seen.append(numbers_of(batch))
    assert seen == expected


class Stateless(Stream):
    """Has the methods of a stream with a state, and no state."""

    def state_dict(self):
        raise LookupError("no state")

    def load_state_dict(self, state):
        raise LookupError("no state")


def test_a_stream_without_its_state_is_read_again_by_the_successor_of_a_killed_worker():
    iterator = iter(DataLoader(Stateless(40), batch_size=4, num_workers=1))
    seen = [numbers_of(next(iterator)) for _ in range(3)]
    kill(iterator._workers[0])
    seen += [numbers_of(batch) for batch in iterator]
    assert seen == [list(range(first, first + 4)) for first in range(0, 40, 4)]


class Counted(Stream):
    """A stream with a state, whose samples say how often one was loaded."""

    def __init__(self, length):
        super().__init__(length)
        self.next = self.loads = 0

    def __iter__(self):
        while self.next < self.length:
            self.next += 1
            yield torch.tensor([self.next - 1, self.loads])

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]
        self.loads += 1


def test_a_stream_with_a_state_goes_on_from_it_where_its_worker_was_killed():
    iterator = iter(DataLoader(Counted(40), batch_size=4, num_workers=1))
    seen = [next(iterator) for _ in range(3)]
    kill(iterator._workers[0])
    seen += list(iterator)
    assert [batch[:, 0].tolist() for batch in seen] == [list(range(first, first + 4)) for first in range(0, 40, 4)]
    assert seen[-1][:, 1].tolist() == [1] * 4


class Uneven(Stream):
    """A stream of which the first worker reads little."""

    def __iter__(self):
        return iter(torch.arange(2 if get_worker_info().id == 0 else 40)[:, None])


def test_a_worker_that_is_killed_when_its_part_of_a_stream_is_read_is_not_replaced():
    loader = DataLoader(Uneven(42), num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    seen = [next(iterator).item() for _ in range(10)]
    assert iterator._is_active == [False, True]
    kill(iterator._workers[0])
    iterator._workers[0].join()
    iterator._attend(0)
    assert sorted(seen + [batch.item() for batch in iterator]) == sorted([0, 1, *range(40)])
    assert "workers.replaced" not in loader.stats().counts
    assert len(list(loader)) == 42, "the next epoch has another worker"


def test_random_draws_go_on_behind_what_a_killed_worker_had_drawn():
    def draws(kill_at):
        generator = torch.Generator().manual_seed(8)
        iterator = iter(DataLoader(Draws(60), batch_size=None, num_workers=2, generator=generator))
        for step in range(60):
            if step in kill_at:
                kill(iterator._workers[step % 2])
            yield [float(value) for value in next(iterator)]

    assert list(draws({7, 8, 30})) == list(draws(()))


def test_a_loader_whose_workers_were_shut_down_can_be_iterated_again():
    loader = DataLoader(Numbers(6), batch_size=2, num_workers=1, persistent_workers=True)
    iterator = iter(loader)
    next(iterator)
    iterator._shutdown_workers()
    assert [numbers_of(batch) for batch in loader] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_loader_whose_workers_were_shut_down_goes_on_bringing_batches_to_its_device(kind):
    loader = DataLoader(
        Numbers(6), batch_size=2, num_workers=1, workers=kind, persistent_workers=True, device="meta"
    )  # fmt: skip
    iterator = iter(loader)
    next(iterator)
    iterator._shutdown_workers()
    assert [batch.device.type for batch in loader] == ["meta"] * 3


def test_persistent_workers_killed_between_epochs_are_replaced():
    loader = DataLoader(Numbers(20), batch_size=2, num_workers=2, persistent_workers=True)
    expected = [numbers_of(batch) for batch in loader]
    for process in iter(loader)._workers:
        kill(process)
    assert [numbers_of(batch) for batch in loader] == expected
    assert [numbers_of(batch) for batch in loader] == expected


def test_a_forked_child_of_the_trainer_has_persistent_workers_of_its_own(tmp_path):
    loader = DataLoader(Numbers(6), batch_size=2, num_workers=2, persistent_workers=True)
    epoch = [[0, 1], [2, 3], [4, 5]]
    assert [numbers_of(batch) for batch in loader] == epoch

    def read():
        (tmp_path / "seen").write_text(str([[numbers_of(batch) for batch in loader] for _ in range(2)]))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join()
    assert (tmp_path / "seen").read_text() == str([epoch, epoch])
    assert [numbers_of(batch) for batch in loader] == epoch


def test_out_of_order_batches_come_once_each_whichever_workers_are_killed():
    iterator = iter(DataLoader(Noisy(200), batch_size=2, num_workers=2, in_order=False))
    seen = []
    for step in range(100):
        if step in {10, 50}:
            kill(iterator._workers[0])
        seen += numbers_of(next(iterator))
    assert sorted(seen) == list(range(200))


class Exits(Numbers):
    """Numbers of which one ends its worker."""

    def __getitem__(self, index):
        if index == 5:
            os._exit(7)
        return super().__getitem__(index)


def test_a_batch_that_always_kills_its_worker_is_an_error_after_some_tries(caplog):
    iterator = iter(DataLoader(Exits(12), batch_size=2, num_workers=2))
    assert [numbers_of(next(iterator)) for _ in range(2)] == [[0, 1], [2, 3]]
    for _ in range(2):  # also when asked again
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly") as caught:
            next(iterator)
    assert "exit code 7" in str(caught.value.__cause__)
    assert sum("another one starts" in message for message in caplog.messages) == 3


def test_a_batch_whose_memory_cannot_be_mapped_is_an_error_that_stays(monkeypatch):
    def adopt(slots, slot, fd):
        os.close(fd)
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    iterator = iter(DataLoader(Noisy(40, 700), batch_size=4, num_workers=2))
    with monkeypatch.context() as patch:
        patch.setattr(SlotMap, "adopt", adopt)
        with pytest.raises(RuntimeError, match=r"cannot be taken: .* Cannot allocate memory"):
            next(iterator)
    with pytest.raises(RuntimeError, match="cannot be taken"):
        next(iterator)  # and no wait for a batch that is lost
    assert not any(process.is_alive() for process in iterator._workers)


def test_nobody_starts_after_the_failure_of_another_worker_has_ended_all(monkeypatch):
    iterator = iter(DataLoader(Numbers(40), num_workers=2))
    for process in iterator._workers:
        kill(process)
        process.join()
    iterator._restarts = [3, 0]  # one of them has died too often
    deaths = [Death(worker) for worker in iterator._crew.workers]
    monkeypatch.setattr(iterator._crew, "take", lambda ready: deaths)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(iterator)
    assert not any(process.is_alive() for process in iterator._workers)


def test_a_killed_worker_is_torchs_error_if_asked():
    iterator = iter(DataLoader(Numbers(40), num_workers=2, on_worker_failure="raise"))
    next(iterator)
    pid = iterator._workers[0].pid
    kill(iterator._workers[0])
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid\(s\) {pid}\) exited unexpectedly") as caught:
        list(iterator)
    assert str(caught.value.__cause__) == f"DataLoader worker (pid {pid}) is killed by signal: Killed. "


# A busy machine may make a worker late that does not hang. That costs a restart and changes no batch.
DEADLINE_S = 1.0


def test_a_worker_that_hangs_is_replaced_and_its_batches_come_in_order(tmp_path):
    dataset = HangsOnce(Numbers(40, 700), {5, 30}, tmp_path)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, worker_deadline_s=DEADLINE_S)
    assert [numbers_of(batch) for batch in loader] == [list(range(first, first + 4)) for first in range(0, 40, 4)]
    assert loader.stats().counts["workers.replaced"] >= 2


def test_random_draws_go_on_behind_what_a_hung_worker_had_drawn(tmp_path):
    def draws(dataset, **options):
        loader = DataLoader(
            dataset, batch_size=None, num_workers=1, generator=torch.Generator().manual_seed(8), **options
        )
        return [[float(value) for value in sample] for sample in loader]

    hangs = HangsOnce(Draws(20), {9}, tmp_path)
    assert draws(hangs, worker_deadline_s=DEADLINE_S) == draws(Draws(20))
    assert (tmp_path / "9").exists()


def test_out_of_order_batches_come_once_each_although_a_worker_hangs(tmp_path):
    dataset = HangsOnce(Numbers(40), {4}, tmp_path)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, in_order=False, worker_deadline_s=DEADLINE_S)
    assert sorted(number for batch in loader for number in numbers_of(batch)) == list(range(40))


def test_a_batch_that_always_hangs_is_an_error_after_some_tries(caplog):
    loader = DataLoader(Hanging(12, at=0), batch_size=2, num_workers=1, worker_deadline_s=0.2)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) made no batch for .* s and was ended"):
        list(loader)
    assert sum("another one starts" in message for message in caplog.messages) == 3


def test_a_hung_worker_is_an_error_at_once_if_asked():
    loader = DataLoader(
        Hanging(12, at=0), batch_size=2, num_workers=1, worker_deadline_s=0.2, on_worker_failure="raise"
    )
    with pytest.raises(RuntimeError, match="made no batch"):
        list(loader)


def test_a_caller_who_stays_away_longer_than_the_deadline_finds_the_workers_alive(monkeypatch):
    loader = DataLoader(Numbers(12), batch_size=2, num_workers=2, worker_deadline_s=1000)
    iterator = iter(loader)
    seen = [numbers_of(next(iterator)) for _ in range(2)]  # one of each worker: only batches are still to come
    for worker in filter(iterator._owed_by, iterator._crew.workers):
        assert select.select([worker.channel.sock], [], [], 60)[0]  # what it sent is here, and then the clock leaps
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + 5000)
    seen += [numbers_of(batch) for batch in iterator]
    assert seen == [[first, first + 1] for first in range(0, 12, 2)]
    assert "workers.replaced" not in loader.stats().counts


def test_a_worker_that_had_nothing_to_do_has_the_whole_deadline_for_what_it_is_asked(monkeypatch):
    iterator = iter(DataLoader(Numbers(12), batch_size=2, num_workers=1, prefetch_factor=1, worker_deadline_s=1000))
    iterator._attend(None)  # the one batch that is asked for is here
    now_s = time.monotonic() + 5000
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now_s)
        next(iterator)  # asks for another one
        assert iterator._crew.workers[0].heard_s == now_s


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan")])
def test_a_deadline_that_is_no_time_is_refused(deadline_s):
    with pytest.raises(ValueError, match="worker_deadline_s must be"):
        DataLoader(Numbers(4), worker_deadline_s=deadline_s)


def test_an_unknown_answer_to_failures_is_refused():
    with pytest.raises(ValueError, match="on_worker_failure must be"):
        DataLoader(Numbers(4), on_worker_failure="ignore")


def test_errors_do_not_cost_a_worker():
    loader = DataLoader(Failing(30, {n: ValueError(n) for n in range(0, 30, 3)}), num_workers=2)
    iterator, seen = iter(loader), []
    pids = [process.pid for process in iterator._workers]
    for _ in range(30):
        try:
            seen += numbers_of(next(iterator))
        except ValueError:
            continue
    assert seen == [number for number in range(30) if number % 3]
    assert [process.pid for process in iterator._workers] == pids


def test_no_slot_stays_mapped_after_an_epoch():
    before = slot_mappings()
    for batch in DataLoader(Numbers(40, 5000), batch_size=4, num_workers=2):
        assert slot_mappings() > before
        numbers_of(batch)
    del batch
    assert slot_mappings() <= before


def test_no_descriptor_of_a_worker_stays_open_after_its_end():
    iterator = iter(DataLoader(Numbers(40), num_workers=2))
    crew = iterator._crew
    descriptors = [descriptor for worker in crew.workers for descriptor in (worker.lifeline, worker.channel.sock)]
    kill(iterator._workers[0])
    assert len(list(iterator)) == 40
    descriptors += [descriptor for worker in crew.workers for descriptor in (worker.lifeline, worker.channel.sock)]
    del iterator
    assert [is_open(descriptor) for descriptor in descriptors] == [False] * 8


def is_open(descriptor):
    """Whether a socket, or the descriptor of a process, is."""
    if not isinstance(descriptor, int):
        return descriptor.fileno() >= 0
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[pidfd]"
    except FileNotFoundError:
        return False


def test_slots_that_a_worker_gave_up_are_given_up_here():
    # Two MiB each, of which 16 are kept free. With a deadline no two share a slot.
    iterator = iter(DataLoader(Numbers(60, 1 << 18), num_workers=1, worker_deadline_s=1000))
    kept = [next(iterator) for _ in range(30)]
    kept.clear()
    for _ in range(25):
        next(iterator)
    assert len(iterator._crew.workers[0].slots._memory) < 30


def test_a_worker_that_finds_no_memory_for_a_slot_is_said_to_have():
    process = SimpleNamespace(pid=7, exitcode=-signal.SIGBUS)
    assert "ran out of memory for the batches" in str(Death(SimpleNamespace(process=process)))


class Unpicklable(Numbers):
    """Numbers whose samples cannot leave their process."""

    def __getitem__(self, index):
        return lambda: index


def test_what_cannot_be_sent_is_an_error_not_a_hang():
    loader = DataLoader(Unpicklable(3), batch_size=None, num_workers=1)
    with pytest.raises(Exception, match=r"pickle .*|Can't pickle .*"):
        next(iter(loader))


class LocalError(Numbers):
    """Numbers that raise an error whose class exists in the worker only."""

    def __getitem__(self, index):
        class InnerError(Exception):
            pass

        raise InnerError("from inside")


def test_an_index_that_cannot_be_sent_is_an_error_and_nobody_waits_for_its_batch():
    indices = [0, 1, 2, lambda: 3, 4, 5]
    iterator = iter(DataLoader(Numbers(6), batch_size=None, sampler=indices, num_workers=1, prefetch_factor=2))
    assert next(iterator).item() == 0
    # As with an error of the sampler, the batch that was to be handed out meanwhile is lost.
    with pytest.raises(Exception, match=r"(?i)pickle"):
        next(iterator)
    assert [batch.item() for batch in iterator] == [2, 4, 5]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_indices_that_cannot_be_sent_do_not_end_the_epoch_early(num_workers):
    indices = [0, 1, 2, 3, *(lambda: None for _ in range(6)), *range(10, 30)]
    loader = DataLoader(Numbers(30), batch_size=None, sampler=indices, num_workers=num_workers, prefetch_factor=2)
    found, refused = gone_past_errors(loader)
    assert refused
    assert found[-15:] == [*range(15, 30)]


def gone_past_errors(loader):
    """Return the numbers of an epoch, and what was raised between them."""
    iterator, found, refused = iter(loader), [], []
    while True:
        try:
            found.append(next(iterator).item())
        except StopIteration:
            return found, refused
        except Exception as error:
            refused.append(type(error))


class Stumbling:
    """A sampler that fails at some of its indices and goes on behind them."""

    def __len__(self):
        return 40

    def __iter__(self):
        self.place = -1
        return self

    def __next__(self):
        self.place += 1
        if self.place >= 40:
            raise StopIteration
        if 10 <= self.place < 20:
            raise KeyError(self.place)
        return self.place


@pytest.mark.parametrize(("num_workers", "workers"), [(1, "process"), (2, "process"), (1, "thread"), (2, "thread")])
def test_errors_of_a_sampler_do_not_end_the_epoch_early(num_workers, workers):
    loader = DataLoader(
        Numbers(40), batch_size=None, sampler=Stumbling(), num_workers=num_workers, prefetch_factor=2, workers=workers
    )
    found, refused = gone_past_errors(loader)
    assert refused == [KeyError] * 10
    assert found[-15:] == [*range(25, 40)]


def test_a_slot_that_came_back_is_not_lost_with_an_index_that_cannot_be_sent():
    indices = [0, 1, lambda: 2, 3]
    loader = DataLoader(Numbers(6, 600), batch_size=None, sampler=indices, num_workers=1, prefetch_factor=1)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(Exception, match=r"(?i)pickle"):
        next(iterator)
    assert 0 in iterator._crew.workers[0].slots.notices().returned


def test_an_error_of_a_class_that_cannot_be_sent_is_a_runtime_error():
    with pytest.raises(RuntimeError, match="from inside"):
        next(iter(DataLoader(LocalError(3), num_workers=1)))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods_hand_over_the_same_batches(method):
    loader = DataLoader(
        Noisy(24, 600), batch_size=4, num_workers=1, multiprocessing_context=method, persistent_workers=True
    )
    expected = [list(range(first, first + 4)) for first in range(0, 24, 4)]
    assert [numbers_of(batch) for batch in loader] == expected
    assert [numbers_of(batch) for batch in loader] == expected


def train_until_killed(dataset, pids):
    """A trainer that waits for its end with a live iterator."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    iterator = iter(DataLoader(dataset, batch_size=2, num_workers=2))
    held = [next(iterator) for _ in range(2)]
    pids.send([process.pid for process in iterator._workers])
    while held:
        signal.pause()


@pytest.mark.parametrize("dataset", [Numbers(1000, 700), Hanging(1000, at=6)], ids=["busy", "stuck"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_trainer_that_is_killed_leaves_no_process(end, dataset, capfd):
    context = torch.multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    trainer = context.Process(target=train_until_killed, args=(dataset, sender))
    trainer.start()
    pids = receiver.recv()
    os.kill(trainer.pid, end)
    assert dies_within(trainer.pid, 20)
    assert all(dies_within(pid, 10) for pid in pids)
    trainer.join()
    capfd.readouterr()  # the traceback of an interrupt is nothing to show


TRAINER = """
    import sys
    from dataflow.loaders import DataLoader
    from dataflow.loaders.testing import Numbers

    if __name__ == "__main__":
        keep = sys.argv[1] == "persistent"
        iterator = iter(DataLoader(Numbers(1000, 700), batch_size=2, num_workers=2, persistent_workers=keep))
        held = [next(iterator) for _ in range(2)]
        print(*[process.pid for process in iterator._workers], flush=True)
        if sys.argv[1] == "exception":
            raise ZeroDivisionError
"""


@pytest.mark.parametrize("ending", ["persistent", "exception"])
def test_a_trainer_that_ends_leaves_no_process(ending, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    done = subprocess.run(
        [sys.executable, str(script), ending], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.count("Traceback") == (ending == "exception")
    assert all(dies_within(int(pid), 10) for pid in done.stdout.split())
    assert len(done.stdout.split()) == 2


SERVED_TRAINER = """
    import signal
    from dataflow.loaders import DataLoader
    from dataflow.loaders.testing import Hanging

    if __name__ == "__main__":
        loader = DataLoader(Hanging(100, at=6), num_workers=2, multiprocessing_context="forkserver")
        iterator = iter(loader)
        next(iterator)
        print(*[process.pid for process in iterator._workers], flush=True)
        signal.pause()
"""


def test_a_killed_trainer_leaves_no_socket_of_its_fork_server(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(SERVED_TRAINER))
    with tempfile.TemporaryDirectory() as sockets:  # a socket's path is no longer than 107 bytes
        environment = {**os.environ, "TMPDIR": sockets}
        trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
        with trainer:
            pids = [int(pid) for pid in trainer.stdout.readline().split()]
            assert os.listdir(sockets)
            trainer.kill()
        assert len(pids) == 2
        assert all(dies_within(pid, 10) for pid in pids)
        assert not os.listdir(sockets)


def test_a_loader_in_a_thread_leaves_no_process():
    before = children()
    with ThreadPoolExecutor(1) as threads:
        batches = threads.submit(lambda: [numbers_of(batch) for batch in DataLoader(Numbers(3), num_workers=2)])
        assert batches.result() == [[0], [1], [2]]
    assert children() <= before

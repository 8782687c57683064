"""What torch's documentation promises of a DataLoader, asked of torch's own and of ours."""

import gc
import inspect
import pickle
import random
import traceback
import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, TensorDataset, default_collate
from torch.utils.data.datapipes.iter import IterableWrapper

import dataflow.loaders
from dataflow.loaders import BadSamples
from dataflow.loaders.testing import (
    Draws,
    Failing,
    Hanging,
    Noisy,
    Numbers,
    Point,
    Records,
    Stream,
    WholeBatches,
    WorkerReport,
    children,
)

TORCH, OURS = torch.utils.data.DataLoader, dataflow.loaders.DataLoader
TORCHS_ARGUMENTS = inspect.signature(TORCH.__init__).parameters  # since torch 2.6 with `in_order`


@pytest.fixture(params=[TORCH, OURS], ids=["torch", "ours"])
def loader_class(request):
    return request.param


@pytest.fixture(
    params=[(TORCH, 0), (TORCH, 2), (OURS, 0), (OURS, 1), (OURS, 2)],
    ids=lambda way: f"{way[0].__module__.partition('.')[0]}-{way[1]}",
)
def load(request):
    """A loader class with a number of workers."""
    loader_class, num_workers = request.param
    return partial(loader_class, num_workers=num_workers)


def first_values(loader):
    """The numbers in each batch of a loader over `Numbers`."""
    return [batch[:, 0].tolist() for batch in loader]


def assert_loading_raises(error, match, loader):
    """Load all batches; what the error refers to is let go of at once, and with it the workers."""
    with pytest.raises(error, match=match) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.stride() == right.stride()
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


# --- construction


def test_signature_begins_with_torchs():
    theirs = list(TORCHS_ARGUMENTS.values())
    ours = list(inspect.signature(OURS.__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours[len(theirs) :])


def test_every_argument_is_an_attribute_as_in_torch():
    arguments = {"batch_size": 3, "num_workers": 1, "timeout": 2, "generator": torch.Generator(), "in_order": False}
    arguments = {name: value for name, value in arguments.items() if name in TORCHS_ARGUMENTS}
    theirs, ours = TORCH(Numbers(5), **arguments), OURS(Numbers(5), **arguments)
    for name in TORCHS_ARGUMENTS.keys() - {"self", "dataset", "shuffle"}:
        left, right = getattr(theirs, name), getattr(ours, name)
        assert type(left) is type(right)
        if not isinstance(left, (torch.utils.data.Sampler, torch.Generator)):
            assert left == right


BAD_ARGUMENTS = [
    {"num_workers": -1},
    {"timeout": -1},
    {"prefetch_factor": 2},
    {"num_workers": 1, "prefetch_factor": -1},
    {"persistent_workers": True},
    {"sampler": [0], "shuffle": True},
    {"batch_sampler": [[0]], "batch_size": 2},
    {"batch_sampler": [[0]], "shuffle": True},
    {"batch_size": None, "drop_last": True},
    {"batch_size": 0},
    {"batch_size": 2.5},
    {"multiprocessing_context": "fork"},
    {"num_workers": 1, "multiprocessing_context": "telepathy"},
    {"num_workers": 1, "multiprocessing_context": 3},
]
BAD_FOR_STREAMS = [{"shuffle": True}, {"sampler": [0]}, {"batch_sampler": [[0]]}]


@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [(Numbers(4), bad) for bad in BAD_ARGUMENTS] + [(Stream(4), bad) for bad in BAD_FOR_STREAMS],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_bad_arguments_are_refused_in_torchs_words(dataset, arguments):
    with pytest.raises(Exception) as theirs:
        TORCH(dataset, **arguments)
    with pytest.raises(type(theirs.value)) as ours:
        OURS(dataset, **arguments)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "name", ["batch_size", "batch_sampler", "sampler", "drop_last", "dataset", "persistent_workers"]
)
def test_attributes_are_frozen_after_init(loader_class, name):
    loader = loader_class(Numbers(4))
    with pytest.raises(ValueError, match=f"{name} attribute should not be set after DataLoader is initialized"):
        setattr(loader, name, getattr(loader, name))


def test_other_attributes_can_be_set(loader_class):
    loader = loader_class(Numbers(4), batch_size=2)
    loader.collate_fn = len
    assert list(loader) == [2, 2]


def test_timeout_needs_workers(loader_class):
    with pytest.raises(AssertionError) as refused:
        iter(loader_class(Numbers(4), timeout=1))
    if loader_class is OURS:  # torch's own said nothing at first
        assert "requires timeout == 0" in str(refused.value)


def test_prefetch_factor_defaults_to_two_with_workers_only(loader_class):
    assert loader_class(Numbers(4)).prefetch_factor is None
    assert loader_class(Numbers(4), num_workers=1).prefetch_factor == 2


def test_more_workers_than_cores_is_warned_about(loader_class):
    with pytest.warns(UserWarning, match="This DataLoader will create 500 worker processes"):
        loader_class(Numbers(4), num_workers=500)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_pinning_without_an_accelerator_is_warned_about_as_by_torch(num_workers):
    theirs, ours = (warnings_of(kind(Numbers(4), pin_memory=True, num_workers=num_workers)) for kind in (TORCH, OURS))
    assert ours == theirs


def warnings_of(loader):
    """What is said while a loader of four batches is walked through; torch said nothing about pinning before 2.6."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(loader)) == 4
    return [str(entry.message) for entry in caught if entry.category is UserWarning]


# --- batches and their order


@pytest.mark.parametrize(("batch_size", "drop_last"), [(1, False), (7, True), (40, False)])
def test_batches_are_those_of_the_sampler_in_order(load, batch_size, drop_last):
    loader = load(Noisy(30, 600), batch_size=batch_size, drop_last=drop_last)
    expected = list(BatchSampler(range(30), batch_size, drop_last))
    assert first_values(loader) == expected
    assert len(loader) == len(expected)


def test_batch_i_comes_from_worker_i_mod_n(loader_class):
    loader = loader_class(WorkerReport(30), batch_size=3, num_workers=2)
    assert [batch["id"].tolist() for batch in loader] == [[i % 2] * 3 for i in range(10)]


def test_public_attributes_are_arguments_so_that_frameworks_build_another_loader_of_them(loader_class):
    loader = loader_class(Numbers(8), batch_size=2)
    arguments = {name: value for name, value in vars(loader).items() if not name.startswith("_")}
    for name in ("batch_size", "sampler", "drop_last", "dataset_kind"):
        arguments.pop(name, None)
    rebuilt = type(loader)(**arguments | {"batch_sampler": [[6, 1], [3]]})
    assert first_values(rebuilt) == [[6, 1], [3]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shuffle_draws_the_same_order_from_a_generator(num_workers):
    orders = []
    for loader_class in (TORCH, OURS):
        generator = torch.Generator().manual_seed(3)
        loader = loader_class(Numbers(40), 7, shuffle=True, num_workers=num_workers, generator=generator)
        orders.append([first_values(loader), first_values(loader), generator.get_state().tolist()])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shuffle_draws_the_same_order_from_the_global_generator(num_workers):
    orders = []
    for loader_class in (TORCH, OURS):
        torch.manual_seed(11)
        loader = loader_class(Numbers(40), 7, shuffle=True, num_workers=num_workers)
        orders.append([first_values(loader), first_values(loader), torch.rand(3).tolist()])
    assert orders[0] == orders[1]


def test_any_iterable_is_a_sampler(load):
    loader = load(Numbers(9), batch_size=2, sampler=[8, 1, 1, 0, 5])
    assert first_values(loader) == [[8, 1], [1, 0], [5]]
    assert len(loader) == 3


class Indexed:
    """A sequence of the old kind, without `__iter__`."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Unsized(torch.utils.data.Sampler):
    def __init__(self, values, error):
        self.values = values
        self.error = error

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        raise self.error


ORDER = [8, 1, 1, 0, 5]


@pytest.mark.parametrize(
    "sampler",
    [torch.tensor(ORDER), np.array(ORDER), Indexed(ORDER), Unsized(ORDER, TypeError()), Unsized(ORDER, ValueError())],
    ids=lambda sampler: type(getattr(sampler, "error", sampler)).__name__,
)
def test_a_sampler_is_only_iterated(load, sampler):
    assert first_values(load(Numbers(9), batch_size=2, sampler=sampler)) == [[8, 1], [1, 0], [5]]
    batches = Indexed([[8], [1, 0]])
    assert first_values(load(Numbers(9), batch_sampler=batches)) == [[8], [1, 0]]


def test_a_batch_sampler_may_yield_anything_that_indexes(load):
    batches = [[0], [3, 2, 1], (4, 5), torch.tensor([6, 7])]
    loader = load(Numbers(9), batch_sampler=batches)
    assert first_values(loader) == [[0], [3, 2, 1], [4, 5], [6, 7]]
    assert loader.batch_size is None


class Slices(Numbers):
    """Reads whole batches by whatever its own batch sampler says."""

    def __getitems__(self, batch):
        return [self[index] for index in (range(self.length)[batch] if isinstance(batch, slice) else [batch])]


def test_a_batch_sampler_may_yield_what_only_the_dataset_understands(load):
    loader = load(Slices(6), batch_sampler=[slice(0, 2), slice(2, 5), 5])
    assert first_values(loader) == [[0, 1], [2, 3, 4], [5]]


def test_a_batch_sampler_may_yield_iterators(loader_class):
    loader = loader_class(Numbers(4), batch_sampler=Indexed([iter([0, 1]), (index for index in (2, 3))]))
    assert first_values(loader) == [[0, 1], [2, 3]]


class EndsBadly(torch.utils.data.Sampler):
    """Raises behind its last index."""

    def __len__(self):
        return 3

    def __iter__(self):
        yield from range(3)
        raise ValueError("the epoch cannot be closed")


def test_an_error_behind_the_last_index_costs_no_batch(loader_class):
    iterator = iter(loader_class(Numbers(3), sampler=EndsBadly()))
    assert [next(iterator).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot be closed"):
        next(iterator)


def test_batch_size_none_hands_out_converted_samples(load):
    loader = load([np.arange(3), (np.float32(1), "a")], batch_size=None)
    array, pair = loader
    assert_same(array, torch.arange(3))
    assert_same(pair, [torch.tensor(1.0), "a"])


def test_getitems_is_asked_for_whole_batches(load):
    loader = load(WholeBatches(5), batch_size=3)
    assert [batch.tolist() for batch in loader] == [[[0, 3], [1, 3], [2, 3]], [[3, 2], [4, 2]]]


class Sums(Numbers):
    """Whole batches, each of which is one number."""

    def __getitems__(self, indices):
        return [sum(indices)]


def test_batches_of_any_number_of_indices_are_asked_for(load):
    indices = [list(range(first, first + 300_000)) for first in range(3)]  # megabytes, so a socket takes a part only
    assert [int(batch) for batch in load(Sums(8), batch_sampler=indices)] == [sum(batch) for batch in indices]


def test_without_batches_a_sampler_may_yield_whole_ones(load):
    loader = load(torch.arange(9), batch_size=None, sampler=[[8, 1], [3], [4, 5, 6]])
    assert [batch.tolist() for batch in loader] == [[8, 1], [3], [4, 5, 6]]


@pytest.mark.parametrize("arguments", [{}, {"shuffle": True}], ids=str)
def test_a_dataset_may_grow_between_epochs(load, arguments):
    dataset = [1, 2]
    loader = load(dataset, **arguments)
    assert [len(loader), len(list(loader))] == [2, 2]
    dataset.append(3)
    assert [len(loader), sorted(map(int, loader))] == [3, [1, 2, 3]]


def test_two_iterators_of_one_loader_do_not_mix(load):
    loader = load(Numbers(8, 600), batch_size=2)
    pairs = list(zip(loader, loader, strict=True))
    assert [left[:, 0].tolist() for left, _ in pairs] == [right[:, 0].tolist() for _, right in pairs]
    assert len(pairs) == 4


def test_the_sampler_is_drawn_no_further_ahead_than_the_prefetch(loader_class):
    drawn = []

    def draw():
        for index in range(40):
            drawn.append(index)
            yield index

    class Sampler(torch.utils.data.Sampler):
        def __iter__(self):
            return draw()

    iterator = iter(loader_class(Numbers(40), sampler=Sampler(), num_workers=2, prefetch_factor=3))
    assert len(drawn) == 6
    next(iterator)
    assert len(drawn) == 7


def test_the_sampler_is_told_of_the_end_no_sooner_than_by_torch(loader_class):
    ended = []

    def draw():
        yield from range(4)
        ended.append(True)

    class Sampler(torch.utils.data.Sampler):
        def __iter__(self):
            return draw()

        def __len__(self):
            return 4

    iterator = iter(loader_class(Numbers(4), sampler=Sampler(), batch_size=2))
    next(iterator), next(iterator)
    assert not ended
    assert not list(iterator)
    assert ended


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loops_that_stop_at_the_last_batch_shuffle_as_torchs(num_workers):
    def shuffled(loader_class):
        generator = torch.Generator().manual_seed(5)
        loader = loader_class(Numbers(8), 2, shuffle=True, generator=generator, num_workers=num_workers)
        return [[batch.tolist() for _, batch in zip(range(4), loader, strict=False)] for _ in range(3)]

    assert shuffled(OURS) == shuffled(TORCH)


def test_out_of_order_loading_hands_out_every_batch_once(loader_class):
    if loader_class is TORCH and "in_order" not in TORCHS_ARGUMENTS:
        pytest.skip("torch's own knows no order but one")
    loader = loader_class(Noisy(60), batch_size=2, num_workers=2, in_order=False)
    assert sorted(value for batch in first_values(loader) for value in batch) == list(range(60))


def test_an_iterator_is_an_iterator_of_its_epoch_only(load):
    iterator = iter(load(Numbers(3)))
    assert iter(iterator) is iterator
    assert len(iterator) == 3
    assert len(list(iterator)) == 3
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_an_iterator_cannot_be_pickled(load):
    with pytest.raises(NotImplementedError):
        pickle.dumps(iter(load(Numbers(3))))


def test_an_empty_dataset_has_no_batches(load):
    assert list(load(Numbers(0))) == []


# --- collating


def test_default_collate_makes_of_records_what_it_makes_in_process(load):
    dataset = Records(10)
    loader = load(dataset, batch_size=4)
    for batch, indices in zip(loader, BatchSampler(range(10), 4, drop_last=False), strict=True):
        assert_same(batch, default_collate([dataset[index] for index in indices]))


class Row(list):
    """A sequence of the user's."""


class Features(dict):
    """A mapping of the user's."""


def test_collating_keeps_the_types_of_containers(load):
    samples = [Features(row=Row([index, index + 1]), name=str(index)) for index in range(4)]
    for batch in load(samples, batch_size=2):
        assert type(batch) is Features
        assert type(batch["row"]) is Row
        assert [column.tolist() for column in batch["row"]] in ([[0, 1], [1, 2]], [[2, 3], [3, 4]])
        assert batch["name"] in (["0", "1"], ["2", "3"])


NUMBERS = [*map(np.dtype, ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])]


def torch_takes_booleans_of_numpy():
    """Of numpy 2.3 and newer torch 2.7 takes none."""
    try:
        return torch.as_tensor([np.True_]).dtype is torch.bool
    except TypeError:
        return False


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_numbers_of_numpy_keep_their_dtype(loader_class, dtype):
    if loader_class is TORCH and dtype.kind == "b" and not torch_takes_booleans_of_numpy():
        pytest.skip("this torch takes no booleans of this numpy")
    (batch,) = loader_class([dtype.type(1), dtype.type(0)], batch_size=2, num_workers=1)
    assert_same(batch, torch.from_numpy(np.array([1, 0], dtype)))


def test_views_of_a_mapped_file_are_collated(load, tmp_path):
    np.arange(8000).tofile(tmp_path / "numbers")
    rows = np.memmap(tmp_path / "numbers", np.int64, mode="r+", shape=(4, 2000))
    assert torch.equal(torch.cat(list(load(rows, batch_size=2))), torch.arange(8000).reshape(4, 2000))


@dataclass
class Ragged:
    values: list
    lengths: torch.Tensor
    names: tuple
    raw: bytes


def collate_ragged(samples):
    arrays = [np.arange(2000 * (1 + int(sample[0]) % 3)) for sample in samples]
    return Ragged(arrays, torch.tensor([len(array) for array in arrays]), tuple(map(str, samples)), b"x" * 50_000)


def test_custom_collate_may_return_objects_of_any_kind(load):
    loader = load(Numbers(5), batch_size=2, collate_fn=collate_ragged)
    for number, batch in zip(range(3), loader, strict=True):
        expected = collate_ragged([torch.tensor([index]) for index in range(2 * number, min(2 * number + 2, 5))])
        assert type(batch) is Ragged
        assert_same(vars(batch), vars(expected))
        assert all(array.flags.writeable for array in batch.values)


def collate_odd_tensors(samples):
    base = torch.stack(samples).float().expand(-1, 2048).clone()
    image = torch.zeros(2, 3, 16, 16).contiguous(memory_format=torch.channels_last) + len(samples)
    return {
        "whole": base,
        "shifted": base[:, 1:],
        "expanded": torch.arange(3.0).expand(1000, 3),
        "channels_last": image,
        "transposed": base.t(),
        "sparse": torch.eye(700).to_sparse(),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3.5),
        "bool": base > 1,
        "half": base.half(),
        "parameter": torch.nn.Parameter(base.clone()),
        "learns": torch.ones(2000, requires_grad=True),
        "storage": torch.arange(2000).untyped_storage().tolist()[:3],
        "point": Point(base + 1, OrderedDict(a=base + 2)),
        "none": None,
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_tensors_of_every_kind_arrive_as_they_left(load):
    loader = load(Numbers(4), batch_size=2, collate_fn=collate_odd_tensors)
    for number, batch in zip(range(2), loader, strict=True):
        expected = collate_odd_tensors([torch.tensor([index]) for index in range(2 * number, 2 * number + 2)])
        assert list(batch) == list(expected)
        for name in ("whole", "shifted", "expanded", "channels_last", "transposed", "empty", "bool", "half", "point"):
            assert_same(batch[name], expected[name])
        assert torch.equal(batch["sparse"].to_dense(), expected["sparse"].to_dense())
        assert isinstance(batch["parameter"], torch.nn.Parameter)
        assert torch.equal(batch["parameter"], expected["parameter"])
        assert batch["learns"].requires_grad
        assert batch["scalar"] == 3.5
        batch["whole"][:, 1] = -1  # still views of one storage
        assert (batch["shifted"][:, 0] == -1).all()
        assert (batch["transposed"][1] == -1).all()


def test_a_batch_may_be_written_to_and_kept(load):
    kept = []
    for batch in load(Numbers(100, 1000), batch_size=1):
        batch += 1
        kept.append(batch)
    assert all((batch == index + 1).all() for index, batch in enumerate(kept))


def test_collate_errors_are_torchs(load):
    text = "batch must contain tensors, numpy arrays, numbers, dicts or lists; found"
    assert_loading_raises(TypeError, text, load([None]))
    text = "each element in list of batch should be of equal size"
    assert_loading_raises(RuntimeError, text, load([[1], [1, 2]], batch_size=2))


def test_tensors_of_unequal_size_are_a_runtime_error(load):
    assert_loading_raises(RuntimeError, None, load([torch.zeros(2000), torch.zeros(3000)], batch_size=2))


# --- workers and their seeds


def test_workers_are_seeded_from_the_generator(loader_class):
    generator = torch.Generator().manual_seed(77)
    base_seed = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(77)).item())
    loader = loader_class(Draws(6), batch_size=None, num_workers=2, generator=generator)
    drawn = list(loader)
    assert len(drawn) == 6
    for worker_id in (0, 1):
        own = random.Random(base_seed + worker_id)
        own_torch = torch.Generator().manual_seed(base_seed + worker_id)
        own_numpy = np.random.RandomState(torch.utils.data._utils.worker._generate_state(base_seed, worker_id))
        for sample in drawn[worker_id::2]:
            expected = [worker_id, own.random(), own_numpy.randint(1 << 30), torch.rand((), generator=own_torch).item()]
            assert list(sample) == expected


def test_each_epoch_has_other_seeds_and_persistent_workers_draw_on(loader_class):
    torch.manual_seed(5)
    fresh = loader_class(Draws(4), batch_size=None, num_workers=1)
    kept = loader_class(Draws(4), batch_size=None, num_workers=1, persistent_workers=True)
    for loader in (fresh, kept):
        first, second = list(loader), list(loader)
        assert first != second


@pytest.mark.parametrize("strictly", [False, True])
def test_persistent_workers_draw_on_behind_the_prefetch_of_an_epoch_that_was_left(loader_class, strictly):
    more = {"on_worker_failure": "raise"} if strictly and loader_class is OURS else {}

    def open_loader():
        torch.manual_seed(5)
        return loader_class(Draws(200), batch_size=None, num_workers=1, persistent_workers=True, **more)

    drawn, loader = list(open_loader()), open_loader()
    for _ in zip(range(150), loader):  # noqa: B905  leaves the second where the first ends
        pass
    assert next(iter(loader)) == drawn[150 + loader.prefetch_factor]


def test_workers_know_who_they_are(loader_class):
    dataset = WorkerReport(8)
    dataset.tag = 5
    loader = loader_class(dataset, batch_size=None, num_workers=2)
    reports = list(loader)
    assert [report["id"] for report in reports] == [0, 1] * 4
    for report in reports:
        assert report["num_workers"] == 2
        assert report["num_threads"] == 1
        assert report["own_dataset"]
        assert report["tag"] == 5
        assert report["torch_seed"] == report["seed"]
    assert reports[1]["seed"] == reports[0]["seed"] + 1
    assert torch.utils.data.get_worker_info() is None


class ProcessName(Numbers):
    def __getitem__(self, index):
        return Path("/proc/self/comm").read_text().strip()


def test_workers_go_by_the_name_of_torchs(loader_class):
    has_name = hasattr(torch.multiprocessing, "_set_thread_name")  # newer releases have it
    name = "pt_data_worker" if has_name else ProcessName(1)[0]
    assert list(loader_class(ProcessName(1), batch_size=None, num_workers=1)) == [name]


def tag_dataset(worker_id):
    torch.utils.data.get_worker_info().dataset.tag = 100 + worker_id


def test_worker_init_fn_runs_in_each_worker_after_seeding(loader_class):
    loader = loader_class(WorkerReport(4), batch_size=None, num_workers=2, worker_init_fn=tag_dataset)
    assert [report["tag"] for report in loader] == [100, 101] * 2


def fail_to_begin(worker_id):
    raise LookupError(f"no licence for worker {worker_id}")


def test_an_error_of_worker_init_fn_comes_with_the_first_batch(loader_class):
    loader = loader_class(Numbers(4), num_workers=1, worker_init_fn=fail_to_begin)
    assert_loading_raises(LookupError, "no licence for worker 0", loader)


class Server(Stream):
    """A stream that cannot be opened while its server is down."""

    def __init__(self, length, up):
        super().__init__(length)
        self.up = up

    def __iter__(self):
        if not self.up.exists():
            raise ConnectionError("the server is down")
        return super().__iter__()


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_a_stream_that_could_not_be_opened_can_be_tried_again(loader_class, tmp_path, persistent_workers):
    up = tmp_path / "up"
    loader = loader_class(Server(4, up), batch_size=2, num_workers=1, persistent_workers=persistent_workers)
    assert_loading_raises(ConnectionError, "the server is down", loader)
    up.touch()
    assert first_values(loader) == [[0, 1], [2, 3]]


def test_persistent_workers_keep_the_dataset_of_their_first_epoch(loader_class):
    dataset = WorkerReport(4)
    dataset.tag = "first"
    loader = loader_class(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    list(loader)
    dataset.tag = "second"
    assert {report["tag"] for report in loader} == {"first"}


def test_persistent_workers_are_the_same_processes_and_iterator(loader_class):
    loader = loader_class(Numbers(6), batch_size=2, num_workers=2, persistent_workers=True)
    iterator = iter(loader)
    pids = [worker.pid for worker in iterator._workers]
    assert first_values(iterator) == [[0, 1], [2, 3], [4, 5]]
    assert iter(loader) is iterator
    next(iterator)
    assert first_values(loader) == [[0, 1], [2, 3], [4, 5]]  # also when the epoch before was left early
    assert [worker.pid for worker in iterator._workers] == pids


# --- errors


@pytest.mark.parametrize(
    "error", [ValueError("bad value"), KeyError("key"), FileNotFoundError(2, "gone"), OSError("x")]
)
def test_an_error_comes_with_its_type_and_iteration_goes_on(load, error):
    iterator = iter(load(Failing(6, {2: error}), batch_size=2))
    assert next(iterator)[:, 0].tolist() == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(iterator)
    assert type(caught.value) is type(error)
    if load.keywords["num_workers"]:
        text = str(caught.value)
        assert text.startswith(f"Caught {type(error).__name__} in DataLoader worker process")
        assert "Original Traceback (most recent call last):" in text
        assert "raise self.errors[index]" in text
    assert first_values(iterator) == [[4, 5]]


class PickyError(Exception):
    def __init__(self, one, two):
        super().__init__(one, two)


def test_an_error_that_cannot_be_made_again_is_a_runtime_error(loader_class):
    loader = loader_class(Failing(2, {0: PickyError(1, 2)}), num_workers=1)
    assert_loading_raises(RuntimeError, "Caught PickyError in DataLoader worker process 0", loader)


def test_an_index_out_of_range_is_an_index_error(load):
    assert_loading_raises(IndexError, None, load(Numbers(3), sampler=[5]))


@pytest.mark.parametrize("number", [int, np.float32])
def test_a_worker_that_hangs_is_a_timeout(loader_class, number):
    iterator = iter(loader_class(Hanging(4, at=1, seconds=2.5), num_workers=2, timeout=number(1)))
    assert next(iterator)[:, 0].tolist() == [0]
    with pytest.raises(RuntimeError, match=rf"DataLoader timed out after {number(1)} seconds"):
        next(iterator)


def end_at_once(worker_id):
    import os

    os._exit(3)


def test_a_dead_worker_is_a_runtime_error_in_torchs_words(loader_class):
    strictly = {"on_worker_failure": "raise"} if loader_class is OURS else {}
    loader = loader_class(Numbers(4), num_workers=1, worker_init_fn=end_at_once, **strictly)
    assert_loading_raises(RuntimeError, r"DataLoader worker \(pid(\(s\))? \d+\) exited unexpectedly", loader)


# --- iterable datasets


def test_streams_alternate_between_workers(load):
    loader = load(Stream(10), batch_size=2)
    expected = {
        0: [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
        1: [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
        2: [[0, 2], [1, 3], [4, 6], [5, 7], [8], [9]],
    }
    assert first_values(loader) == expected[load.keywords["num_workers"]]


class UnevenStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, length = (0, 3) if info is None or info.id == 0 else (100, 9)
        return (torch.tensor([first + index]) for index in range(length))


def test_a_worker_that_ends_early_leaves_the_rest_to_the_others(loader_class):
    loader = loader_class(UnevenStream(), num_workers=2)
    assert first_values(loader) == [[0], [100], [1], [101], [2], *([100 + index] for index in range(2, 9))]
    loader = loader_class(UnevenStream(), num_workers=2, persistent_workers=True)
    assert first_values(loader) == first_values(loader)


def test_a_stream_out_of_order_hands_out_every_batch_once(loader_class):
    if loader_class is TORCH and "in_order" not in TORCHS_ARGUMENTS:
        pytest.skip("torch's own knows no order but one")
    loader = loader_class(UnevenStream(), num_workers=2, in_order=False)
    assert sorted(first_values(loader)) == [[0], [1], [2], *([100 + index] for index in range(9))]


class Unopened(torch.utils.data.IterableDataset):
    """Has none of what `iter()` would return."""

    def __iter__(self):
        raise ConnectionError("there is no server")


def test_a_stream_that_cannot_be_opened_is_an_error_without_workers_too(load):
    assert_loading_raises(ConnectionError, "there is no server", load(Unopened()))


@pytest.mark.parametrize("drop_last", [False, True])
def test_streams_drop_their_last_short_batch_if_asked(load, drop_last):
    loader = load(Stream(10), batch_size=3, drop_last=drop_last)
    shards = max(1, load.keywords["num_workers"])
    sizes = sorted(len(batch) for batch in first_values(loader))
    each = 10 // shards
    whole, rest = divmod(each, 3)
    assert sizes == sorted(([] if drop_last or not rest else [rest] * shards) + [3] * whole * shards)


def test_streams_without_batches(load):
    loader = load(Stream(5), batch_size=None)
    assert [int(sample) for sample in loader] == [0, 1, 2, 3, 4]


def test_streams_have_no_length_of_their_own(loader_class):
    with pytest.raises(TypeError):
        len(loader_class(Stream(5)))


class SizedStream(Stream):
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "batches"), [(1, False, 3), (2, False, 2), (2, True, 1), (None, False, 3)]
)
def test_the_length_of_a_stream_is_counted_in_batches(loader_class, batch_size, drop_last, batches):
    assert len(loader_class(SizedStream(3), batch_size=batch_size, drop_last=drop_last)) == batches


def test_a_stream_longer_than_its_length_is_warned_about(load):
    loader = load(SizedStream(5))
    assert len(loader) == 3
    with pytest.warns(UserWarning, match="was reported to be 3"):
        assert len(list(loader)) == 5


# --- the end


def test_an_epoch_leaves_no_process(loader_class):
    before = children()
    for _ in loader_class(Numbers(6), num_workers=2):
        pass
    assert children() <= before


def test_leaving_the_loop_early_leaves_no_process(loader_class):
    before = children()
    for _ in loader_class(Numbers(60), num_workers=2):
        break
    assert children() <= before


def test_dropping_persistent_workers_leaves_no_process(loader_class):
    before = children()
    loader = loader_class(Numbers(6), num_workers=2, persistent_workers=True)
    list(loader)
    assert len(children() - before) == 2
    del loader
    assert children() <= before


def test_an_exception_in_the_loop_leaves_no_process(loader_class):
    before = children()

    def train():
        for _ in loader_class(Numbers(60), num_workers=2):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert children() <= before


def test_samplers_of_the_loader_are_torchs(loader_class):
    assert type(loader_class(Numbers(3)).sampler) is SequentialSampler
    assert type(loader_class(Numbers(3), shuffle=True).sampler) is RandomSampler
    assert type(loader_class(TensorDataset(torch.zeros(3))).batch_sampler) is BatchSampler


def test_the_loop_can_be_profiled_under_torchs_name(loader_class):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            list(loader_class(Numbers(3)))
    assert any(event.key.startswith("enumerate(DataLoader)#") for event in profile.key_averages())


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_data_pipes_are_shuffled_as_torch_shuffles_them(num_workers):
    orders = []
    for loader_class in (TORCH, OURS):
        torch.manual_seed(3)
        pipe = IterableWrapper(list(range(20))).shuffle().sharding_filter()
        loader = loader_class(pipe, 4, shuffle=True, num_workers=num_workers)
        orders.append([[batch.tolist() for batch in loader] for _ in range(2)])
    assert orders[0] == orders[1]


class Odd(torch.utils.data.Dataset):
    """Tensors that torch's default collate treats in its own way, or refuses."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.make(index)


@pytest.mark.filterwarnings("ignore")  # of the kinds themselves
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda index: torch.quantize_per_tensor(torch.rand(3000), 0.1, 0, torch.quint8),
        lambda index: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda index: torch.ones(3).to_sparse(),
    ],
    ids=["quantized", "nested", "sparse"],
)
def test_tensors_of_odd_kinds_are_collated_as_torch_does(make, num_workers):
    outcomes = []
    for loader_class in (TORCH, OURS):
        try:
            batch = next(iter(loader_class(Odd(make), 2, num_workers=num_workers)))
            outcomes.append((type(batch), batch.layout, batch.shape, batch.dtype))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "loader_class", [TORCH, OURS, partial(OURS, workers="thread")], ids=["torch", "ours", "threads"]
)
def test_a_fraction_of_a_batch_is_not_made_ahead(loader_class):
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        iter(loader_class(Numbers(4), num_workers=1, prefetch_factor=1.5))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("loader_class", [TORCH, OURS, partial(OURS, bad_samples=BadSamples("skip"))])
def test_a_dataset_ends_with_its_loader_without_a_garbage_collection(loader_class, num_workers):
    gc.collect()
    gc.disable()
    try:
        dataset = Numbers(8)
        ended = weakref.ref(dataset)
        loader = loader_class(dataset, num_workers=num_workers)
        batches = iter(loader)
        next(batches)
        del dataset, loader, batches
        assert ended() is None
    finally:
        gc.enable()

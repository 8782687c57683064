"""A batch arrives as it left: values, types, aliasing."""

import collections
import dataclasses
import itertools
import os
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflow.loaders import packing
from dataflow.loaders.collate import Gathered
from dataflow.loaders.packing import DIVERT_BYTES, pack, pack_rows, unpack
from dataflow.loaders.slots import HELD_SLOTS, Holdings, Leases, SlotMap, SlotPool, Watch
from dataflow.loaders.testing import Point


def send(batch, max_slots=50):
    """Return the parcel and the trainer's slots, which have arrived."""
    pool, used = SlotPool(max_slots=max_slots, max_free=3, free_bytes=0), {}
    parcel = pack(batch, pool, used)
    return parcel, ship(pool, used)


def ship(pool, used, holdings=None):
    """Return the trainer's leases of what is in the pool's slots."""
    slots = SlotMap(holdings or Holdings())
    new, dropped, fds = pool.ship(used)
    assert not dropped
    for slot, fd in zip(new, fds, strict=True):
        slots.adopt(slot, fd)
    return Leases(slots, used, shared=False)


def travel(batch, max_slots=50):
    return unpack(*send(batch, max_slots))


@dataclasses.dataclass
class Sample:
    pixels: torch.Tensor
    name: str


DTYPES = [
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.bool,
]
tensors = st.builds(
    lambda shape, dtype, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype),
    st.lists(st.sampled_from([0, 1, 3, 40]), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
arrays = st.builds(
    lambda length, dtype: np.arange(length).astype(dtype),
    st.sampled_from([0, 7, 5000]),
    st.sampled_from(["int8", "float64", "U4", "datetime64[s]", "object"]),
)
leaves = st.one_of(tensors, arrays, st.integers(), st.text(), st.binary(max_size=9), st.just(b"z" * 7000), st.none())
batches = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Point, inner, inner),
        st.tuples(inner, inner),
        st.builds(Sample, tensors, st.text(max_size=5)),
    ),
    max_leaves=8,
)


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif dataclasses.is_dataclass(left):
        assert_same(vars(left), vars(right))
    else:
        assert left == right


@given(batch=batches, max_slots=st.sampled_from([0, 1, 50]))
def test_any_batch_arrives_as_it_left(batch, max_slots):
    assert_same(travel(batch, max_slots), batch)


def test_tensors_that_share_memory_still_do():
    whole = torch.arange(4000)
    arrived = travel({"whole": whole, "tail": whole[1:], "again": whole, "table": whole.view(40, 100).t()})
    arrived["whole"][101] = -1
    assert arrived["tail"][100] == -1
    assert arrived["table"][1, 1] == -1
    assert arrived["again"] is arrived["whole"]


@pytest.mark.parametrize(
    "view",
    [lambda part: part, lambda part: part.view(10, 100).t(), torch.Tensor.requires_grad_],
    ids=["plain", "transposed", "leaf"],
)
def test_a_small_view_of_a_large_tensor_travels_alone(view):
    part = view(torch.arange(100_000.0, dtype=torch.float64)[5000:6000])
    parcel, leases = send(part)
    assert sum(place.size_bytes for place in parcel.buffers) == 8000
    assert_same(unpack(parcel, leases), part)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("storage", [torch.Tensor.untyped_storage, torch.Tensor.storage])
def test_a_storage_travels_as_tensors_do(storage):
    numbers = torch.arange(3000)
    parcel, leases = send(storage(numbers))
    assert [place.size_bytes for place in parcel.buffers] == [24_000]
    arrived = unpack(parcel, leases)
    assert type(arrived) is type(storage(numbers))
    assert torch.equal(torch.empty(0, dtype=torch.int64).set_(arrived), numbers)


@pytest.mark.parametrize(("length", "taken"), [(2000, 2000), (2001, 1000)])
def test_a_storage_is_taken_whole_where_half_of_it_is_used(length, taken):
    parcel, _ = send(torch.arange(length)[:1000])
    assert [place.size_bytes for place in parcel.buffers] == [taken * 8]


def test_a_slot_is_needed_as_far_as_any_of_its_parts_reaches():
    pool = SlotPool(max_slots=1, max_free=1, free_bytes=0)
    first, last = pool.allocate(5000), pool.allocate(5000)
    used = {}
    pack([first, last, first[:]], pool, used)
    for fd in pool.ship(used)[2]:
        os.close(fd)
    assert used == {0: 5056 + 5000}


def test_memory_formats_survive():
    images = torch.rand(2, 3, 30, 30).contiguous(memory_format=torch.channels_last)
    assert travel(images).is_contiguous(memory_format=torch.channels_last)
    assert travel(images[:1]).stride() == images[:1].stride()


class Tagged(torch.Tensor):
    """A tensor of another type."""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_unusual_tensors_survive():
    numbers = torch.complex(torch.arange(3000.0), torch.ones(3000))
    assert torch.equal(travel(numbers.conj()), numbers.conj())
    assert torch.equal(travel(numbers.conj().imag), -numbers.imag)  # whose sign is not in its memory
    assert torch.equal(travel(torch.eye(900).to_sparse()).to_dense(), torch.eye(900))
    parameter = travel(torch.nn.Parameter(torch.ones(3000)))
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad
    assert isinstance(travel(torch.nn.Parameter(torch.ones(3000), requires_grad=False)), torch.nn.Parameter)
    assert type(travel(torch.ones(3000).as_subclass(Tagged))) is Tagged
    assert travel(torch.ones(3000, requires_grad=True)).requires_grad
    assert travel(torch.ones(9000)[:3000].requires_grad_()).requires_grad
    tagged = torch.ones(3000)
    tagged.tag = "kept"
    assert travel(tagged).tag == "kept"
    ordered = travel(collections.OrderedDict(b=torch.ones(2000), a=torch.zeros(3)))
    assert list(ordered) == ["b", "a"]


def test_tensors_stay_where_they_are_though_another_device_is_the_default():
    plain = torch.arange(6000.0).view(60, 100)
    batch = [plain, plain.t(), plain.bfloat16(), torch.nn.Parameter(plain.clone()), plain[1], plain.untyped_storage()]
    with torch.device("meta"):  # as torch.set_default_device does
        *tensors, storage = travel(batch)
    assert all(torch.equal(arrived, tensor) for arrived, tensor in zip(tensors, batch, strict=False))
    assert storage.tolist() == plain.untyped_storage().tolist()


def test_a_tensor_with_history_is_refused_in_torchs_words():
    with pytest.raises(RuntimeError, match="Cowardly refusing to serialize non-leaf tensor"):
        travel(torch.ones(3, requires_grad=True) * 2)


@pytest.mark.parametrize("length", [10, 5000])
def test_read_only_arrays_arrive_writable(length):
    array = np.frombuffer(b"a" * length, np.uint8)
    arrived = travel(array)
    assert arrived.flags.writeable
    assert bytes(arrived) == b"a" * length


def test_a_long_stream_does_not_burden_the_message():
    words = [f"word {number}" for number in range(5000)]
    parcel, _ = send(words)
    assert not isinstance(parcel.stream, bytes)
    assert travel(words) == words


@pytest.mark.parametrize("length", [3, 5000])
def test_tensors_with_names_are_left_to_torch_which_refuses_them(monkeypatch, length):
    def refuse(tensor, protocol):
        raise RuntimeError("Named tensors don't support serialization")

    # As in a release of torch that has such tensors.
    monkeypatch.setattr(packing, "has_names", lambda tensor: tensor.shape == (length,))
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", refuse)
    assert torch.equal(travel(torch.ones(length + 1)), torch.ones(length + 1))
    with pytest.raises(RuntimeError, match="Named tensors"):
        travel(torch.ones(length))


def send_rows(columns, ends, holdings=None):
    """Return the pieces, after a pickle of all, and the trainer's leases."""
    pool, used = SlotPool(max_slots=50, max_free=3, free_bytes=0), {}
    pieces = pack_rows(columns, ends, pool, used)
    return pickle.loads(pickle.dumps(pieces)), ship(pool, used, holdings)


@given(
    ends=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    dtypes=st.lists(
        st.sampled_from(["bool", "uint8", "uint16", "int64", "float16", "float32", "complex64"]), max_size=4
    ),
    shape=st.lists(st.sampled_from([0, 1, 3, 200]), max_size=2),
)
def test_batches_that_were_gathered_together_arrive_as_what_each_is(ends, dtypes, shape):
    ends = [0, *itertools.accumulate(ends)]
    generator = np.random.default_rng(0)
    columns = {
        f"{number} {dtype}": generator.integers(0, 2, (ends[-1], *shape)).astype(dtype)
        for number, dtype in enumerate(dtypes)
    }
    pieces, leases = send_rows(columns, ends)
    arrived = [unpack(piece, leases) for piece in pieces]
    for batch, expected in zip(arrived, Gathered(columns, ends).batches(), strict=True):
        assert list(batch) == list(expected)
        for name, tensor in batch.items():
            assert_same(tensor, expected[name])
            tensor.fill_(1)  # it may be written to
    for batch in arrived:  # all of it, and nothing of the others
        assert all(bool((tensor == 1).all()) for tensor in batch.values())


def test_rows_lie_over_the_slot_but_for_few_of_them():
    rows = DIVERT_BYTES // 8
    columns = {"many": np.zeros(2 * rows), "few": np.zeros(2 * rows, np.float32)}
    pieces, leases = send_rows(columns, [0, rows, 2 * rows])
    first, second = (unpack(piece, leases) for piece in pieces)
    apart = second["many"].data_ptr() - first["many"].data_ptr()
    assert apart == DIVERT_BYTES
    few, watch = first["few"], weakref.ref(leases[0].memory)
    del first, second, leases
    assert watch() is None  # who keeps a label does not keep the slot
    assert not few.any()


def test_rows_are_copied_for_a_caller_who_holds_too_much():
    holdings = Holdings()
    held = [np.zeros(1) for _ in range(HELD_SLOTS)]
    holdings.ring.update({Watch(one): 1 for one in held})
    pieces, leases = send_rows({"values": np.zeros((2, DIVERT_BYTES))}, [0, 1, 2], holdings)
    batch, watch = unpack(pieces[0], leases), weakref.ref(leases[0].memory)
    del leases
    assert watch() is None
    assert batch["values"].shape == (1, DIVERT_BYTES)


@pytest.mark.parametrize(
    "column",
    [["a", "b"], np.array(["a", "b"]), np.zeros(2, "datetime64[s]"), np.zeros(2, object)],
    ids=["a list", "strings", "times", "objects"],
)
def test_columns_that_are_no_arrays_of_numbers_travel_batch_by_batch(column):
    numbers = np.zeros(2)
    assert Gathered({"numbers": numbers}, [0, 1, 2]).are_rows
    assert not Gathered({"numbers": numbers, "other": column}, [0, 1, 2]).are_rows


def test_rows_that_do_not_lie_one_after_the_other_arrive_as_they_are():
    columns = {"values": np.arange(2 * 9.0).reshape(2, 9)[:, ::2]}
    pieces, leases = send_rows(columns, [0, 1, 2])
    assert [unpack(piece, leases)["values"].tolist() for piece in pieces] == [[[0, 2, 4, 6, 8]], [[9, 11, 13, 15, 17]]]


def test_rows_for_which_there_is_no_slot_travel_batch_by_batch():
    pool = SlotPool(max_slots=0, max_free=3, free_bytes=0)
    assert pack_rows({"numbers": np.zeros(2)}, [0, 1, 2], pool, {}) is None


def test_columns_are_named_once_for_all_pieces():
    columns = {f"column {number}": np.zeros((16, 100)) for number in range(20)}
    one, _ = send_rows(columns, [0, 16])
    all_pieces, _ = send_rows(columns, list(range(17)))
    assert len(pickle.dumps(all_pieces)) < 2 * len(pickle.dumps(one))

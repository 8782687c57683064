import io
import pickle
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from connectors.errors import BadInputError
from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, image_field, open_dataset
from dataflow.dataset import Dataset
from dataflow.transforms import (
    Cast,
    Draws,
    ImageTransform,
    OnField,
    RandomResizedCrop,
    TokenWindow,
    TransformedDataset,
    over_columns,
)
from dataflow.transforms.callables import generators_put_back, wait_no_more_for
from dataflow.transforms.epoch import reading_epoch


class Numbers:
    """A plain map-style dataset."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> dict:
        return {"number": range(40)[number], "value": np.float64(0)}


def jitter(sample: dict, rng: np.random.Generator) -> dict:
    return {**sample, "value": rng.random()}


def global_jitter(sample: dict) -> dict:
    """As torchvision's: draws from wherever."""
    return {**sample, "value": random.random() + np.random.rand() + torch.rand(1).item()}


class Albumentation:
    """Called as albumentations' are, with generators of its own."""

    def set_random_state(self, generator: np.random.Generator, python: random.Random) -> None:
        self.generator, self.python = generator, python

    def __call__(self, *args, force_apply: bool = False, **data) -> dict:
        assert not args
        target = "image" if "image" in data else "value"
        return {**data, target: self.generator.random() + self.python.random()}


class Module(torch.nn.Module):
    """As torchvision's are; their call takes `*args, **kwargs`."""

    def forward(self, *inputs) -> dict:
        (sample,) = inputs
        return global_jitter(sample)


class ModuleWithGenerator(torch.nn.Module):
    def forward(self, sample: dict, rng: np.random.Generator) -> dict:
        return jitter(sample, rng)


def decorated(function):
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def late_jitter(sample: dict, scale: float = 1.0, rng: np.random.Generator | None = None) -> dict:
    """As scikit-image's `random_noise`: draws from wherever if it is given no generator."""
    return {**sample, "value": scale * np.random.default_rng(rng).random()}


def named_jitter(sample: dict, *, rng: np.random.Generator) -> dict:
    return jitter(sample, rng)


def column_jitter(columns: dict, draws: Draws) -> dict:
    return {**columns, "value": np.array([rng.random() for rng in draws])}


TRANSFORMS = {
    "rng": jitter,
    "rng behind options": late_jitter,
    "rng by name": named_jitter,
    "rng of a partial": partial(late_jitter, scale=2.0),
    "global": global_jitter,
    "keywords": Albumentation(),
    "module": Module(),
    "module with rng": ModuleWithGenerator(),
    "anything": decorated(global_jitter),
    "field": OnField("value", lambda value, rng: rng.random()),
    "field, rng by name": OnField("value", lambda value, *, rng: rng.random()),
    "field, global": OnField("value", lambda value: random.random()),
    "field, keywords": OnField("value", Albumentation()),
    "columns": over_columns(column_jitter),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@given(numbers=st.lists(st.integers(-40, 39), min_size=1, max_size=6), epoch=st.integers(0, 3))
@settings(max_examples=15)
def test_a_sample_is_the_same_in_any_batch_and_another_in_other_epochs(
    name: str, numbers: list[int], epoch: int
) -> None:
    dataset = TransformedDataset(Numbers(), TRANSFORMS[name], seed=9)
    with reading_epoch(epoch):
        batch = [float(sample["value"]) for sample in dataset.__getitems__(numbers)]
        alone = [float(dataset[number]["value"]) for number in numbers]
    with reading_epoch(epoch + 1):
        later = [float(sample["value"]) for sample in dataset.__getitems__(numbers)]
    other = [
        float(one["value"]) for one in TransformedDataset(Numbers(), TRANSFORMS[name], seed=8).__getitems__(numbers)
    ]
    assert batch == alone
    assert not set(batch) & set(later)
    assert not set(batch) & set(other)
    assert len(set(batch)) == len({number % 40 for number in numbers})


def states() -> tuple:
    """Where the global generators are."""
    return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_global_generators_are_as_if_nothing_had_been_drawn(name: str) -> None:
    before = states()
    TransformedDataset(Numbers(), TRANSFORMS[name]).__getitems__([1, 2])
    assert states() == before


def test_threads_that_overlap_leave_the_global_generators_as_the_first_found_them() -> None:
    before = states()
    first, second = generators_put_back(), generators_put_back()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        seed_all(1)
        other.submit(second.__enter__).result()
        seed_all(2)
        one.submit(first.__exit__, None, None, None).result()
        assert states() != before
        other.submit(second.__exit__, None, None, None).result()
    assert states() == before


def test_a_thread_that_hangs_is_not_waited_for_and_does_not_seed_again() -> None:
    hangs, may_go_on = threading.Event(), threading.Event()

    def hang(sample: dict) -> dict:
        hangs.set()
        assert may_go_on.wait(60)
        return sample

    before = states()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(TransformedDataset(Numbers(), hang).__getitems__, [1, 2])
        assert hangs.wait(60)
        (thread,) = pool._threads
        wait_no_more_for(thread.ident)
        assert states() == before
        may_go_on.set()
        with pytest.raises(SystemExit):
            made.result()
    assert states() == before


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_a_transform_that_reads_another_transformed_sample_goes_on_with_its_own_numbers() -> None:
    other = TransformedDataset(Numbers(), global_jitter)

    def mixed(sample: dict) -> dict:
        drawn = random.random()
        return {**sample, "value": (drawn, other[7]["value"], random.random())}

    def drawn(sample: dict) -> dict:
        return {**sample, "value": (random.random(), None, random.random())}

    first, partner, last = TransformedDataset(Numbers(), mixed)[3]["value"]
    assert (first, None, last) == TransformedDataset(Numbers(), drawn)[3]["value"]
    assert partner == other[7]["value"]


FORKED_BESIDE_A_THREAD = """
    import os, random, threading
    from dataflow.transforms.callables import generators_put_back

    inside, may_leave = threading.Event(), threading.Event()

    def seed():
        with generators_put_back():
            inside.set()
            may_leave.wait()

    thread = threading.Thread(target=seed)
    thread.start()
    inside.wait()
    if not (child := os.fork()):
        before = random.getstate()
        with generators_put_back():
            random.random()
        os._exit(random.getstate() != before)
    may_leave.set()
    thread.join()
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_puts_back_what_it_found_though_a_thread_of_its_parent_was_seeding() -> None:
    script = textwrap.dedent(FORKED_BESIDE_A_THREAD)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=90)


class Meeting(Albumentation):
    """Draws when as many threads as it says have set its generators."""

    threads = threading.Barrier(2, timeout=60)

    def __call__(self, *args, force_apply: bool = False, **data) -> dict:
        self.threads.wait()
        return super().__call__(*args, force_apply=force_apply, **data)


@pytest.mark.parametrize("transform", [Meeting(), OnField("value", Meeting())], ids=["sample", "field"])
def test_threads_do_not_share_the_generators_that_a_transform_has_of_its_own(transform) -> None:
    dataset = pickle.loads(pickle.dumps(TransformedDataset(Numbers(), transform)))
    alone = TransformedDataset(Numbers(), TRANSFORMS["keywords"])
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(dataset.__getitem__, [3, 4]))
    assert together == [alone[3], alone[4]]


def epochs(loader: DataLoader, count: int) -> Iterator[dict[int, float]]:
    for _ in range(count):
        batches = list(loader)
        numbers = torch.cat([batch["number"] for batch in batches]).tolist()
        yield dict(zip(numbers, torch.cat([batch["value"] for batch in batches]).tolist(), strict=True))


@pytest.mark.parametrize("transform", [global_jitter, over_columns(column_jitter)])
def test_neither_workers_nor_batches_nor_order_change_a_sample(transform) -> None:
    dataset = TransformedDataset(Numbers(), transform)
    expected = list(epochs(DataLoader(dataset, batch_size=4), 2))
    assert expected[0] != expected[1]
    assert list(epochs(DataLoader(dataset, batch_size=7, shuffle=True, num_workers=2), 2)) == expected
    persistent = DataLoader(dataset, batch_size=5, num_workers=1, persistent_workers=True)
    assert list(epochs(persistent, 2)) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_restarts_do_not_change_a_sample(num_workers: int) -> None:
    dataset = TransformedDataset(Numbers(), jitter)
    expected = list(epochs(DataLoader(dataset, batch_size=4), 2))[1]
    found: dict[int, float] = {}
    for rank in (0, 1):
        sampler = ElasticBatchSampler(dataset, 8, shuffle="full", rank=rank, world_size=2)
        sampler.set_epoch(1)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)
        batches = iter(loader)
        first = next(batches)
        found |= dict(zip(first["number"].tolist(), first["value"].tolist(), strict=True))
        fresh_sampler = ElasticBatchSampler(dataset, 8, shuffle="full", rank=rank, world_size=2)
        fresh = DataLoader(dataset, batch_sampler=fresh_sampler, num_workers=num_workers)
        fresh.load_state_dict(loader.state_dict())
        found |= next(epochs(fresh, 1))
        del batches
    assert found == expected


@pytest.mark.parametrize("batches_before", [3, 10])
def test_a_loader_of_torchs_samplers_goes_on_in_its_epoch(batches_before: int) -> None:
    dataset = TransformedDataset(Numbers(), jitter)
    loader = DataLoader(dataset, batch_size=4)
    expected = list(epochs(loader, 3))
    again = DataLoader(dataset, batch_size=4)
    assert next(epochs(again, 1)) == expected[0]
    batches = iter(again)
    for _ in range(batches_before):
        next(batches)
    fresh = DataLoader(dataset, batch_size=4)
    fresh.load_state_dict(again.state_dict())
    rest = list(epochs(fresh, 1))
    if batches_before == 10:  # the epoch was over
        assert rest == expected[2:]
    else:
        assert rest == [dict(list(expected[1].items())[12:])]
        assert next(epochs(fresh, 1)) == expected[2]


def test_steps_of_samples_and_of_columns_follow_each_other() -> None:
    steps = [jitter, over_columns(column_jitter), lambda sample: {**sample, "twice": 2 * sample["value"]}]
    dataset = TransformedDataset(Numbers(), steps)
    for sample in (dataset[3], dataset.__getitems__([5, 3])[1]):
        assert sample["number"] == 3
        assert sample["twice"] == 2 * sample["value"] != 0


def native(folder: Path) -> Dataset:
    schema = pa.schema([image_field("image"), pa.field("tokens", pa.list_(pa.uint16())), pa.field("label", pa.int64())])
    with ShardWriter(folder, schema) as writer:
        for number in range(12):
            file = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            writer.write({"image": file.getvalue(), "tokens": list(range(number, number + 9)), "label": number})
    return open_dataset(folder, encoded=["image"])


def test_native_columns_go_straight_into_the_batch(tmp_path: Path) -> None:
    steps = [ImageTransform(RandomResizedCrop(8), flip=0.5), TokenWindow(5), Cast("tokens", "int64")]
    dataset = TransformedDataset(native(tmp_path), steps)
    asked = []

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        asked.append(name)
        return np.zeros(shape, dtype)

    columns = dataset.get_batch([4, 2], allocate)
    assert sorted(asked) == ["image", "label", "tokens"]  # once each: nothing is written twice
    assert (columns["image"].shape, columns["image"].dtype) == ((2, 3, 8, 8), np.float32)
    assert columns["tokens"].dtype == np.int64
    for num_workers in (0, 1):
        loader = DataLoader(dataset, batch_size=2, sampler=[4, 2, 7, 1], num_workers=num_workers)
        first = next(iter(loader))
        assert np.array_equal(first["image"].numpy(), columns["image"])
        assert np.array_equal(first["tokens"].numpy(), columns["tokens"])
        assert first["label"].tolist() == [4, 2]
    alone = dataset[2]
    assert np.array_equal(alone["image"], columns["image"][1])
    assert np.array_equal(alone["tokens"], columns["tokens"][1])


@pytest.mark.parametrize("dtype", ["float64", "int16", "int64", "complex128"])
def test_a_cast_of_numbers_gives_what_its_samples_are_alone(tmp_path: Path, dtype: str) -> None:
    steps = [Cast("label", dtype)]
    dataset, numbers = TransformedDataset(native(tmp_path), steps), [7, 0, 11, 7]
    asked = []

    def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        asked.append((name, dtype))
        return np.zeros(shape, dtype)

    labels = dataset.get_batch(numbers, allocate)["label"]
    assert [dtype for name, dtype in asked if name == "label"] == [np.dtype(steps[0].dtype)]
    assert labels.dtype == steps[0].dtype
    assert labels.tolist() == [dataset[number]["label"] for number in numbers] == numbers


def test_a_number_that_does_not_fit_its_cast_is_refused_and_never_wraps_round(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, pa.schema([("label", pa.int64())])) as writer:
        writer.write({"label": 300})
    with pytest.raises(BadInputError, match="from 300 to 300, does not fit int8"):
        TransformedDataset(open_dataset(tmp_path), Cast("label", "int8")).get_batch([0])


def test_a_step_before_a_cast_sees_what_the_dataset_holds(tmp_path: Path) -> None:
    def halve(columns: dict, draws: Draws) -> dict:
        return {**columns, "label": columns["label"] // 2 if columns["label"].dtype == np.int64 else None}

    dataset = TransformedDataset(native(tmp_path), [over_columns(halve), Cast("label", "float64")])
    label = dataset.get_batch([7, 4])["label"]
    assert (label.tolist(), label.dtype) == ([3.0, 2.0], np.float64)


def test_two_casts_of_a_field_follow_each_other(tmp_path: Path) -> None:
    dataset = TransformedDataset(native(tmp_path), [Cast("label", "float32"), Cast("label", "float64")])
    assert dataset.get_batch([3, 1])["label"].dtype == np.float64
    with pytest.raises(BadInputError, match="does not fit"):
        TransformedDataset(native(tmp_path / "other"), [Cast("label", "int8"), Cast("label", "bool")]).get_batch([3])


def test_only_columns_of_native_datasets_take_the_fast_road(tmp_path: Path) -> None:
    assert not hasattr(TransformedDataset(native(tmp_path), jitter), "get_batch")
    assert not hasattr(TransformedDataset(Numbers(), over_columns(column_jitter)), "get_batch")


def test_it_stands_in_for_its_dataset(tmp_path: Path) -> None:
    dataset = native(tmp_path)
    transformed = pickle.loads(pickle.dumps(TransformedDataset(dataset, Cast("label", "int32"))))
    assert len(transformed) == 12
    assert transformed.fingerprint == dataset.fingerprint
    assert transformed.index.num_blocks == dataset.index.num_blocks
    assert transformed.reader is transformed.dataset.reader
    assert transformed.buffer_bytes == dataset.buffer_bytes is not None
    assert not hasattr(TransformedDataset(Numbers(), jitter), "fingerprint")


def test_only_casts_keep_a_dataset_whose_batches_can_be_made_together(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "rows", pa.schema([("label", pa.int64())])) as writer:
        writer.write({"label": 3})
    native(tmp_path / "images")
    cast, other = Cast("label", "int32"), over_columns(column_jitter)
    kept = [
        [TransformedDataset(dataset, steps).is_rowwise for steps in (cast, [cast, cast], other, [cast, other], jitter)]
        for dataset in (open_dataset(tmp_path / "rows"), open_dataset(tmp_path / "images"), Numbers())
    ]
    assert kept == [[True, True, False, False, False], [False] * 5, [False] * 5]


def test_the_seed_is_nought_where_none_is_given() -> None:
    assert TransformedDataset(Numbers(), jitter)[3] == TransformedDataset(Numbers(), jitter, seed=0)[3]


def test_numbers_that_count_from_the_end_are_the_same_samples() -> None:
    first, again, last, once_more = TransformedDataset(Numbers(), jitter).__getitems__([0, -40, 39, -1])
    assert first == again != last == once_more


def test_no_numbers_are_no_samples() -> None:
    assert TransformedDataset(Numbers(), jitter).__getitems__([]) == []


def test_what_are_no_numbers_of_samples_is_refused() -> None:
    class Packs(Numbers):
        def __getitems__(self, packs: list[list[int]]) -> list[dict]:
            return [self[first] for first, *_ in packs]

    with pytest.raises(BadInputError, match=r"numbers of samples, got an array of shape \(1, 2\)"):
        TransformedDataset(Packs(), jitter).__getitems__([[1, 2]])


def test_errors_name_the_sample() -> None:
    def fail(sample: dict, rng: np.random.Generator) -> dict:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        TransformedDataset(Numbers(), fail).__getitems__([3])
    assert caught.value.__notes__ == ["in a transform of sample 3"]
    with pytest.raises(IndexError):
        TransformedDataset(Numbers(), jitter)[40]
    with pytest.raises(TypeError, match="must be callable, got int"):
        TransformedDataset(Numbers(), [3])
    with pytest.raises(BadInputError, match="mappings with the same fields"):
        TransformedDataset([1, 2], over_columns(column_jitter))[0]


def test_errors_name_the_shard_of_the_sample(tmp_path: Path) -> None:
    dataset = native(tmp_path)
    named = re.escape(f"sample 7 in file://{tmp_path}/shard-00000.arrow")
    with pytest.raises(BadInputError, match=f"^{named}: field 'tokens' has 9 tokens"):
        TransformedDataset(dataset, TokenWindow(10)).get_batch([-5])

    def fail(sample: dict, rng: np.random.Generator) -> dict:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        TransformedDataset(dataset, fail)[7]
    assert re.fullmatch(f"in a transform of {named}", *caught.value.__notes__)

    class Repeated(Numbers):
        index = dataset.index  # which has other samples

    with pytest.raises(ValueError, match="no") as caught:
        TransformedDataset(Repeated(), fail)[20]
    assert caught.value.__notes__ == ["in a transform of sample 20"]


def test_an_encoded_field_must_be_an_image(tmp_path: Path) -> None:
    native(tmp_path)
    assert isinstance(open_dataset(tmp_path, encoded=["image"])[0]["image"], bytes)
    assert isinstance(open_dataset(tmp_path)[0]["image"], np.ndarray)
    with pytest.raises(BadInputError, match="encoded names 'label', which is no media field"):
        open_dataset(tmp_path, encoded=["label"])

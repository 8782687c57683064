"""The store does what zarr's own suite asks of one, and an array read through it is the array."""

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import zarr
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.testing.store import StoreTests

from cache.testing import running_server
from cache.zarr_store import ZarrStore
from connectors.errors import BadInputError


class TestZarrStore(StoreTests[ZarrStore, cpu.Buffer]):
    store_cls = ZarrStore
    buffer_cls = cpu.Buffer

    @pytest.fixture
    def store_kwargs(self, tmp_path):
        return {"url": str(tmp_path)}

    @pytest.fixture(autouse=True)
    def _places(self, tmp_path):
        self.root = tmp_path

    async def set(self, store: ZarrStore, key: str, value: Buffer) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())

    async def get(self, store: ZarrStore, key: str) -> Buffer:
        return self.buffer_cls.from_bytes((self.root / key).read_bytes())

    def test_store_repr(self, store):
        assert repr(store) == f"ZarrStore('file://{self.root}')"

    def test_store_supports_writes(self, store):
        assert store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing


def write_array(path, **options) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 1000, (300, 200))
    array = zarr.create_array(ZarrStore(path, **options), shape=values.shape, chunks=(64, 64), dtype=values.dtype)
    array[:] = values
    return values


def test_an_array_is_written_and_read(tmp_path):
    values = write_array(tmp_path / "array")
    found = zarr.open_array(ZarrStore(tmp_path / "array", read_only=True), mode="r")
    assert np.array_equal(found[:], values)
    assert np.array_equal(found[10:70, 63:65], values[10:70, 63:65])
    assert np.array_equal(zarr.open_array(tmp_path / "array", mode="r")[:], values)


def test_a_store_that_was_used_works_in_a_forked_child(tmp_path):
    write_array(tmp_path / "array")
    store = ZarrStore(tmp_path / "array", read_only=True)
    metadata = store.get_sync("zarr.json")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(ZarrStore.get_sync, (store, "zarr.json")) == metadata
        pool.close()
        pool.join()


def test_a_store_that_was_used_works_in_another_process(tmp_path):
    values = write_array(tmp_path / "array")
    store = ZarrStore(tmp_path / "array", read_only=True)
    assert store.get_sync("zarr.json") is not None
    program = """
import pickle, sys, zarr
print(int(zarr.open_array(pickle.load(sys.stdin.buffer), mode="r")[:].sum()))
"""
    answer = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(store), stdout=-1, check=True)
    assert int(answer.stdout) == values.sum()


def test_through_a_server_each_chunk_comes_from_the_origin_once(tmp_path):
    values = write_array(tmp_path / "array")
    with running_server() as running:
        store = ZarrStore(tmp_path / "array", cache=running.address, max_age_s=3600, read_only=True)
        for _ in range(3):
            assert np.array_equal(zarr.open_array(store, mode="r")[:], values)
        stats = running.server.stats()
        chunks = sum(1 for _ in (tmp_path / "array" / "c").rglob("*") if _.is_file())
        # Metadata and chunks, each looked up once and fetched once. zarr looks for older metadata too.
        assert stats["origin"]["bytes"] == sum(
            path.stat().st_size for path in (tmp_path / "array").rglob("*") if path.is_file()
        )
        assert stats["origin"]["requests"] >= 2 * chunks
        assert stats["blocks_requested"] == 3 * (chunks + 1)
        store.close()


async def test_a_key_that_could_leave_the_store_is_refused(tmp_path):
    store = ZarrStore(tmp_path / "in")
    (tmp_path / "out").write_bytes(b"x")
    with pytest.raises(BadInputError):
        await store.get("../out", default_buffer_prototype())


def test_without_zarr_the_error_names_the_extra():
    program = "import sys; sys.modules['zarr'] = None; import cache.zarr_store"
    found = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert "pip install 'tiered-dataflow[zarr]'" in found.stderr

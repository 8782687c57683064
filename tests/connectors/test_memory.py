import pytest

from connectors import open_store
from connectors._memory import _Object, _stores, _versions
from connectors.testing.stores import StoreTests


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self, request):
        yield open_store(f"memory://{id(request)}")
        del _stores[f"memory://{id(request)}"]

    def peek(self, store, key):
        found = _stores[store.url].get(key)
        return found and found.data

    def poke(self, store, key, data):
        _stores[store.url][key] = _Object(data, str(next(_versions)))


async def test_stores_of_one_name_share_objects_and_others_do_not():
    await open_store("memory://shared").put("set/key", b"x")
    assert await open_store("memory://shared/set").get("key") == b"x"
    assert [meta async for meta in open_store("memory://not-shared").list()] == []

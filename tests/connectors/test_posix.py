from pathlib import Path

import pytest

from connectors import open_store, split_uri
from connectors.testing.stores import StoreTests


class TestPosixStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return open_store(tmp_path)

    def peek(self, store, key):
        path = _path(store, key)
        return path.read_bytes() if path.is_file() else None

    def poke(self, store, key, data):
        path = _path(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _path(store, key) -> Path:
    return Path("/" + split_uri(store.url)[1]) / key

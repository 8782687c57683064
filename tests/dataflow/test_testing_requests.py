"""Shards instead of small files: how many requests a store is spared."""

import pytest

from dataflow.testing.requests import count_requests


@pytest.fixture(scope="module")
def requests() -> dict[str, float]:
    return count_requests(2000)


@pytest.mark.parametrize("done", ["written", "read"])
def test_shards_ask_a_store_a_hundred_times_less_than_files(requests: dict[str, float], done: str) -> None:
    assert requests[f"files, {done}"] >= 1000
    assert 0 < 100 * requests[f"shards, {done}"] <= requests[f"files, {done}"]

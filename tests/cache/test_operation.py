"""Operators' requests over the wire: who may, what they do, and that names stay with those who may read them."""

import os
from typing import cast

import pytest

from cache.client import CacheClient
from cache.config import CacheConfig, JobConfig, PrefixConfig, TierConfig
from cache.engine import Engine
from cache.frames import Done
from cache.keys import BlockRef
from cache.operation import Operation
from cache.orders import AskUsage, EvictPrefix, Held, PinPrefix, PinsKept, Removed, ResizeTier, UnpinPrefix
from cache.rights import AccessConfig, PrefixRule, Rights
from cache.testing import running_server
from connectors.errors import BadInputError, NotFoundError, PermissionDeniedError

STRANGER = 4_000_001


@pytest.fixture
def strange(monkeypatch):
    """Every client is the stranger, as far as the server can tell."""
    monkeypatch.setattr("cache.server.peer", lambda connection: (os.getpid(), STRANGER))


@pytest.fixture
def urls(tmp_path) -> dict[str, str]:
    for name in ("public", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(name.encode() * 1000)
    return {name: f"file://{tmp_path}/{name}" for name in ("public", "secret")}


def refs(urls: dict[str, str], name: str) -> list[BlockRef]:
    path = f"{urls[name]}/x".removeprefix("file://")
    found = os.stat(path)
    return [BlockRef(f"{urls[name]}/x", f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}", 0, found.st_size)]


def client_of(running) -> CacheClient:
    return CacheClient(running.address)


def test_operators_see_pin_evict_and_resize(urls) -> None:
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running:
        client = client_of(running)
        client.read_blocks(refs(urls, "public") + refs(urls, "secret"))
        held = client.ask(AskUsage(urls["public"], 0, ""), Held)
        assert [(row.blocks, row.size_bytes) for row in held.rows] == [({"ram": 1}, {"ram": 8192})]
        assert client.ask(PinPrefix(urls["public"], 8192, None), PinsKept) == PinsKept(survive=False)
        assert [pin["prefix"] for pin in client.stats()["retention"]["pins"]] == [urls["public"]]
        removed = client.ask(EvictPrefix("file:///"), Removed).evicted
        assert (removed.blocks, removed.pinned) == (1, 1)
        client.ask(UnpinPrefix(urls["public"]), PinsKept)
        with pytest.raises(NotFoundError, match="not pinned"):
            client.ask(UnpinPrefix(urls["public"]), PinsKept)
        with pytest.raises(BadInputError, match="pins may take"):
            client.ask(PinPrefix(urls["public"], 1 << 20, None), PinsKept)
        with pytest.raises(BadInputError, match="names no object"):
            client.ask(EvictPrefix(""), Removed)
        client.ask(ResizeTier("ram", 4096, 7), Done)
        (tier,) = client.stats()["tiers"]
        assert (tier["capacity_bytes"], tier["capacity_blocks"], tier["blocks"]) == (4096, 7, 0)
        with pytest.raises(BadInputError, match="no tier 'nvme'"):
            client.ask(ResizeTier("nvme", 4096, None), Done)
        client.close()


@pytest.mark.parametrize("change", [PinPrefix("/x", 0, None), UnpinPrefix("/x"), EvictPrefix("/x")])
@pytest.mark.parametrize("named", [True, False])
def test_only_operators_change_what_is_kept(strange, change, named: bool) -> None:
    access = AccessConfig(allowed_uids=(STRANGER,), operator_uids=(STRANGER,) if named else ())
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),)), access=access) as running:
        client = client_of(running)
        expected = NotFoundError if isinstance(change, UnpinPrefix) else None
        if not named:
            with pytest.raises(PermissionDeniedError, match="4000001 may not change"):
                client.ask(change, Done)
            with pytest.raises(PermissionDeniedError, match="operator_uids"):
                client.ask(ResizeTier("ram", 0, None), Done)
            assert client.stats()["tiers"][0]["capacity_bytes"] == 1 << 20
        elif expected is not None:
            with pytest.raises(expected):
                client.ask(change, PinsKept)
        else:
            client.ask(change, PinsKept if isinstance(change, PinPrefix) else Removed)
        client.close()


def test_who_may_not_read_something_does_not_hear_of_it(urls, strange) -> None:
    access = AccessConfig(allowed_uids=(STRANGER,), rules=(PrefixRule(urls["secret"]),))
    rules = tuple(PrefixConfig(url, quota_bytes=1 << 20) for url in urls.values())
    config = CacheConfig((TierConfig("ram", 1 << 20),), prefixes=rules)
    with running_server(config, access=access) as running:
        client = client_of(running)
        client.read_blocks(refs(urls, "public"))
        # As an operator would have.
        engine = running.server.engine
        for prefix in urls.values():
            engine._catalogue.note(prefix.encode()[-16:], f"{prefix}/x", "")
            engine._stack.levels[0].members[0].ledger.take_over([(prefix.encode()[-16:], 100)], unwanted=set())
        rows = client.ask(AskUsage("file:///", 0, ""), Held).rows
        assert [sum(row.blocks.values()) for row in rows] == [2]
        with pytest.raises(PermissionDeniedError, match="secret"):
            client.ask(AskUsage(urls["secret"], 0, ""), Held)
        quotas = [quota["name"] for quota in client.stats()["tiers"][0]["quotas"]]
        assert quotas == [urls["public"]]
        client.close()


def test_names_stay_hidden_in_the_numbers_of_each_directory_too() -> None:
    def tier(**more: object) -> dict[str, object]:
        return {
            "name": "nvme",
            "quotas": [{"name": "s3://b/open"}, {"name": "s3://b/secret"}, {"name": "job a"}],
            **more,
        }

    stats = {"tiers": [tier(directories=[tier(path="/0"), tier(path="/1")])], "retention": {"pins": []}}
    rights = Rights(AccessConfig(rules=(PrefixRule("s3://b/secret"),)), STRANGER)
    (seen,) = Operation(cast("Engine", None), rights).visible(stats)["tiers"]
    for one in (seen, *seen["directories"]):
        assert [quota["name"] for quota in one["quotas"]] == ["s3://b/open", "job a"]
    assert [one["path"] for one in seen["directories"]] == ["/0", "/1"]


def test_a_job_says_its_name_when_it_connects(urls, monkeypatch) -> None:
    config = CacheConfig((TierConfig("ram", 1 << 20),), jobs=(JobConfig("tune-*", 8192),))
    with running_server(config) as running:
        monkeypatch.setenv("DATAFLOW_JOB", "tune-7")
        client = client_of(running)
        client.read_blocks(refs(urls, "public") + refs(urls, "secret"))
        (tier,) = client.stats()["tiers"]
        assert tier["quotas"] == [{"name": "job tune-7", "limit_bytes": 8192, "used_bytes": 8192}]
        assert tier["blocks"] == 1
        client.close()

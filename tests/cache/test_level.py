"""Several directories share a tier's blocks by weight; a lost one moves only its share, and nothing placed is lost."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from cache.config import CacheConfig, DirectoryConfig, TierConfig
from cache.keys import BlockRef
from cache.level import place
from cache.testing import FaultySystem, check_directory, check_limits, make_key, read_blocks, running_engine
from connectors.errors import BadInputError
from connectors.registry import open_store

BLOCK = 4000
SIZE = 4096
NUM_BLOCKS = 60


def test_each_place_gets_blocks_by_its_weight() -> None:
    weights = [("a", 1.0), ("b", 2.0), ("c", 5.0)]
    counts = Counter(place(make_key(number), weights) for number in range(16_000))
    assert [round(counts[number] / 2000, 1) for number in range(3)] == [1.0, 2.0, 5.0]


@given(
    st.dictionaries(st.text(max_size=9), st.floats(0.1, 100), min_size=2, max_size=6),
    st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50),
    st.data(),
)
def test_a_lost_place_moves_only_its_own_blocks(weights: dict[str, float], keys: list[bytes], data) -> None:
    lost = data.draw(st.sampled_from(sorted(weights)))
    before, after = list(weights.items()), [item for item in weights.items() if item[0] != lost]
    for key in keys:
        was = before[place(key, before)][0]
        assert was == lost or after[place(key, after)][0] == was
        assert before[::-1][place(key, before[::-1])][0] == was, "the order of the places does not matter"


def tier(path: Path, names: str = "ab", weights: tuple[float, ...] = (1, 3), **settings: object) -> TierConfig:
    directories = [DirectoryConfig(str(path / name), weight) for name, weight in zip(names, weights, strict=True)]
    return TierConfig("disk", 400 * SIZE, medium="nvme", directories=tuple(directories), **settings)


async def read_all(config: CacheConfig, *, passes: int = 1, system: object = os) -> dict:
    """Read one object's blocks through a new engine, each after the other; return the engine's last statistics."""
    store = open_store("memory://level")
    data = bytes(range(250)) * (BLOCK * NUM_BLOCKS // 250)
    await store.put("x", data)
    refs = [
        BlockRef("memory://level/x", "digest", at, BLOCK, crc32c(data[at : at + BLOCK]))
        for at in range(0, len(data), BLOCK)
    ]
    async with running_engine(config, open_store=lambda root: store, system=system) as engine:
        for _ in range(passes):
            for at in range(0, NUM_BLOCKS, 10):
                for ref, result in zip(refs[at : at + 10], await read_blocks(engine, refs[at : at + 10]), strict=True):
                    assert result == data[ref.offset : ref.offset + BLOCK]
                await engine.settle()
                check_limits(engine.stats())
        return engine.stats()


async def test_directories_share_a_tier_and_all_is_found_again(tmp_path: Path) -> None:
    config = CacheConfig((tier(tmp_path),), ring_bytes=0)
    stats = await read_all(config, passes=2)
    (disk,) = stats["tiers"]
    assert (disk["blocks"], disk["hits"], disk["capacity_bytes"]) == (60, 60, 400 * SIZE)
    counts = [one["blocks"] for one in disk["directories"]]
    assert sum(counts) == 60
    assert counts[1] > counts[0] > 0
    again = await read_all(CacheConfig((tier(tmp_path, weights=(3, 1)),), ring_bytes=0))
    assert again["origin"]["requests"] == 0, "what was placed under other weights is found where it is"


async def test_each_directory_keeps_its_own_limits(tmp_path: Path) -> None:
    directories = (
        DirectoryConfig(str(tmp_path / "a"), capacity_bytes=5 * SIZE),
        DirectoryConfig(str(tmp_path / "b"), capacity_blocks=7),
    )
    config = CacheConfig((TierConfig("disk", 40 * SIZE, medium="nvme", directories=directories),), ring_bytes=0)
    (disk,) = (await read_all(config, passes=2))["tiers"]
    assert [one["blocks"] for one in disk["directories"]] == [5, 7]
    check_directory(tmp_path / "a", capacity_bytes=5 * SIZE)
    check_directory(tmp_path / "b", capacity_bytes=20 * SIZE, capacity_blocks=7)


async def test_the_share_of_a_directory_that_is_lost_goes_to_the_others(tmp_path: Path) -> None:
    def before(name: str) -> None:
        raise AssertionError

    await read_all(CacheConfig((tier(tmp_path, weights=(1, 1)),), ring_bytes=0))
    kept = len(check_directory(tmp_path / "a", capacity_bytes=400 * SIZE))
    lost = len(check_directory(tmp_path / "b", capacity_bytes=400 * SIZE))
    assert kept + lost == NUM_BLOCKS

    class LostDirectory(FaultySystem):
        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)

            def call(*args: object) -> object:
                if args and isinstance(args[0], str) and args[0].startswith(str(tmp_path / "b")):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*args)

            return call

    stats = await read_all(
        CacheConfig((tier(tmp_path, weights=(1, 1)),), ring_bytes=0), passes=3, system=LostDirectory(before)
    )
    (disk,) = stats["tiers"]
    a, b = disk["directories"]
    assert (a["state"], disk["state"]) == ("normal", b["state"])
    assert b["state"] != "normal"
    assert a["blocks"] > kept, "it takes over"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "/x", "directories": (DirectoryConfig("/y"),)}, "not both"),
        ({"directories": (DirectoryConfig("/y", capacity_bytes=11),)}, "more than"),
        ({"directories": (DirectoryConfig("/y"), DirectoryConfig("/y"))}, "same path"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        CacheConfig((TierConfig("disk", 10, medium="nvme", **settings),))


def test_a_configuration_with_directories_survives_json_and_reads_from_toml(tmp_path: Path) -> None:
    config = CacheConfig((tier(tmp_path),))
    assert CacheConfig.from_json(config.to_json()) == config
    file = tmp_path / "cache.toml"
    file.write_text(
        '[[tiers]]\nname = "disk"\nmedium = "nvme"\ncapacity_bytes = 1638400\n'
        f'[[tiers.directories]]\npath = "{tmp_path}/a"\n[[tiers.directories]]\npath = "{tmp_path}/b"\nweight = 3\n'
    )
    assert CacheConfig.from_toml(file) == config
    assert [place.capacity_bytes for place in config.tiers[0].places] == [100 * SIZE, 300 * SIZE]
    file.write_text(file.read_text().replace("weight", "wait"))
    with pytest.raises(BadInputError, match="'wait'"):
        CacheConfig.from_toml(file)

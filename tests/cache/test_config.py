"""The configuration is checked where it is written, and survives every way it travels."""

import os

import pytest

from cache.config import CacheConfig, DirectoryConfig, JobConfig, PrefixConfig, TierConfig
from cache.daemon_config import DaemonConfig
from connectors.errors import BadInputError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "Ring!"}, "Ring!"),
        ({"name": "ring"}, "'ring'"),
        ({"capacity_bytes": -1}, "-1"),
        ({"capacity_blocks": -2}, "-2"),
        ({"medium": "tape", "path": "x"}, "tape"),
        ({"policy": "fifo"}, "fifo"),
        ({"medium": "nvme"}, "path"),
        ({"path": ""}, "path"),
        ({"path": "~nobody-of-this-name/cache"}, "nobody-of-this-name"),
        ({"path": "/a\0b"}, "NUL"),
        ({"path": "/a/\udcff"}, r"'/a/\\udcff' is not UTF-8"),
    ],
)
def test_a_tier_that_cannot_be_names_the_value(settings: dict, named: str) -> None:
    with pytest.raises(BadInputError, match=named):
        TierConfig(**({"name": "disk", "capacity_bytes": 1} | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"ring_bytes": -1},
        {"max_inflight_bytes": 0},
        {"max_inflight_requests": 0},
        {"tiers": [TierConfig("a", 1), TierConfig("a", 2)]},
        {"tiers": [TierConfig("a", 1, path="x"), TierConfig("b", 2, path="./x")]},
    ],
)
def test_a_cache_that_cannot_be_is_refused(settings: dict) -> None:
    with pytest.raises(BadInputError):
        CacheConfig(**settings)


def test_a_relative_path_keeps_its_meaning_in_another_working_directory() -> None:
    assert TierConfig("disk", 1, path="cache").path == os.path.abspath("cache")


def test_a_directory_is_a_disk_unless_it_is_called_memory() -> None:
    several = (DirectoryConfig("/a"), DirectoryConfig("/b"))
    disks = [TierConfig("disk", 1, path="/a"), TierConfig("disk", 1, directories=several)]
    assert [tier.medium for tier in disks] == ["nvme", "nvme"]
    assert TierConfig("ram", 1, path="/dev/shm/a", medium="ram").medium == TierConfig("ram", 1).medium == "ram"


def test_json_gives_back_the_same_configuration() -> None:
    config = CacheConfig((TierConfig("ram", 5, policy="lru"), TierConfig("disk", 7, "/x", 9, "hdd")), ring_bytes=3)
    assert CacheConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("read", [CacheConfig.from_toml, DaemonConfig.from_toml])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, read) -> None:
    file = tmp_path / "cache.toml"
    file.write_bytes("# größer".encode("latin-1"))
    with pytest.raises(BadInputError, match=f"cannot read the cache configuration {file}"):
        read(file)


def test_toml_gives_the_same_configuration(tmp_path) -> None:
    file = tmp_path / "cache.toml"
    file.write_text('ring_bytes = 3\n[[tiers]]\nname = "disk"\ncapacity_bytes = 7\npath = "/x"\nmedium = "nvme"\n')
    assert CacheConfig.from_toml(file) == CacheConfig((TierConfig("disk", 7, "/x", medium="nvme"),), ring_bytes=3)


def test_sizes_in_toml_may_have_units_wherever_they_stand(tmp_path) -> None:
    file = tmp_path / "cache.toml"
    file.write_text("""
ring_bytes = "1.5KiB"
max_inflight_bytes = "64M"
tiers = [{name = "disk", capacity_bytes = "1TiB", directories = [{path = "/x", capacity_bytes = "2 GiB"}]}]
prefixes = [{prefix = "s3://b", quota_bytes = "3B"}]
jobs = [{name = "*", quota_bytes = "0"}]
""")
    assert CacheConfig.from_toml(file) == CacheConfig(
        (TierConfig("disk", 1 << 40, directories=(DirectoryConfig("/x", capacity_bytes=2 << 30),)),),
        ring_bytes=1536,
        max_inflight_bytes=64 << 20,
        prefixes=(PrefixConfig("s3://b", quota_bytes=3),),
        jobs=(JobConfig("*", 0),),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ring_bites = 1", "ring_bites"),
        ('[[tiers]]\nname="a"\ncapacity_bytes=1\nsize=3', "size"),
        ('[[tiers]]\nname="a"\ncapacity_bytes="big"', "cache.toml: capacity_bytes: 'big' is not a size; write 64MiB"),
        ('[[tiers]]\nname="a"\ncapacity_bytes=1.5', "capacity_bytes"),
        ('ring_bytes = "8388608TiB"', r"ring_bytes must be below 2\*\*63"),
        ('max_inflight_requests = "1KiB"', "max_inflight_requests"),
        ('[[tiers]]\nname="a"', "capacity_bytes"),
        ("tiers = 3", "tiers"),
        ("ring_bytes = ", "cache.toml"),
        ("ring_bytes = 9223372036854775808", r"ring_bytes must be below 2\*\*63"),
        ('[[jobs]]\nname = "a"\nquota_bytes = 99999999999999999999', r"quota_bytes must be below 2\*\*63"),
    ],
)
def test_a_wrong_file_names_what_is_wrong(tmp_path, text: str, named: str) -> None:
    file = tmp_path / "cache.toml"
    file.write_text(text)
    with pytest.raises(BadInputError, match=named):
        CacheConfig.from_toml(file)

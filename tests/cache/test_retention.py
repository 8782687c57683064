"""Rules by prefix and job: the longest prefix counts, ages are never underestimated, quotas are each job's own."""

import pytest

from cache.config import CacheConfig, JobConfig, PrefixConfig
from cache.labels import Label, Labels
from cache.retention import Retention
from connectors.errors import BadInputError


def retention(*rules: PrefixConfig, jobs: tuple[JobConfig, ...] = ()) -> Retention:
    return Retention(CacheConfig(prefixes=rules, jobs=jobs))


def test_the_longest_prefix_counts() -> None:
    rules = retention(PrefixConfig("s3://b", 100, 7), PrefixConfig("s3://b/x/", None, 5), PrefixConfig("s3://b/x/y"))
    assert rules.quotas(Label("s3://b/z", "", 0)) == (("s3://b", 7),)
    assert rules.quotas(Label("s3://b/x/z", "", 0)) == (("s3://b/x", 5),)
    assert rules.quotas(Label("s3://b/x/y/z", "", 0)) == ()
    assert rules.quotas(Label("s3://other/x", "", 0)) == ()
    assert [rules.ruled(uri) for uri in ("s3://b/x/y/z", "s3://other")] == [True, False]
    assert rules.expired(Label("s3://b/z", "", 0), 100)
    assert not rules.expired(Label("s3://b/x/z", "", 0), 1e9)


@pytest.mark.parametrize(("now_s", "expired"), [(999, True), (1000, False), (1099, False), (1100, True)])
def test_a_block_is_served_while_it_is_younger_than_its_ttl_and_not_from_the_future(now_s: int, expired: bool) -> None:
    assert retention(PrefixConfig("s3://b", 100)).expired(Label("s3://b/x", "", 1000), now_s) is expired


@pytest.mark.parametrize("ttl_s", [1, 64, 6400, 86400])
def test_an_age_is_rounded_up_and_by_little(ttl_s: int) -> None:
    labels = Labels(retention(PrefixConfig("s3://b", ttl_s)).grain_s)
    for now_s in (12345.9, 99999.1):
        labels.note(b"k", "s3://b/x", "", now_s)
        assert 0 <= now_s - labels.get(b"k").born_s <= max(1, ttl_s / 64)


def test_each_job_has_a_quota_of_its_own_by_the_first_name_that_fits() -> None:
    jobs = (JobConfig("tune-*", 5), JobConfig("*", 9))
    rules = retention(PrefixConfig("s3://b", None, 7), jobs=jobs)
    assert rules.quotas(Label("s3://c/x", "tune-1", 0)) == (("job tune-1", 5),)
    assert rules.quotas(Label("s3://b/x", "main", 0)) == (("s3://b", 7), ("job main", 9))
    assert rules.quotas(Label("s3://c/x", "", 0)) == ()


def test_without_rules_nothing_is_watched() -> None:
    rules = retention()
    assert (rules.watchful, rules.sweep_every_s) == (False, None)
    assert retention(PrefixConfig("s3://b", 6400)).sweep_every_s == 100


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PrefixConfig("s3://b", ttl_s=0), "ttl_s must be >= 1, got 0"),
        (lambda: PrefixConfig("s3://b", quota_bytes=-1), "got -1"),
        (lambda: PrefixConfig("no url://"), "no url"),
        (lambda: JobConfig("", 1), "empty"),
        (lambda: CacheConfig(prefixes=(PrefixConfig("s3://b"), PrefixConfig("s3://b/"))), "s3://b"),
        (lambda: CacheConfig(jobs=(JobConfig("x", 1), JobConfig("x", 2))), "same job"),
        (lambda: CacheConfig(pinned_share=1.5), "1.5"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(make, named: str) -> None:
    with pytest.raises(BadInputError, match=named):
        make()


def test_a_file_has_rules_and_its_mistakes_are_named(tmp_path) -> None:
    file = tmp_path / "cache.toml"
    file.write_text(
        'pinned_share = 0.5\n[[prefixes]]\nprefix = "s3://b/"\nttl_s = 60\n[[jobs]]\nname = "*"\nquota_bytes = 7\n'
    )
    found = CacheConfig.from_toml(file)
    assert found == CacheConfig(prefixes=(PrefixConfig("s3://b", 60),), jobs=(JobConfig("*", 7),), pinned_share=0.5)
    assert CacheConfig.from_json(found.to_json()) == found
    file.write_text('[[prefixes]]\nprefix = "s3://b"\nttl = 3\n')
    with pytest.raises(BadInputError, match="unknown setting 'ttl'"):
        CacheConfig.from_toml(file)


def test_one_label_is_shared_by_what_it_says_the_same_of() -> None:
    labels = Labels(lambda uri: 10)
    for number, uri in enumerate(["s3://b/x", "s3://b/x/", "s3://b/y"]):
        labels.note(bytes([number]), uri, "job", 105.0 + number)
    first, second, third = (labels.get(bytes([number])) for number in range(3))
    assert first == Label("s3://b/x", "job", 100)
    assert second is first
    assert third is not first
    labels.adopt(b"\0", third)
    labels.adopt(b"\7", third)
    assert (labels.get(b"\0"), labels.get(b"\7")) == (first, third)
    labels.forget(b"\0")
    assert len(labels) == 3

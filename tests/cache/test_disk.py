"""A disk is distrusted for its rate of failures, probed less and less often, and trusted again after good probes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.disk import DiskHealth, DiskLimits, DiskState
from connectors.errors import BadInputError

LIMITS = DiskLimits(
    window=20, unstable_failures=3, unstable_share=0.2, down_failures=4, down_share=0.5, first_retry_s=1, last_retry_s=8
)


def fail(health: DiskHealth, times: int, now_s: float = 0.0, *, reading: bool = True) -> None:
    for _ in range(times):
        health.failed(now_s, "broken", reading=reading)


def test_single_failures_among_many_successes_mean_nothing() -> None:
    health = DiskHealth(LIMITS, 0)
    for _ in range(50):
        fail(health, 1)
        for _ in range(9):
            health.read()
    assert (health.state, health.admission(0), health.retry_at_s) == (DiskState.NORMAL, "open", None)


def test_a_rate_of_failures_stops_writes_then_reads() -> None:
    health = DiskHealth(LIMITS, 0)
    fail(health, 3, 5.0, reading=False)
    assert (health.state, health.since_s, health.reason) == (DiskState.UNSTABLE, 5.0, "broken")
    assert (health.readable, health.admission(99)) == (True, "closed")
    fail(health, 9, 6.0, reading=False)
    assert health.readable, "failed writes say nothing about reads"
    fail(health, 4, 7.0)
    assert (health.state, health.since_s, health.readable) == (DiskState.DOWN, 7.0, False)


def test_good_probes_bring_a_disk_back_step_by_step() -> None:
    health = DiskHealth(LIMITS, 0)
    health.stuck(0, "hangs")
    assert health.state is DiskState.DOWN
    states = []
    for now_s in (1, 2, 3):
        health.probed(now_s, readable=True, writable=True)
        states.append(health.state)
    assert states == [DiskState.UNSTABLE, DiskState.UNSTABLE, DiskState.NORMAL]
    assert (health.reason, health.retry_at_s, health.admission(3)) == (None, None, "open")


def test_a_disk_that_only_reads_stays_unstable() -> None:
    health = DiskHealth(LIMITS, 0)
    fail(health, 3)
    for now_s in range(20):
        health.probed(now_s, readable=True, writable=False, reason="read-only")
    assert (health.state, health.reason) == (DiskState.UNSTABLE, "read-only")
    health.probed(20, readable=False, writable=False, reason="gone")
    assert (health.state, health.reason) == (DiskState.DOWN, "gone")


def test_probes_become_rarer_up_to_a_limit_also_when_a_disk_comes_and_goes() -> None:
    health = DiskHealth(LIMITS, 0)
    now_s, pauses = 0.0, []
    for _ in range(6):
        fail(health, 3, now_s)
        assert health.retry_at_s is not None
        pauses.append(health.retry_at_s - now_s)
        now_s = health.retry_at_s
        for _ in range(LIMITS.good_probes):
            health.probed(now_s, readable=True, writable=True)
    assert pauses == [1, 2, 4, 8, 8, 8]
    fail(health, 3, now_s + 100)
    assert health.retry_at_s == now_s + 101, "what was well for long is tried soon"


def test_a_full_disk_is_read_and_written_one_by_one_after_a_pause() -> None:
    health = DiskHealth(LIMITS, 0)
    health.filled(10, "no space", more=True)
    assert (health.state, health.admission(10), health.admission(11)) == (DiskState.NORMAL, "closed", "one")
    health.filled(10.5, "no space", more=False)
    assert health.retry_at_s == 11, "what was under way does not count twice"
    health.filled(11, "no space", more=True)
    assert (health.admission(12.9), health.admission(13), health.full_since_s) == ("replacing", "one", 10)
    health.written(more=True)
    assert (health.admission(13), health.full_since_s, health.retry_at_s) == ("open", None, None)


def test_blocks_of_a_full_disk_are_replaced_until_that_fails_some_times_in_a_row() -> None:
    health = DiskHealth(LIMITS, 0)
    health.filled(0, "no space", more=True)
    health.filled(1, "no space", more=True)
    for _ in range(5):
        health.filled(1.5, "no space", more=False)
        health.filled(1.5, "no space", more=False)
        health.written(more=False)
        assert (health.admission(2.9), health.admission(3)) == ("replacing", "one"), "the trial is not put off"
        assert health.full_since_s == 0
    for _ in range(3):
        assert health.admission(2) == "replacing"
        health.filled(2, "no space", more=False)
    assert (health.admission(2), health.admission(3)) == ("closed", "one")
    health.filled(3, "no space", more=True)
    assert health.admission(4) == "replacing"


@given(st.lists(st.tuples(st.sampled_from("rwfFSpPq"), st.floats(0, 20)), max_size=80))
def test_whatever_happens_an_ill_disk_is_retried_within_the_longest_pause(events: list[tuple[str, float]]) -> None:
    health = DiskHealth(LIMITS, 0)
    now_s = 0.0
    for event, pause_s in events:
        now_s += pause_s
        match event:
            case "r":
                health.read()
            case "w":
                health.written(more=pause_s > 10)
            case "f" | "F":
                health.failed(now_s, "broken", reading=event == "f")
            case "S":
                health.stuck(now_s, "hangs")
            case "q":
                health.filled(now_s, "full", more=pause_s > 10)
            case _:
                health.probed(now_s, readable=True, writable=event == "P", reason="probe")
        ill = health.state is not DiskState.NORMAL
        assert health.probing == ill
        assert (health.reason is not None) == ill
        assert (health.admission(now_s) == "closed") >= ill
        assert (health.retry_at_s is not None) == (ill or health.full_since_s is not None)
        if health.retry_at_s is not None:
            assert health.retry_at_s <= now_s + LIMITS.last_retry_s
        assert not (ill and health.full_since_s is not None)
        assert health.since_s <= now_s
        stats = health.stats(now_s, now_s + 1e9)
        assert stats["state"] == health.state.value
        assert stats["state_since_unix_s"] == pytest.approx(health.since_s + 1e9)


@pytest.mark.parametrize(
    "setting",
    [{"window": 0}, {"unstable_share": 1.5}, {"stuck_s": 0}, {"first_retry_s": 2, "last_retry_s": 1}],
)
def test_nonsense_is_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(BadInputError, match=next(iter(setting))):
        DiskLimits(**setting)

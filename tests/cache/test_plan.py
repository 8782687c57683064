"""Merged futures know when each block is wanted next."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.block_table import BlockTable
from cache.keys import block_key
from cache.plan import MAX_AHEAD, Futures
from connectors.errors import BadInputError

BLOCKS = 12


def make_table(name: str = "a", blocks: int = BLOCKS) -> BlockTable:
    return BlockTable.from_columns(
        [f"s3://b/{name}"],
        ["1"],
        object_of=np.zeros(blocks, np.int32),
        offset=np.arange(blocks) * 10,
        length=np.full(blocks, 10),
        crc32c=None,
    )


TABLE = make_table()
KEYS = [block_key(TABLE.ref(block)) for block in range(BLOCKS)]


def ids(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


def drain(futures: Futures, limit: int = 1000) -> list[bytes]:
    taken = []
    while len(taken) < limit and (planned := futures.peek()) is not None:
        taken.append(planned.key)
        futures.take()
    return taken


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("extend"), st.lists(st.integers(0, BLOCKS - 1), max_size=8)),
            st.tuples(st.just("advance"), st.integers(0, 6)),
            st.tuples(st.just("use"), st.integers(0, BLOCKS - 1)),
            st.tuples(st.just("take"), st.integers(0, 4)),
            st.tuples(st.just("forget"), st.just(0)),
        ),
        max_size=30,
    )
)
def test_next_uses_are_those_of_a_plain_list(steps: list[tuple]) -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    sequence: list[int] = []
    used: set[int] = set()
    position = 0
    for action, value in steps:
        if action == "extend":
            keys = futures.extend(number, ids(*value))
            assert keys == [KEYS[block] for block in value]
            sequence += value
        elif action == "advance":
            position = min(position + value, len(sequence))
            futures.advance(number, position, 0.0)
        elif action == "use":
            left = [p for p in range(position, len(sequence)) if sequence[p] == value and p not in used]
            assert futures.use(KEYS[value]) == ("plan" if left else None)
            used.update(left[:1])
        elif action == "take":
            drain(futures, value)
        else:
            futures.forget(number)
            del sequence[position:]
            used = {p for p in used if p < position}
        plan = futures.plan(number)
        assert (plan.position, plan.end) == (position, len(sequence))
        uses = [
            next((p for p in range(position, len(sequence)) if sequence[p] == b and p not in used), None)
            for b in range(BLOCKS)
        ]
        assert [futures.next_use(key) for key in KEYS] == [math.inf if p is None else plan.time_of(p) for p in uses]
        assert [futures.near_use(key) for key in KEYS] == [
            math.inf if p is None or p >= plan.cursor else plan.time_of(p) for p in uses
        ]


def test_blocks_are_taken_in_the_order_of_the_plan_and_not_when_they_were_read() -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    futures.extend(number, ids(3, 1, 4, 1, 5))
    assert drain(futures, 1) == [KEYS[3]]
    futures.use(KEYS[4])
    assert drain(futures) == [KEYS[1], KEYS[1], KEYS[5]]
    futures.extend(number, ids(9))
    assert drain(futures) == [KEYS[9]]
    assert futures.peek() is None


def test_a_block_of_two_plans_is_wanted_when_the_first_wants_it_and_then_when_the_second_does() -> None:
    futures = Futures()
    first, second = futures.add(TABLE, 0.0), futures.add(make_table(), 0.0)
    futures.extend(first, ids(0, 1, 2, 3))
    futures.extend(second, ids(3, 2, 1, 0))
    assert futures.next_use(KEYS[3]) == futures.plan(second).time_of(0)
    assert futures.use(KEYS[3])
    assert futures.next_use(KEYS[3]) == futures.plan(first).time_of(3)
    assert futures.use(KEYS[3])
    assert futures.next_use(KEYS[3]) == math.inf
    assert not futures.use(KEYS[3])


def test_the_faster_reader_is_served_more_blocks() -> None:
    futures = Futures()
    slow, fast = futures.add(make_table("slow"), 0.0), futures.add(make_table("fast"), 0.0)
    for number in (slow, fast):
        futures.extend(number, np.tile(np.arange(BLOCKS, dtype=np.int32), 100))
    for second in range(1, 31):
        futures.advance(slow, 2 * second, float(second))
        futures.advance(fast, 20 * second, float(second))
    now_s = 30.0
    for number, pace in ((slow, 2), (fast, 20)):
        plan = futures.plan(number)
        assert plan.time_of(plan.position) == pytest.approx(now_s, abs=30)
        assert 1 / plan.step_s == pytest.approx(pace, rel=0.5)
    before = [futures.plan(number).cursor for number in (slow, fast)]
    drain(futures, 220)
    slow_taken, fast_taken = (futures.plan(n).cursor - b for n, b in zip((slow, fast), before, strict=True))
    assert fast_taken > 4 * slow_taken > 0


def test_drawing_a_time_line_anew_names_every_block_of_the_plan() -> None:
    futures = Futures()
    first, _ = futures.add(TABLE, 0.0), futures.add(make_table("other"), 0.0)
    futures.extend(first, ids(1, 2, 3))
    assert set(futures.advance(first, 1, 1000.0)) == {KEYS[1], KEYS[2], KEYS[3]}


def test_ending_and_forgetting_name_what_nobody_wants_any_more() -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    futures.extend(number, ids(1, 2, 2))
    assert set(futures.forget(number)) == {KEYS[1], KEYS[2]}
    futures.extend(number, ids(4))
    assert drain(futures) == [KEYS[4]]
    assert futures.remove(number) == [KEYS[4]]
    assert len(futures) == 0
    assert futures.next_use(KEYS[4]) == math.inf


@pytest.mark.parametrize("wrong", [-1, BLOCKS])
def test_a_block_outside_the_table_is_refused_and_nothing_changes(wrong: int) -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    with pytest.raises(BadInputError, match=str(wrong)):
        futures.extend(number, ids(1, wrong))
    assert futures.plan(number).end == 0


def test_a_position_beyond_the_end_and_a_window_without_limit_are_refused() -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    with pytest.raises(BadInputError, match="position 1"):
        futures.advance(number, 1, 0.0)
    with pytest.raises(BadInputError, match=str(MAX_AHEAD)):
        futures.extend(number, np.zeros(MAX_AHEAD + 1, np.int32))


def test_a_long_plan_keeps_only_what_lies_ahead() -> None:
    futures = Futures()
    number = futures.add(TABLE, 0.0)
    for step in range(200):
        futures.extend(number, np.arange(BLOCKS, dtype=np.int32).repeat(9))
        futures.advance(number, (step + 1) * BLOCKS * 9, float(step))
    assert len(futures.plan(number)._entries) <= 2048
    assert not futures.plan(number).uses
    futures.extend(number, ids(5))
    assert drain(futures) == [KEYS[5]]


def test_a_reader_that_stands_still_has_no_other_pace() -> None:
    futures = Futures()
    first, _ = futures.add(TABLE, 0.0), futures.add(make_table("other"), 0.0)
    futures.extend(first, ids(1, 2, 3))
    futures.advance(first, 1, 1.0)
    step_s = futures.plan(first).step_s
    for now_s in (1.0, 2.0, 60.0):
        futures.advance(first, 1, now_s)
    assert futures.plan(first).step_s == step_s

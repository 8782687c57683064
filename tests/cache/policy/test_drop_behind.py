"""What has been read makes room, what waits for its reader does not."""

from cache.policy import DropBehind
from cache.testing import Replay, make_key


def test_blocks_leave_in_the_order_in_which_they_were_read() -> None:
    held = Replay(DropBehind(), 3)
    held.access_all(map(make_key, [1, 2, 3]))
    held.access_all(map(make_key, [2, 1]))
    held.access(make_key(4))
    assert set(held.blocks) == {make_key(1), make_key(3), make_key(4)}


def test_a_block_that_waits_for_its_reader_is_not_displaced() -> None:
    held = Replay(DropBehind(), 2)
    held.access_all(map(make_key, [1, 2, 3]))
    assert set(held.blocks) == {make_key(1), make_key(2)}
    held.access(make_key(9))
    assert held.writes == 2


def test_a_walk_through_data_reads_all_of_it_without_displacing_what_is_ahead() -> None:
    held = Replay(DropBehind(), 8)
    for number in range(100):
        for ahead in range(number, number + 4):  # a reader with blocks fetched ahead of it
            if make_key(ahead) not in held.blocks:
                held.access(make_key(ahead))
        assert held.access(make_key(number))

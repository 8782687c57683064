import pickle

import pytest

from cache.connection import ServerGoneError
from cache.fallback import FallbackReader
from connectors.errors import NotFoundError


class Rung:
    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self.error = error
        self.calls = 0
        self.closed = False

    def _answer(self, *args):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.name

    read_blocks = read_object = list_objects = stats = _answer

    def close(self):
        self.closed = True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def ladder(clock, *rungs):
    return FallbackReader([(rung.name, rung) for rung in rungs], retry_s=30, clock=clock)


def test_the_first_rung_answers_while_it_is_there(clock):
    daemon, private = Rung("daemon"), Rung("private")
    reader = ladder(clock, daemon, private)
    assert [reader.read_blocks([]), reader.read_object("u"), reader.list_objects("u"), reader.stats()] == ["daemon"] * 4
    assert private.calls == 0


def test_a_dead_rung_is_left_alone_for_a_while_then_tried_again_with_one_word_each_way(clock, caplog):
    daemon, private = Rung("daemon", ServerGoneError("the daemon is dead")), Rung("private")
    reader = ladder(clock, daemon, private)
    assert [reader.stats() for _ in range(5)] == ["private"] * 5
    assert daemon.calls == 1
    clock.now_s = 31
    assert reader.stats() == "private"
    assert daemon.calls == 2
    daemon.error, clock.now_s = None, 62
    assert reader.stats() == "daemon"
    assert [record.getMessage() for record in caplog.records] == [
        "the daemon is dead; going on with private",
        "daemon is back",
    ]


def test_an_error_about_the_data_is_the_callers(clock):
    daemon, private = Rung("daemon", NotFoundError("no object")), Rung("private")
    with pytest.raises(NotFoundError):
        ladder(clock, daemon, private).stats()
    assert private.calls == 0


def test_the_last_rung_has_the_last_word_and_is_always_tried(clock):
    daemon, private = Rung("daemon", ServerGoneError("one")), Rung("private", ServerGoneError("two"))
    reader = ladder(clock, daemon, private)
    for _ in range(3):
        with pytest.raises(ServerGoneError, match="two"):
            reader.stats()
    assert private.calls == 3


def test_a_copy_forgets_what_was_down_and_closing_closes_all():
    rungs = Rung("daemon", ServerGoneError("dead")), Rung("private")
    reader = FallbackReader([(rung.name, rung) for rung in rungs])
    assert reader.stats() == "private"
    copy = pickle.loads(pickle.dumps(reader))
    copy._rungs[0][1].error = None
    assert copy.stats() == "daemon"
    reader.close()
    assert all(rung.closed for rung in rungs)

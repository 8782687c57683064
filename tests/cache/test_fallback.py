import pickle

import pytest

from cache.connection import ServerGoneError
from cache.fallback import FallbackReader
from cache.reader import BlockData
from connectors.errors import BadInputError, NotFoundError


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
    assert len(caplog.records) == 1
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


class Slow(Rung):
    """Takes some seconds of the clock for each answer, and for a greeting."""

    def __init__(self, name, clock, answers, *, greeting_s=0.0):
        super().__init__(name)
        self.clock = clock
        self.answers = answers
        self.taken_s = 0.0
        self.greeting_s = greeting_s
        self.greetings = 0

    def _answer(self, *args):
        self.calls += 1
        self.clock.now_s += self.taken_s
        return self.answers

    read_blocks = read_object = list_objects = stats = _answer

    def greet(self, timeout_s):
        self.greetings += 1
        self.clock.now_s += min(timeout_s, self.greeting_s)
        if self.greeting_s > timeout_s:
            raise ServerGoneError("no greeting")


def blocks(*sources, size_bytes=10):
    return [BlockData(memoryview(bytes(size_bytes)), source) for source in sources]


def test_a_rung_that_is_slow_with_what_it_has_is_left_tried_and_returned_to(clock, caplog):
    daemon, private = Slow("daemon", clock, blocks("ram")), Rung("private")
    reader = ladder(clock, daemon, private)
    daemon.taken_s = 5
    assert [reader.read_blocks([]) for _ in range(5)] == [blocks("ram")] * 3 + ["private"] * 2
    clock.now_s += 30
    assert [reader.read_blocks([]) for _ in range(2)] == [blocks("ram"), "private"], "one trial"
    daemon.taken_s = 0
    clock.now_s += 30
    assert [reader.read_blocks([]) for _ in range(2)] == [blocks("ram")] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "daemon is slow: it was 3 times in a row; going on with private",
        "daemon is back",
    ]


def test_time_for_many_bytes_is_not_slow(clock):
    daemon, private = Slow("daemon", clock, blocks("disk", size_bytes=64 << 20)), Rung("private")
    reader = ladder(clock, daemon, private)
    daemon.taken_s = 5.9  # 2, and 4 for 64 MiB
    for _ in range(9):
        reader.read_blocks([])
    assert private.calls == 0
    daemon.taken_s = 6.1
    for _ in range(9):
        reader.read_blocks([])
    assert private.calls == 6


@pytest.mark.parametrize("answers", [blocks("ram", "origin"), "an object"])
def test_a_slow_origin_is_nobodys_fault_unless_not_even_a_greeting_comes(clock, answers):
    daemon, private = Slow("daemon", clock, answers), Rung("private")
    reader = ladder(clock, daemon, private)
    reader.read_blocks([])
    assert daemon.greetings == 0, "a fast answer costs none"
    daemon.taken_s = 60
    for _ in range(9):
        assert reader.read_blocks([]) == answers
    assert daemon.greetings == 9
    daemon.greeting_s = 1.5
    assert [reader.read_blocks([]) for _ in range(4)] == [answers] * 3 + ["private"]


def test_a_rung_that_was_left_is_greeted_before_a_call_is_risked(clock):
    daemon, private = Slow("daemon", clock, "daemon", greeting_s=2), Rung("private")
    reader = ladder(clock, daemon, private)
    reader._breakers[0].failed(clock())
    clock.now_s = 31
    assert reader.stats() == "private"
    assert (daemon.calls, daemon.greetings, clock.now_s) == (0, 1, 32)
    daemon.greeting_s, clock.now_s = 0, 63
    assert reader.stats() == "daemon"


@pytest.mark.parametrize("name", ["slow_s", "greeting_s"])
def test_patience_is_checked(name):
    with pytest.raises(BadInputError, match=name):
        FallbackReader([], **{name: 0})

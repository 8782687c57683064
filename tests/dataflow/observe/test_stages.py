import contextlib
import threading

from dataflow.observe import Recorder, count, stage
from dataflow.observe import stages as module


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self):
        return self.now_s


def test_nested_stages_share_the_wall_time_without_overlap(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with Recorder() as recorder, stage("fetch"):
        clock.now_s += 1
        with stage("decode"):
            clock.now_s += 10
            with stage("collate"):
                clock.now_s += 100
        with stage("decode"):
            clock.now_s += 20
        clock.now_s += 2
    assert recorder.seconds == {"fetch": 3, "decode": 30, "collate": 100}


def test_a_stage_that_raises_is_still_accounted(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with Recorder() as recorder, contextlib.suppress(ZeroDivisionError), stage("fetch"), stage("decode"):
        clock.now_s += 5
        1 / 0  # noqa: B018
    assert recorder.seconds == {"decode": 5, "fetch": 0}


def test_a_stage_may_learn_its_name_on_the_way(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    with Recorder() as recorder, stage("fetch") as reading:
        clock.now_s += 5
        reading.name = "fetch.disk"
    assert recorder.seconds == {"fetch.disk": 5}


def test_counts_add_up_and_only_while_a_recorder_listens():
    count("blocks.ram", 7)
    with Recorder() as recorder:
        count("blocks.ram", 2)
        count("blocks.ram")
    count("blocks.ram", 7)
    assert recorder.counts == {"blocks.ram": 3}


def test_an_inner_recorder_takes_over_and_gives_back():
    with Recorder() as outer:
        with Recorder() as inner:
            count("a")
        count("b")
    assert (inner.counts, outer.counts) == ({"a": 1}, {"b": 1})


def test_another_thread_is_not_recorded():
    with Recorder() as recorder:
        thread = threading.Thread(target=count, args=("a",))
        thread.start()
        thread.join()
    assert not recorder.counts

from hypothesis import given
from hypothesis import strategies as st

from cache.breaker import Breaker


def breaker():
    return Breaker(retry_s=30, max_slow=3)


def test_one_failure_opens_it_and_is_news_once():
    circuit = breaker()
    assert circuit.failed(100)
    assert circuit.tripped
    assert circuit.is_open(129)
    assert not circuit.is_open(130)
    assert not circuit.failed(130)
    assert circuit.is_open(159)


def test_slow_answers_open_it_only_in_a_row():
    circuit = breaker()
    assert [circuit.was_slow(0), circuit.was_slow(0), circuit.was_fine(), circuit.was_slow(0), circuit.was_slow(0)] == (
        [False] * 5
    )
    assert not circuit.tripped
    assert circuit.was_slow(0)
    assert circuit.is_open(29)


def test_one_slow_answer_of_a_trial_opens_it_again_without_a_word():
    circuit = breaker()
    circuit.failed(0)
    assert not circuit.was_slow(31)
    assert circuit.is_open(60)


def test_a_fine_answer_closes_it_and_is_news_once():
    circuit = breaker()
    circuit.failed(0)
    assert circuit.was_fine()
    assert not circuit.was_fine()
    assert not circuit.is_open(1)


@given(st.lists(st.sampled_from(["failed", "was_slow", "was_fine"]), max_size=40))
def test_news_alternate_and_only_a_fine_answer_closes_it(happened):
    circuit, news = breaker(), []
    for now_s, what in enumerate(happened):
        said = circuit.was_fine() if what == "was_fine" else getattr(circuit, what)(now_s)
        news += [what == "was_fine"] if said else []
        assert circuit.tripped == (bool(news) and not news[-1])
    assert news == [number % 2 == 1 for number in range(len(news))]

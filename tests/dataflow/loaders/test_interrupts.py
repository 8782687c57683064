"""Ctrl-C at any line of the trainer's part: a batch is never passed over unsaid, and nobody waits for what is lost."""

import itertools
import json
import os
import sys

import pytest
import torch

import dataflow
from dataflow.loaders import DataLoader
from dataflow.loaders.testing import Counter, Numbers

PACKAGE = os.path.dirname(dataflow.__file__)
# On a batch's last steps to the caller it is counted as the caller's; and what a finalizer raises, nobody hears.
PASSED_OVER = {"arrived", "__next__", "__del__"}
# Every so many lines.
STEP = 7


class InterruptAt:
    """A trace function that raises KeyboardInterrupt before a line of the package, so many lines after it is set."""

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, argument):
        is_ours = frame.f_code.co_filename.startswith(PACKAGE)
        return self.trace_lines if is_ours and frame.f_code.co_name not in PASSED_OVER else None

    def trace_lines(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace_lines


def shuffled(**options):
    return DataLoader(Numbers(80), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


def streamed(**options):
    return DataLoader(Counter(40), batch_size=2, **options)


def values(batch):
    return (batch[0] if isinstance(batch, list) else batch).tolist()


def take_until_interrupted(batches, number, most):
    """Return the batches, at most so many, that come before the interrupt, and whether it came.

    Where a trace function raises at the end of an `except`, CPython 3.11 goes on taking that one's exception for the
    one being handled, and keeps its frames. An outer `except` that ends puts an end to it.
    """
    try:
        next(iter(()))
    except StopIteration:
        return _take_until_interrupted(batches, number, most)


def _take_until_interrupted(batches, number, most):
    taken = []
    try:
        for _ in range(most):
            sys.settrace(InterruptAt(number))
            batch = next(batches)
            sys.settrace(None)
            taken.append(values(batch))
    except KeyboardInterrupt:
        return taken, True
    finally:
        sys.settrace(None)
    return taken, False


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (shuffled, {"num_workers": 2}),
        (shuffled, {"num_workers": 2, "in_order": False}),
        (shuffled, {"num_workers": 2, "workers": "thread"}),
        (streamed, {"num_workers": 2}),
        (streamed, {"num_workers": 2, "workers": "thread"}),
    ],
    ids=["processes", "unordered", "threads", "stream in processes", "stream in a thread"],
)
def test_ctrl_c_at_any_line_loses_no_batch_unsaid(make, options):
    expected = [values(batch) for batch in make(**options)]
    keeps_order = options.get("in_order", True)

    def as_promised(batches):
        return batches if keeps_order else sorted(batches)

    for number in itertools.count(1, STEP):
        loader = make(**options)
        batches = iter(loader)
        taken, came = take_until_interrupted(batches, number, most=8)
        if not came:
            break
        resumed = make(**options)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert as_promised(taken + [values(batch) for batch in resumed]) == as_promised(expected)
        if batches._is_torn:
            with pytest.raises(RuntimeError, match=r"call iter\(\) on the loader again"):
                next(batches)
        else:
            assert as_promised(taken + [values(batch) for batch in batches]) == as_promised(expected)
    assert number > 3 * STEP


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("workers", ["process", "thread"])
def test_workers_that_stay_are_of_use_after_ctrl_c_at_any_line(workers, resumes):
    loader = shuffled(num_workers=2, persistent_workers=True, workers=workers)
    for number in itertools.count(1, STEP):
        taken, came = take_until_interrupted(iter(loader), number, most=8)
        if resumes:
            loader.load_state_dict(loader.state_dict())
        seen = [*(taken if resumes else []), *map(values, loader)]
        assert sorted(itertools.chain(*seen)) == [[number] for number in range(80)]
        if not came:
            break
    assert number > 3 * STEP


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_who_is_interrupted_while_waiting_goes_on(workers, monkeypatch):
    loader = shuffled(num_workers=2, workers=workers)
    expected = [values(batch) for batch in shuffled()]
    batches = iter(loader)
    taken = [values(next(batches))]
    crew = batches._crew if workers == "process" else batches._threads
    wait = type(crew).wait

    def interrupted(self, timeout_s):
        wait(self, timeout_s)  # something has come when the handler runs
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(crew), "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taken.extend(map(values, batches))
    assert taken + [values(batch) for batch in batches] == expected

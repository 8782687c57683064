"""What the tests of loaders run under."""

import gc

import pytest


@pytest.fixture(autouse=True)
def _iterators_are_gone():
    """A caught exception refers to the frames it passed, and so to iterators with processes of their own."""
    yield
    gc.collect()

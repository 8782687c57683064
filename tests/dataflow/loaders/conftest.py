"""What the tests of loaders run under."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _what_was_imported_is_not_searched():
    """A collection looks through all modules otherwise: a tenth of a second after each of these tests."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _iterators_are_gone():
    """A caught exception refers to the frames it passed, and so to iterators with processes of their own."""
    yield
    gc.collect()

"""How many threads an operator of torch may use, where threads of ours use one each.

`torch.set_num_threads` holds for the thread that calls it, and for all threads whose first operator is still to come.
One of those may be the thread that trains, so the number is put back once ours have begun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["parallelism_kept", "use_one_thread"]


def use_one_thread() -> None:
    """Let operators use no other thread than the calling one."""
    torch.get_num_threads()  # a thread's first question, also that of its first operator, sets its own number
    torch.set_num_threads(1)


@contextlib.contextmanager
def parallelism_kept() -> Iterator[None]:
    """Put back afterwards the number of the caller, and of threads that begin later."""
    number = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(number)

"""Large `bytes` of many samples on their way to the trainer: back to back in a slot, copied there from their blocks.

As `bytes` they would be copied three times: from the block to an object, from there to the slot, and from the slot to
the trainer's object. This leaves out the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from dataflow.loaders.slots import Bytes

__all__ = ["Blobs"]

_Spans: TypeAlias = list[tuple[int, int] | None]


class Blobs:
    """Stands in for a list of `bytes` in a batch that is to be pickled, and is that list when it is unpickled.

    Args:
        memory: Holds all of them.
        spans: Where each begins and ends in it; of None, None.
    """

    def __init__(self, memory: Bytes, spans: _Spans) -> None:
        self._memory = memory
        self._spans = spans

    @classmethod
    def join(cls, parts: Sequence[memoryview | None], memory: Bytes) -> Blobs:
        """Copy parts into memory that has just as many bytes."""
        spans: _Spans = []
        view, start = memory.data, 0
        for part in parts:
            if part is None:
                spans.append(None)
                continue
            end = start + len(part)
            view[start:end] = part
            spans.append((start, end))
            start = end
        return cls(memory, spans)

    def __getitem__(self, samples: slice) -> Blobs:
        return Blobs(self._memory, self._spans[samples])

    def __reduce__(self) -> tuple[Any, ...]:
        found = [span for span in self._spans if span is not None]
        first, last = (found[0][0], found[-1][1]) if found else (0, 0)
        spans = [None if span is None else (span[0] - first, span[1] - first) for span in self._spans]
        return _split, (self._memory[first:last], spans)


def _split(memory: Bytes, spans: _Spans) -> list[bytes | None]:
    view = memory.data
    return [None if span is None else bytes(view[span[0] : span[1]]) for span in spans]

"""Behaviour added by wrapping a store: another root, counting, delaying, failing.

Every wrapper is a store itself and passes the same conformance suite, so they nest in any order. What a call should
suffer is decided by a pure function from a `Call` to a delay or a fault.
"""

from __future__ import annotations

import asyncio
import builtins
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar, cast

from connectors.errors import ErrorKind, error_from_kind
from connectors.objects import ObjectMeta, Span, check_key, join_uri
from connectors.protocols import Buffer, Store

__all__ = ["Call", "CountingStore", "DelayedStore", "Fail", "FailingStore", "Fault", "Flip", "PrefixStore"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call:
    """One operation on its way to a store.

    Attributes:
        operation: The method: `get`, `get_range`, `get_ranges`, `head`, `list`, `put`, `put_stream`, `delete`, `copy`.
        key: The key, for `list` the prefix, for `copy` the source.
        number: How many calls this wrapper has seen before.
    """

    operation: str
    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The call fails before it reaches the store."""

    kind: ErrorKind


@dataclass(frozen=True, slots=True)
class Flip:
    """The call succeeds, and one bit of the byte at `offset` (counted round the end) of every buffer read is wrong."""

    offset: int


Fault: TypeAlias = Fail | Flip


class PrefixStore:
    """The part of a store below a folder; keys are relative to it.

    Args:
        store: The whole store, closed by `close`.
        prefix: The folder, a key of `store`.
    """

    def __init__(self, store: Store, prefix: str) -> None:
        check_key(prefix)
        self.url = join_uri(store.url, prefix)
        self._store = store
        self._prefix = prefix + "/"

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object."""
        return await self._store.get(self._below(key), version=version)

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        return await self._store.get_range(self._below(key), span, version=version)

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one buffer per span."""
        return await self._store.get_ranges(self._below(key), spans, version=version)

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return self._relative(await self._store.head(self._below(key)))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the objects below the folder whose key begins with `prefix`, sorted by key."""
        async for meta in self._store.list(self._prefix + prefix):
            yield self._relative(meta)

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object atomically."""
        return self._relative(await self._store.put(self._below(key), data))

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Write the chunks; the object appears whole or not at all."""
        return self._relative(await self._store.put_stream(self._below(key), chunks))

    async def delete(self, key: str) -> None:
        """Remove the object."""
        await self._store.delete(self._below(key))

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the object inside the folder."""
        return self._relative(await self._store.copy(self._below(source), self._below(target)))

    async def close(self) -> None:
        """Close the whole store."""
        await self._store.close()

    def _below(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _relative(self, meta: ObjectMeta) -> ObjectMeta:
        return replace(meta, key=meta.key.removeprefix(self._prefix))


class _AroundStore:
    """A store whose every operation passes through `_call`."""

    def __init__(self, store: Store) -> None:
        self.url = store.url
        self._store = store
        self._calls = 0

    async def _call(self, call: Call, action: Callable[[], Awaitable[R]]) -> R:
        raise AssertionError("each wrapper says what happens around a call")

    def _next(self, operation: str, key: str) -> Call:
        call = Call(operation, key, self._calls)
        self._calls += 1
        return call

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object."""
        return await self._call(self._next("get", key), lambda: self._store.get(key, version=version))

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        call = self._next("get_range", key)
        return await self._call(call, lambda: self._store.get_range(key, span, version=version))

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one buffer per span."""
        call = self._next("get_ranges", key)
        return await self._call(call, lambda: self._store.get_ranges(key, spans, version=version))

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return await self._call(self._next("head", key), lambda: self._store.head(key))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the objects whose key begins with `prefix`, sorted by key; one call, however long."""

        async def begin() -> AsyncIterator[ObjectMeta]:
            return self._store.list(prefix)

        async for meta in await self._call(self._next("list", prefix), begin):
            yield meta

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object atomically."""
        return await self._call(self._next("put", key), lambda: self._store.put(key, data))

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Write the chunks; the object appears whole or not at all."""
        return await self._call(self._next("put_stream", key), lambda: self._store.put_stream(key, chunks))

    async def delete(self, key: str) -> None:
        """Remove the object."""
        await self._call(self._next("delete", key), lambda: self._store.delete(key))

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the object."""
        return await self._call(self._next("copy", source), lambda: self._store.copy(source, target))

    async def close(self) -> None:
        """Close the wrapped store."""
        await self._store.close()


class CountingStore(_AroundStore):
    """Counts what passes.

    Attributes:
        requests: Calls by operation, failed ones too. `get_ranges` is one call, whatever the store makes of it.
        bytes: Bytes of content read or written by operation.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    async def _call(self, call: Call, action: Callable[[], Awaitable[R]]) -> R:
        self.requests[call.operation] += 1
        result = await action()
        self.bytes[call.operation] += _content_bytes(call.operation, result)
        return result


class DelayedStore(_AroundStore):
    """Makes calls wait before they reach the store.

    Args:
        store: The store that answers.
        delay_s: Pure function that says how long a call waits.
    """

    def __init__(self, store: Store, delay_s: Callable[[Call], float]) -> None:
        super().__init__(store)
        self._delay_s = delay_s

    async def _call(self, call: Call, action: Callable[[], Awaitable[R]]) -> R:
        await asyncio.sleep(self._delay_s(call))
        return await action()


class FailingStore(_AroundStore):
    """Makes chosen calls fail or answer wrong bytes.

    Args:
        store: The store that answers the others.
        decide: Pure function that gives the fault of a call, or None.
    """

    def __init__(self, store: Store, decide: Callable[[Call], Fault | None]) -> None:
        super().__init__(store)
        self._decide = decide

    async def _call(self, call: Call, action: Callable[[], Awaitable[R]]) -> R:
        match self._decide(call):
            case Fail(kind):
                uri = join_uri(self.url, call.key) if call.operation != "list" else self.url
                raise error_from_kind(kind, f"injected failure ({kind}) of {call.operation} of {uri}", uri)
            case Flip(offset):
                return _flipped(await action(), offset)
        return await action()


def _content_bytes(operation: str, result: object) -> int:
    match result:
        case builtins.list():
            return sum(_content_bytes(operation, buffer) for buffer in result)
        case bytes() | bytearray() | memoryview():
            return memoryview(result).nbytes
        case ObjectMeta() if operation in ("put", "put_stream"):
            return result.size_bytes
    return 0


def _flipped(result: R, offset: int) -> R:
    match result:
        case builtins.list():
            return cast("R", [_flipped(buffer, offset) for buffer in result])
        case bytes() | bytearray() | memoryview() if len(result):
            wrong = bytearray(result)
            wrong[offset % len(wrong)] ^= 1
            return cast("R", bytes(wrong))
    return result

"""A store for zarr 3: arrays and groups of any origin, read through the cache.

Each value is read from one content of its object, and a write goes to the origin, whole or not at all. zarr asks for
many chunks at once; each waits in a thread of a small pool, which a forked child makes anew.
"""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

try:
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
except ImportError as missing:
    raise ImportError("ZarrStore needs zarr 3: pip install 'tiered-dataflow[zarr]'") from missing

import contextlib

from cache.config import CacheConfig
from cache.objects import CachedObjects, ObjectOptions
from connectors.errors import NotFoundError
from connectors.objects import ObjectMeta, join_uri, normalise_url

__all__ = ["ZarrStore"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_THREADS = 16


class ZarrStore(Store):
    """Chunks and metadata below a URL. Shared by threads, usable after a fork, picklable.

    Args:
        url: Where the array or group lies.
        cache: As in `cache.open_reader`: `"auto"`, None, the address of a daemon, or a `CacheConfig`.
        block_size_bytes: The unit of caching. A chunk below it is one block.
        max_age_s: How long a version that was looked up may be taken for the newest. For arrays that are not written
            any more: saves one request to the origin per chunk and read.
        read_only: Refuse writes.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        cache: str | CacheConfig | None = "auto",
        block_size_bytes: int = 4 * 1024 * 1024,
        max_age_s: float = 0.0,
        read_only: bool = False,
    ) -> None:
        super().__init__(read_only=read_only)
        self.url = normalise_url(url)
        self._objects = CachedObjects(ObjectOptions(cache, block_size_bytes, max_age_s))
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ZarrStore)
            and (self.url, self._objects.options) == (other.url, other._objects.options)
            and self.read_only == other.read_only
        )

    def __hash__(self) -> int:
        return hash((self.url, self._objects.options, self.read_only))

    def __repr__(self) -> str:
        return f"ZarrStore({self.url!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def with_read_only(self, read_only: bool = False) -> ZarrStore:
        """Return the same place with the other right; both share their connections."""
        other = ZarrStore.__new__(ZarrStore)
        other.__dict__.update(self.__getstate__(), _read_only=read_only, _is_open=False)
        return other

    def close(self) -> None:
        """Hang up on the cache and let the threads end; a later call starts both again."""
        super().close()
        self._objects.close()
        pool, self._pool = self._pool, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].shutdown(wait=False)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a value or a part of it; None where there is none."""
        return await self._in_thread(self.get_sync, key, prototype=prototype, byte_range=byte_range)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """As `get`, in the caller's thread."""
        wanted = _slice(byte_range)
        try:
            data = self._objects.read_slice(join_uri(self.url, key), wanted)
        except NotFoundError:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Any) -> builtins.list[Buffer | None]:
        """Return parts of values, in order."""
        return builtins.list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Say whether there is such a value."""
        try:
            await self.getsize(key)
        except NotFoundError:
            return False
        return True

    async def getsize(self, key: str) -> int:
        """Return a value's length in bytes; `NotFoundError` where there is none."""
        return (await self._in_thread(self._objects.pin, join_uri(self.url, key))).size_bytes

    async def getsize_prefix(self, prefix: str) -> int:
        """Return the bytes of all values below a prefix, by one listing."""
        folder = prefix and prefix.rstrip("/") + "/"
        return sum(meta.size_bytes for meta in await self._list(folder))

    async def set(self, key: str, value: Buffer) -> None:
        """Replace a value, atomically."""
        self._check_writable()
        await self._in_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """As `set`, in the caller's thread."""
        self._check_writable()
        if not isinstance(value, Buffer):
            raise TypeError(f"a value has to be a zarr Buffer, got {type(value).__name__}")
        self._objects.put(join_uri(self.url, key), value.to_bytes())

    async def delete(self, key: str) -> None:
        """Remove a value; a missing one is as good as removed."""
        self._check_writable()
        await self._in_thread(self.delete_sync, key)

    def delete_sync(self, key: str) -> None:
        """As `delete`, in the caller's thread."""
        self._check_writable()
        with contextlib.suppress(NotFoundError):
            self._objects.delete(join_uri(self.url, key))

    async def list(self) -> AsyncIterator[str]:
        """Yield every key."""
        for meta in await self._list(""):
            yield meta.key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield every key that begins with the prefix."""
        for meta in await self._list(prefix):
            yield meta.key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a prefix. The origin lists all that is below."""
        folder = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        names = {meta.key.removeprefix(folder).split("/", 1)[0] for meta in await self._list(folder)}
        for name in sorted(names):
            yield name

    async def _list(self, prefix: str) -> builtins.list[ObjectMeta]:
        """Return what begins with the prefix, keys relative to the store."""
        folder, slash, _ = prefix.rpartition("/")
        try:
            found = await self._in_thread(self._objects.list, join_uri(self.url, folder))
        except NotFoundError:
            return []
        whole = [ObjectMeta(folder + slash + meta.key, meta.size_bytes, meta.version) for meta in found]
        return [meta for meta in whole if meta.key.startswith(prefix)]

    async def _in_thread(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        pool = self._pool
        if pool is None or pool[0] != os.getpid():
            pool = self._pool = os.getpid(), ThreadPoolExecutor(_THREADS, thread_name_prefix="cache-zarr")
        return await asyncio.wrap_future(pool[1].submit(function, *args, **kwargs))


def _slice(byte_range: ByteRequest | None) -> slice:
    match byte_range:
        case None:
            return slice(None)
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(-suffix, None) if suffix else slice(0, 0)
    raise ValueError(f"Unexpected byte_range, got {byte_range!r}")

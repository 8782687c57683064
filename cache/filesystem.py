"""`tiered`: a file system of fsspec over the cache, put in front of a URL as `tiered::s3://bucket/key`.

Files are read by blocks through the cache, under the version that they had when they were opened: one that is replaced
meanwhile is an error, never a mix of two contents. Writes go to the origin and appear whole when the file is closed.
Folders are what the keys of objects make of them: making one does nothing, and an empty one does not exist.

Whoever opens the origin is the cache's server, with the credentials of its own environment; what fsspec would hand to
the file system behind (`target_options`) cannot reach it and is refused. fsspec insists on a package for the scheme
behind `::` even so; `tiered://s3://bucket/key` names the same file without one.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

try:
    from fsspec.callbacks import DEFAULT_CALLBACK
    from fsspec.implementations.chained import ChainedFileSystem
    from fsspec.utils import isfilelike
except ImportError as missing:
    raise ImportError("tiered:: needs fsspec: pip install 'tiered-dataflow[fsspec]'") from missing

from cache.config import CacheConfig
from cache.objects import ByteRange, CachedObjects, ObjectOptions, PinnedObject
from cache.tiered_file import UPLOAD_BYTES, TieredFile, chunks_of, describe_file
from connectors.errors import BadInputError, DataError, NotFoundError
from connectors.objects import normalise_url, split_uri

__all__ = ["TieredFileSystem"]

_DEFAULTS = ObjectOptions()
# fsspec makes a file system a URL; their connections are shared.
_shared: dict[ObjectOptions, CachedObjects] = {}


class TieredFileSystem(ChainedFileSystem):  # type: ignore[misc]
    """Files of an origin, read through the cache. Shared by threads, usable after a fork, picklable.

    Args:
        target_protocol: The scheme of paths without one: what stands behind `tiered::`.
        target_options: Refused unless empty; the cache's server has credentials and endpoint from its environment.
        cache: As in `cache.open_reader`: `"auto"`, None, the address of a daemon, or a `CacheConfig`.
        block_size_bytes: The unit of caching; 1 MiB suits random access.
        max_age_s: How long a looked-up version may be taken for the newest; see `ObjectOptions`.
        fo: The path behind `::`, which fsspec hands over and which each call names again.
        storage_options: As every fsspec file system takes.
    """

    protocol = "tiered"
    cachable = False
    root_marker = ""

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        *,
        cache: str | CacheConfig | None = _DEFAULTS.cache,
        block_size_bytes: int = _DEFAULTS.block_size_bytes,
        max_age_s: float = _DEFAULTS.max_age_s,
        fo: str | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(**storage_options)
        if target_options:
            raise BadInputError(
                f"tiered:: cannot pass {', '.join(sorted(target_options))} to the server of the cache, which opens the "
                "origin with the credentials and the endpoint of its own environment; set them there"
            )
        self._target = "file" if target_protocol == "local" else target_protocol
        options = ObjectOptions(cache, block_size_bytes, max_age_s)
        self._objects = _shared.setdefault(options, CachedObjects(options))
        # As fsspec's own chained file systems do: paths lose the origin's scheme too, once it is known.
        self._strip_protocol = self._stripped

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.storage_args, self.storage_options, self._objects)

    @property
    def fsid(self) -> str:
        """What names this file system."""
        return f"tiered::{self._target or ''}"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Describe a file, with its version, or a folder."""
        path = self._strip_protocol(path)
        uri = self._uri(path)
        try:
            pinned = self._objects.pin(uri)
        except NotFoundError:
            if self._objects.has_any(uri):
                return _folder(path)
            raise
        return describe_file(path, pinned.size_bytes, pinned.version)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Say whether there is such a file or folder. What keeps the origin from answering is an error, not a no."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """List a folder. The origin lists all that is below: a listing costs as much as `find`."""
        path = self._strip_protocol(path)
        found = self._listed(path, maxdepth=1, folders=True)
        if not found:
            found = {path: self.info(path)}
            if found[path]["type"] == "directory":
                return []
        return list(found.values()) if detail else list(found)

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **kwargs: Any
    ) -> Any:
        """Return every file below a folder, by one listing; for a file, itself; for nothing, nothing."""
        path = self._strip_protocol(path)
        found = self._listed(path, maxdepth=maxdepth, folders=withdirs)
        if found and withdirs and path:
            found = {path: _folder(path), **found}
        if not found and split_uri(self._uri(path))[1]:
            try:
                pinned = self._objects.pin(self._uri(path))
            except NotFoundError:
                pass
            else:
                found = {path: describe_file(path, pinned.size_bytes, pinned.version)}
        return found if detail else list(found)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return a file's bytes, or a slice of them."""
        return self._objects.read_slice(self._uri(path), slice(start, end))

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """Return slices of files, asked for together. With `on_error="return"` an error stands in its place."""
        if not isinstance(paths, list):
            raise TypeError("paths has to be a list")
        starts, ends = (value if isinstance(value, list) else [value] * len(paths) for value in (starts, ends))
        if not len(paths) == len(starts) == len(ends):
            raise BadInputError(f"got {len(paths)} paths, {len(starts)} starts and {len(ends)} ends")
        try:
            pins = {path: self._objects.pin(self._uri(path)) for path in dict.fromkeys(paths)}
            ranges = zip(paths, starts, ends, strict=True)
            return list(self._objects.read([self._range(pins[path], start, end) for path, start, end in ranges]))
        except DataError:
            if on_error != "return":
                raise
            return super().cat_ranges(paths, starts, ends, on_error="return")  # type: ignore[no-any-return]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write a file whole. `mode="create"` refuses one that exists, as far as a look before can tell."""
        if mode == "create":
            self._refuse_existing(path)
        self._objects.put(self._uri(path), value)

    def put_file(
        self, lpath: str, rpath: str, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        """Upload a local file; it appears whole."""
        if mode == "create":
            self._refuse_existing(rpath)
        if Path(lpath).is_dir():
            return
        with open(lpath, "rb") as file:
            callback.set_size(os.fstat(file.fileno()).st_size)
            self._objects.put_stream(self._uri(rpath), chunks_of(file, callback))

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: IO[bytes] | None = None, **kwargs: Any
    ) -> None:
        """Download a file; under its local name it appears whole."""
        outfile = lpath if outfile is None and isfilelike(lpath) else outfile
        if outfile is None and self.isdir(rpath):
            Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        pinned = self._objects.pin(self._uri(rpath))
        callback.set_size(pinned.size_bytes)
        if outfile is not None:
            self._copy_out(pinned, outfile, callback)
            return
        target = Path(lpath)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            with open(partial, "xb") as file:
                self._copy_out(pinned, file, callback)
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file inside the origin."""
        source = self._uri(path1)
        try:
            self._objects.copy(source, self._uri(path2))
        except NotFoundError:
            if not self._objects.has_any(source):
                raise

    def rm_file(self, path: str) -> None:
        """Remove a file."""
        self._objects.delete(self._uri(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, and with `recursive` all that is below folders."""
        paths = self.expand_path(path, recursive=recursive, maxdepth=maxdepth)
        folders = {parent for found in paths for parent in _parents(found)} if recursive else set()
        for found in paths:
            if found not in folders:
                self.rm_file(found)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Do nothing: a folder is there when a file is in it."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there when a file is in it."""

    def rmdir(self, path: str) -> None:
        """Do nothing to an empty folder; refuse another."""
        if self._objects.has_any(self._uri(path)):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Do nothing: no listing is kept."""

    def close(self) -> None:
        """Hang up on the cache, also for other file systems with the same options; they connect again."""
        self._objects.close()

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_type: str = "none",
        cache_options: Mapping[str, Any] | None = None,
        size: int | None = None,
        version: str | None = None,
        **kwargs: Any,
    ) -> TieredFile:
        if mode not in ("rb", "wb", "xb"):
            raise BadInputError(f"{path}: tiered:: opens files as rb, wb and xb, not {mode}; write the whole file")
        uri = self._uri(path)
        if mode == "xb":
            self._refuse_existing(path)
        pinned = None
        if mode == "rb":
            pinned = self._objects.pin(uri) if size is None or version is None else PinnedObject(uri, size, version)
        return TieredFile(
            self,
            path,
            mode,
            block_size or UPLOAD_BYTES,
            autocommit,
            cache_type=cache_type,
            cache_options=dict(cache_options or {}),
            objects=self._objects,
            uri=uri,
            pinned=pinned,
        )

    def _stripped(self, path: Any) -> Any:
        if isinstance(path, list):
            return [self._stripped(one) for one in path]
        path = super()._strip_protocol(path)
        if self._target is not None:
            path = path.removeprefix(f"{self._target}://")
        return path

    def _uri(self, path: str) -> str:
        path = self._strip_protocol(path)
        if "://" in path:
            return normalise_url(path)
        if self._target is None:
            raise BadInputError(f"{path!r} has no scheme; write tiered::s3://bucket/key or tiered://s3://bucket/key")
        if self._target == "file":
            return normalise_url("/" + path.lstrip("/"))
        return normalise_url(f"{self._target}://{path.lstrip('/')}")

    def _listed(self, path: str, *, maxdepth: int | None, folders: bool) -> dict[str, dict[str, Any]]:
        if maxdepth is not None and maxdepth < 1:
            raise ValueError("maxdepth must be at least 1")
        try:
            objects = self._objects.list(self._uri(path))
        except NotFoundError:
            return {}
        found: dict[str, dict[str, Any]] = {}
        for meta in objects:
            parts = meta.key.split("/")
            if folders:
                for depth in range(1, min(len(parts) - 1, maxdepth or len(parts)) + 1):
                    name = "/".join([path, *parts[:depth]])
                    found.setdefault(name, _folder(name))
            if maxdepth is None or len(parts) <= maxdepth:
                name = f"{path}/{meta.key}"
                found[name] = describe_file(name, meta.size_bytes, meta.version)
        return dict(sorted(found.items()))

    def _range(self, pinned: PinnedObject, start: int | None, end: int | None) -> ByteRange:
        begin, stop, _ = slice(start, end).indices(pinned.size_bytes)
        return ByteRange(pinned, begin, max(begin, stop))

    def _refuse_existing(self, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def _copy_out(self, pinned: PinnedObject, file: IO[bytes], callback: Any) -> None:
        for chunk in self._objects.chunks(pinned):
            file.write(chunk)
            callback.relative_update(len(chunk))


def _rebuilt(
    cls: type[TieredFileSystem], args: Sequence[Any], options: Mapping[str, Any], objects: CachedObjects
) -> TieredFileSystem:
    """Unpickle: a process without a way to this cache takes the one that came along, and so shares its server."""
    _shared.setdefault(objects.options, objects)
    return cls(*args, **options)


def _folder(name: str) -> dict[str, Any]:
    return {"name": name, "size": 0, "type": "directory"}


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path

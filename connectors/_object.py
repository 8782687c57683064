"""Object stores by obstore: S3 and what speaks its language, Google, Azure, plain HTTP.

A read insists on a version twice: it is sent as `If-Match`, and the etag that comes back is compared, since not every
server honours the header. Parts of one read are compared with each other too.

The tokio runtime inside obstore does not survive a fork: the child hangs on its first call. The process that first
used it is therefore remembered, and a forked child is refused instead.
"""

from __future__ import annotations

import asyncio
import builtins
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from connectors._first_answer import FirstAnswer
from connectors._object_errors import translated
from connectors.coalesce import coalesce
from connectors.errors import BadInputError, ChangedError, DataError, ErrorKind, TransientError
from connectors.limits import RequestLimits, limits_from_environment
from connectors.objects import ObjectMeta, Span, check_key, check_prefix, join_uri
from connectors.protocols import Buffer

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore import ObjectMeta as ForeignMeta

__all__ = ["ObjectStore", "open_az", "open_gs", "open_http", "open_s3"]

R = TypeVar("R")

# Two ranges this near cost less as one request: at 10 ms to the first byte and 100 MB/s, a request is worth 1 MB.
_MAX_GAP_BYTES = 1 << 20
_MAX_REQUEST_BYTES = 16 << 20
_MAX_REQUESTS = 16
_PART_BYTES = 8 << 20
_MAX_PARTS_IN_FLIGHT = 8
_LIST_PAGE = 1000
# Of what a store answers, before it is believed to be unable: a body is short, and a range is answered with something
# else, also where a server that can do better has too much to do (SeaweedFS gives the whole object now and then).
_MAX_ANSWERS = 3
_FIRST_PAUSE_S = 0.1
# Pauses are drawn between the first and so many times the one before: at 2 they would hardly grow.
_PAUSE_GROWTH = 3
# What is asked for where every answer is a good one.
_ANY_KEY = "dataset.json"
_CONFIG_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_")

_first_user_pid: int | None = None


class ObjectStore:
    """A bucket, container or host; keys are object names.

    Args:
        url: The root, such as `s3://bucket`.
        make_client: Makes one of obstore's stores, with so many retries.
        limits: See there.
    """

    def __init__(self, url: str, make_client: Callable[[int], Any], limits: RequestLimits) -> None:
        self.url = url
        self._make_client = make_client
        self._client = make_client(limits.max_retries)
        self._first_answer = FirstAnswer(limits.first_answer_s, self._knock)

    async def get(self, key: str, *, version: str | None = None) -> Buffer:
        """Return the whole object."""
        body, _ = await self._fetch(key, None, version)
        return body

    async def get_range(self, key: str, span: Span, *, version: str | None = None) -> Buffer:
        """Return exactly the bytes of the span."""
        if not span.length:  # which HTTP cannot ask for
            return (await self.get_ranges(key, [span], version=version))[0]
        body, _ = await self._fetch(key, span, version)
        return body

    async def get_ranges(self, key: str, spans: Sequence[Span], *, version: str | None = None) -> builtins.list[Buffer]:
        """Return one view per span; near spans share a request, and requests run side by side up to a limit."""
        if not spans:
            return []
        requests = coalesce(spans, max_gap_bytes=_MAX_GAP_BYTES, max_span_bytes=_MAX_REQUEST_BYTES)
        gate = asyncio.Semaphore(_MAX_REQUESTS)

        async def fetch(span: Span) -> tuple[memoryview, ObjectMeta]:
            async with gate:
                return await self._fetch(key, span, version)

        answers = await _all([fetch(request.span) for request in requests])
        meta = answers[0][1] if answers else await self.head(key)
        for found in [meta, *(other for _, other in answers)]:
            if found.version != (version or meta.version):
                raise self._changed(key)
        buffers: builtins.list[Buffer] = [b""] * len(spans)
        for request, (body, _) in zip(requests, answers, strict=True):
            for position in request.members:
                begin = spans[position].offset - request.span.offset
                buffers[position] = body[begin : begin + spans[position].length]
        for span in spans:  # those without a byte were in no request
            self._check_range(key, span, meta.size_bytes)
        return buffers

    async def head(self, key: str) -> ObjectMeta:
        """Return size and version."""
        return _meta(await self._ask(key, lambda: obstore.head_async(self._client, key)))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectMeta]:
        """Yield the objects whose key begins with `prefix`, sorted by key.

        All of them are held in memory first: not every server lists in order. The empty objects that some tools write
        to stand for folders, whose keys end in a slash that the client leaves out, are left out where the folder holds
        something, or another object has the name.

        Raises:
            BadInputError: Two objects that are not empty have keys that differ only by a slash at the end.
        """
        folder, _ = check_prefix(prefix)
        pages: AsyncIterator[Sequence[ForeignMeta]] | None = None

        async def next_page() -> Sequence[ForeignMeta] | None:
            nonlocal pages
            pages = pages or obstore.list(self._client, folder or None, chunk_size=_LIST_PAGE)
            return await anext(pages, None)

        found: builtins.list[ObjectMeta] = []
        while (page := await self._call(folder, next_page)) is not None:
            found += [_meta(foreign) for foreign in page if foreign["path"].startswith(prefix)]
        for meta in _without_markers(found):
            yield meta

    async def put(self, key: str, data: Buffer) -> ObjectMeta:
        """Replace the object atomically."""
        view = memoryview(data).cast("B")
        return await self._put(key, view, lambda: view.nbytes)

    async def put_stream(self, key: str, chunks: AsyncIterable[Buffer]) -> ObjectMeta:
        """Upload the chunks in parts; the object appears when the last is in."""
        size_bytes = 0
        failure: BaseException | None = None

        async def counted() -> AsyncIterator[Buffer]:
            nonlocal size_bytes, failure
            try:
                async for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    size_bytes += view.nbytes
                    if view:
                        yield view
            except BaseException as error:
                failure = error  # the caller's own, which is not to be taken for the store's
                raise

        try:
            return await self._put(key, counted(), lambda: size_bytes)
        except DataError:
            if failure is None:
                raise
        try:
            raise failure
        finally:
            del failure  # it holds this frame, and with it what all callers hold

    async def delete(self, key: str) -> None:
        """Remove the object. Stores delete what is not there without a word, so it is looked for first."""
        await self.head(key)
        await self._ask(key, lambda: obstore.delete_async(self._client, key))

    async def copy(self, source: str, target: str) -> ObjectMeta:
        """Copy the object inside the store, without moving its bytes through here. S3 takes up to 5 GiB."""
        check_key(target)
        await self._ask(source, lambda: obstore.copy_async(self._client, source, target))
        return await self.head(target)

    async def close(self) -> None:
        """Do nothing: the connections end with the last reference to the client."""

    async def _fetch(self, key: str, span: Span | None, version: str | None) -> tuple[memoryview, ObjectMeta]:
        """Return exactly what was asked for, and what the store says of the object that it is from."""
        options: GetOptions = {}
        if version is not None and version.startswith('"'):  # a weak etag never matches, and no etag cannot be sent
            options["if_match"] = version
        if span is not None:
            options["range"] = (span.offset, span.end)

        async def receive() -> tuple[ObjectMeta, memoryview]:
            result = await obstore.get_async(self._client, key, options=options)
            return _meta(result.meta), memoryview(await result.bytes_async())

        failure: DataError | None = None
        for _ in range(_MAX_ANSWERS):
            try:
                meta, body = await self._ask(key, receive)
            except DataError as error:
                if error.kind is not ErrorKind.PROTOCOL:
                    raise
                failure = error
                continue
            failure = None
            if version is not None and meta.version != version:
                raise self._changed(key)
            if span is not None:
                self._check_range(key, span, meta.size_bytes)
            if body.nbytes == (meta.size_bytes if span is None else span.length):
                return body, meta
        uri = join_uri(self.url, key)
        try:
            raise failure or TransientError(
                f"the store gave fewer bytes of {uri} than it said", kind=ErrorKind.SHORT_BODY, uri=uri
            )
        finally:
            del failure  # it holds this frame, and with it what all callers hold

    async def _put(self, key: str, source: Any, size_bytes: Callable[[], int]) -> ObjectMeta:
        result = await self._ask(
            key,
            lambda: obstore.put_async(
                self._client, key, source, chunk_size=_PART_BYTES, max_concurrency=_MAX_PARTS_IN_FLIGHT
            ),
        )
        # Some gateways give no etag for an upload in parts.
        return ObjectMeta(key, size_bytes(), result["e_tag"]) if result["e_tag"] else await self.head(key)

    async def _ask(self, key: str, request: Callable[[], Awaitable[R]]) -> R:
        check_key(key)
        return await self._call(key, request)

    async def _call(self, name: str, request: Callable[[], Awaitable[R]]) -> R:
        """Make one request; only our errors come out, and nothing of the provider's stays attached to them."""
        if _first_user_pid != os.getpid():
            _refuse_after_fork(join_uri(self.url, name))
        if self._first_answer.has_come:
            return await self._translated(name, request)
        return await self._first_answer.await_with(self._translated(name, request), join_uri(self.url, name))

    async def _translated(self, name: str, request: Callable[[], Awaitable[R]]) -> R:
        try:
            return await request()
        except (BaseError, OSError, ValueError) as error:
            failure = translated(error, join_uri(self.url, name))
        try:
            raise failure
        finally:
            del failure  # it holds this frame, and with it what all callers hold

    async def _knock(self) -> object:
        client = self._make_client(0)
        return await self._translated(_ANY_KEY, lambda: obstore.head_async(client, _ANY_KEY))

    def _check_range(self, key: str, span: Span, size_bytes: int) -> None:
        if span.end > size_bytes:
            uri = join_uri(self.url, key)
            raise BadInputError(
                f"bytes {span.offset} to {span.end} of {uri} reach past its end at {size_bytes}",
                kind=ErrorKind.BAD_RANGE,
                uri=uri,
            )

    def _changed(self, key: str) -> ChangedError:
        uri = join_uri(self.url, key)
        return ChangedError(f"{uri} was changed since it was opened; open the dataset again", uri=uri)


def open_s3(url: str, *, limits: RequestLimits | None = None, **config: Any) -> ObjectStore:
    """Open a bucket of S3 or of a server that speaks its language (Ceph, MinIO, SeaweedFS, OSS, OBS).

    The environment gives `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
    `AWS_REGION` and the rest that obstore reads; `config` overrides it (`endpoint=`, `access_key_id=`,
    `skip_signature=` ...). An endpoint that begins with `http://` allows plain HTTP.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    # One object at a time is deleted here, and not every server knows the bulk request.
    config = {"disable_bulk_delete": True} | config
    return _open(S3Store, url, url.partition("://")[2], names, limits, config)


def open_gs(url: str, *, limits: RequestLimits | None = None, **config: Any) -> ObjectStore:
    """Open a bucket of Google Cloud Storage; credentials as its own tools find them, or by `config`."""
    return _open(GCSStore, url, url.partition("://")[2], ("GOOGLE_BASE_URL",), limits, config)


def open_az(url: str, *, limits: RequestLimits | None = None, **config: Any) -> ObjectStore:
    """Open a container of Azure Blob Storage, `az://container`; the environment or `config` names the account."""
    return _open(AzureStore, url, url.partition("://")[2], ("AZURE_STORAGE_ENDPOINT",), limits, config)


def open_http(url: str, *, limits: RequestLimits | None = None, **config: Any) -> ObjectStore:
    """Open a web server for reading. Listing and writing work where it speaks WebDAV."""
    return _open(HTTPStore, url, url, (), limits, config)


def _open(
    make: Callable[..., Any],
    url: str,
    name: str,
    endpoints: Sequence[str],
    limits: RequestLimits | None,
    config: dict[str, Any],
) -> ObjectStore:
    limits = limits or limits_from_environment()
    client_options = {
        "allow_http": _is_plain_http(name, endpoints, config),
        "connect_timeout": timedelta(seconds=limits.connect_timeout_s),
        "read_timeout": timedelta(seconds=limits.read_timeout_s),
        "timeout": timedelta(seconds=limits.request_timeout_s),
    } | config.pop("client_options", {})
    retry_config = {
        "retry_timeout": timedelta(seconds=limits.retry_timeout_s),
        "backoff": {
            "init_backoff": timedelta(seconds=min(_FIRST_PAUSE_S, limits.max_pause_s)),
            "max_backoff": timedelta(seconds=limits.max_pause_s),
            "base": _PAUSE_GROWTH,
        },
    }

    def make_client(max_retries: int) -> Any:
        retries = {**retry_config, "max_retries": max_retries}
        return make(name, client_options=client_options, retry_config=retries, **config)

    try:
        return ObjectStore(url, make_client, limits)
    except UnknownConfigurationKeyError as error:
        failure = BadInputError(f"cannot open {url}: {str(error).splitlines()[0]}", uri=url)
    except (BaseError, OSError, ValueError, TypeError):
        # Their words may hold the value of an option, and so a secret; ours name what was given.
        given = sorted({*config, *(key for key in os.environ if key.startswith(_CONFIG_VARIABLES))})
        failure = BadInputError(f"cannot open {url}: its settings do not fit together; set are {given}", uri=url)
    raise failure


def _is_plain_http(name: str, endpoints: Sequence[str], config: dict[str, Any]) -> bool:
    given = [name, *(value for value in config.values() if isinstance(value, str))]
    return any(value.startswith("http://") for value in [*given, *(os.environ.get(key, "") for key in endpoints)])


def _refuse_after_fork(uri: str) -> None:
    """Remember the first process that uses the client; refuse its forked children."""
    global _first_user_pid
    if _first_user_pid is not None:
        raise BadInputError(
            f"{uri} cannot be read here: process {os.getpid()} was forked from {_first_user_pid}, which had used "
            "an object store before; read through the cache, or start workers by 'spawn' or 'forkserver'",
            uri=uri,
        )
    _first_user_pid = os.getpid()


def _meta(foreign: ForeignMeta) -> ObjectMeta:
    size_bytes = foreign["size"]
    # A server without etags: the best that is left is the time, in whole seconds.
    version = foreign["e_tag"] or f"{foreign['last_modified'].isoformat()}-{size_bytes}"
    return ObjectMeta(foreign["path"], size_bytes, version)


def _without_markers(found: Iterable[ObjectMeta]) -> Iterator[ObjectMeta]:
    folders = {meta.key.rpartition("/")[0] for meta in found}
    for key, group in groupby(sorted(found, key=lambda meta: meta.key), key=lambda meta: meta.key):
        same = list(group)
        full = [meta for meta in same if meta.size_bytes]
        if len(full) > 1:
            raise BadInputError(f"two objects have the key {key!r}, one with a slash at its end; rename one of them")
        if full or key not in folders:
            yield (full or same)[0]


async def _all(requests: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
    """Run side by side; the first failure cancels the rest and is raised."""
    tasks: list[asyncio.Task[R]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks += [group.create_task(request) for request in requests]
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
        failures.__traceback__ = None  # the group's frame holds it, and it that frame
    else:
        return [task.result() for task in tasks]
    try:
        raise failure
    finally:
        del failure, tasks  # they hold this frame, and with it what all callers hold

"""From a URL to the store that serves it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

from connectors.errors import BadInputError
from connectors.objects import split_uri
from connectors.protocols import Store
from connectors.wrappers import PrefixStore

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["open_store"]

_GROUP = "dataflow.stores"

# Modules are imported when their scheme is first opened: nobody pays for a client that is not used.
_BUILT_IN = {
    "file": "connectors._posix:PosixStore",
    "memory": "connectors._memory:MemoryStore",
    "s3": "connectors._object:open_s3",
    "gs": "connectors._object:open_gs",
    "az": "connectors._object:open_az",
    "http": "connectors._object:open_http",
    "https": "connectors._object:open_http",
}


def open_store(url: str | os.PathLike[str], **options: Any) -> Store:
    """Open the store behind a URL; keys are relative to the URL.

    Schemes are looked up among those built in, then among the entry points of the group `dataflow.stores` (a scheme,
    and a callable that takes the root URL and the options), then in fsspec where that is installed.

    Nothing is contacted here: a bucket that does not exist shows at the first read.

    Args:
        url: A path, or a URL such as `s3://bucket/prefix`.
        options: What the store of this scheme takes, credentials among them; they override the environment.

    Raises:
        BadInputError: The URL or an option cannot be used, or nothing serves the scheme.
    """
    root, prefix = split_uri(url)
    scheme = root.split(":", 1)[0]
    opener = _find_opener(scheme)
    try:
        signature(opener).bind(root, **options)
    except TypeError as error:  # names an option, never its value
        raise BadInputError(f"cannot open a {scheme}:// store: {error}") from None
    store = opener(root, **options)
    return PrefixStore(store, prefix) if prefix else store


def _find_opener(scheme: str) -> Callable[..., Store]:
    if scheme in _BUILT_IN:
        return _load(_BUILT_IN[scheme])
    # Imported here: it brings e-mail and zip files, which every start of a cache server would wait for.
    from importlib.metadata import entry_points

    plugins = entry_points(group=_GROUP)
    if scheme in plugins.names:
        return _load_plugin(plugins[scheme])
    if not _load("connectors._fsspec:knows_scheme")(scheme):
        known = ", ".join(sorted({*_BUILT_IN, *plugins.names}))
        raise BadInputError(
            f"no store serves {scheme}://; known are {known}, and with `pip install tiered-dataflow[fsspec]` "
            "every protocol of fsspec whose package is installed"
        )
    return _load("connectors._fsspec:open_fsspec")


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _load_plugin(plugin: EntryPoint) -> Callable[..., Store]:
    try:
        opener: Callable[..., Store] = plugin.load()
    except Exception as error:
        raise BadInputError(f"the store plug-in {plugin.name} = {plugin.value} cannot be loaded: {error}") from error
    return opener

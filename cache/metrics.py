"""A cache server's numbers for Prometheus, and its health, over HTTP.

    GET /metrics    the numbers of `stats`, in Prometheus' text format
    GET /healthz    200 while the server answers a client, 503 when it does not within a few seconds

Runs in threads of its own and asks for the numbers as any client does, so a healthy answer means that clients have one,
and a scraper that stalls costs a thread and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

try:
    from prometheus_client import CollectorRegistry, make_wsgi_app
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError("metrics need prometheus-client: pip install 'tiered-dataflow[metrics]'") from missing

from connectors.errors import BadInputError, DataError

__all__ = ["families", "parse_endpoint", "serve_metrics"]

_log = logging.getLogger(__name__)

_PREFIX = "dataflow_cache_"
_IDLE_TIMEOUT_S = 10
_ACCEPT_AGAIN_S = 0.1

_TIER_GAUGES = {
    "capacity_bytes": "Most bytes the tier may take on its medium.",
    "used_bytes": "Bytes the tier takes on its medium, or has promised to.",
    "blocks": "Blocks in the tier.",
}
_TIER_COUNTERS = {
    "hits": "Blocks that were asked for and found in the tier.",
    "hit_bytes": "Their bytes.",
    "insertions": "Blocks that were let in.",
    "written_bytes": "Bytes written to the medium.",
    "evictions": "Blocks that left for others.",
    "evicted_bytes": "Bytes freed on the medium by them.",
    "refused": "Blocks that were offered and not let in.",
    "corrupt": "Blocks that did not match their checksums and were dropped.",
    "errors": "Failed calls to the medium.",
}
_DISK_STATES = ("normal", "unstable", "down")
_ORIGIN_COUNTERS = {
    "requests": "Requests to origins.",
    "blocks": "Blocks that came from origins.",
    "bytes": "Bytes that came from origins.",
    "errors": "Requests to origins that failed.",
    "throttled": "Of these, those that the origin refused as too many.",
    "hedges_sent": "Requests that were sent a second time, as the first was slow.",
    "hedges_won": "Of these, those that were answered first.",
}
_ORIGIN_GAUGES = {"max_requests": "Requests to origins that may be under way now."}
_PREFETCH_COUNTERS = {
    "issued": "Blocks that were fetched ahead of their readers.",
    "issued_bytes": "Their bytes.",
    "useful": "Blocks that were there when their reader came.",
    "late": "Blocks that were on their way when their reader came.",
    "wasted": "Blocks that were given up, passed by or displaced before a reader came.",
    "failed": "Blocks that could not be had ahead of time.",
    "resident": "Planned blocks that needed no fetch.",
}
_PREFETCH_GAUGES = {
    "plans": "Plans of readers now.",
    "window_bytes": "Most bytes to be fetched ahead now.",
    "ahead_bytes": "Bytes that were fetched ahead, or are on their way, and not read yet.",
    "rate_bytes_s": "Bytes a second that readers take of what was fetched ahead, at their fastest lately.",
    "latency_s": "Seconds that a slow fetch takes.",
}


def families(stats: dict[str, Any]) -> list[Metric]:
    """Turn a server's `stats` into metrics. Pure."""
    tiers = [*stats["tiers"], stats["ring"]]
    found: list[Metric] = []
    for name, help_text in _TIER_GAUGES.items():
        gauge = GaugeMetricFamily(f"{_PREFIX}tier_{name}", help_text, labels=["tier"])
        for tier in tiers:
            gauge.add_metric([tier["name"]], tier[name])
        found.append(gauge)
    for name, help_text in _TIER_COUNTERS.items():
        counter = CounterMetricFamily(f"{_PREFIX}tier_{name}", help_text, labels=["tier"])
        for tier in tiers:
            counter.add_metric([tier["name"]], tier[name])
        found.append(counter)
    faulty = GaugeMetricFamily(f"{_PREFIX}tier_faulty", "1 while the medium fails, else 0.", labels=["tier"])
    for tier in tiers:
        faulty.add_metric([tier["name"]], int(tier["fault"] is not None))
    found.append(faulty)
    state = GaugeMetricFamily(f"{_PREFIX}tier_state", "1 for the state of the disk, else 0.", labels=["tier", "state"])
    full = GaugeMetricFamily(f"{_PREFIX}tier_full", "1 while the disk is full, else 0.", labels=["tier"])
    for tier in tiers:
        if "state" in tier:
            for name in _DISK_STATES:
                state.add_metric([tier["name"], name], int(tier["state"] == name))
            full.add_metric([tier["name"]], int(tier["full"] is not None))
    found += [state, full, *_kept(stats)]
    for name, help_text in _PREFETCH_COUNTERS.items():
        counter = CounterMetricFamily(f"{_PREFIX}prefetch_{name}", help_text, labels=["kind"])
        for kind, counts in stats["prefetch"]["kinds"].items():
            counter.add_metric([kind], counts[name])
        found.append(counter)
    found += [_counter(f"origin_{name}", text, stats["origin"][name]) for name, text in _ORIGIN_COUNTERS.items()]
    for group, gauges in (("origin", _ORIGIN_GAUGES), ("prefetch", _PREFETCH_GAUGES)):
        found += [_gauge(f"{group}_{name}", text, stats[group][name]) for name, text in gauges.items()]
    server = stats["server"]
    return [
        *found,
        _counter("blocks_requested", "Blocks that clients asked for.", stats["blocks_requested"]),
        _counter("joined", "Blocks that were asked for while another's fetch of them ran.", stats["joined"]),
        _counter("requests", "Requests of clients.", server["requests"]),
        _gauge("connections", "Clients connected now.", server["connections"]),
        _gauge("uptime_seconds", "Seconds since the start.", server["uptime_s"]),
    ]


def _kept(stats: dict[str, Any]) -> list[Metric]:
    pinned = GaugeMetricFamily(f"{_PREFIX}tier_pinned_bytes", "Bytes that pins protect.", labels=["tier"])
    used = GaugeMetricFamily(
        f"{_PREFIX}quota_used_bytes", "Bytes that the blocks under a quota take.", labels=["tier", "quota"]
    )
    limit = GaugeMetricFamily(f"{_PREFIX}quota_limit_bytes", "Most bytes that they may take.", labels=["tier", "quota"])
    for tier in stats["tiers"]:
        pinned.add_metric([tier["name"]], tier["pinned_bytes"])
        for quota in tier["quotas"]:
            used.add_metric([tier["name"], quota["name"]], quota["used_bytes"])
            limit.add_metric([tier["name"], quota["name"]], quota["limit_bytes"])
    retention = stats["retention"]
    return [
        pinned,
        used,
        limit,
        _gauge("pins", "Pins of operators now.", len(retention["pins"])),
        _counter("expired", "Blocks that were removed because they were too old.", retention["expired"]),
        _counter("failed_sweeps", "Searches for blocks that are too old that failed.", retention["failed_sweeps"]),
    ]


def parse_endpoint(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`; IPv6 hosts stand in brackets.

    Raises:
        BadInputError: It is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise BadInputError(f"an endpoint is HOST:PORT, such as 127.0.0.1:9464, got {text!r}")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def serve_metrics(endpoint: str, read_stats: Callable[[], dict[str, Any]]) -> Iterator[int]:
    """Serve until the context ends; yields the port, which is a free one where `endpoint` says 0.

    Args:
        endpoint: `HOST:PORT`. Whoever reaches it reads the numbers, so loopback unless a network may.
        read_stats: Returns a server's `stats`, as `CacheClient.stats` does; called in this service's threads. A
            `DataError` means ill health.

    Raises:
        BadInputError: The endpoint is malformed or cannot be bound.
    """
    host, port = parse_endpoint(endpoint)
    registry = CollectorRegistry()
    registry.register(_Stats(read_stats))
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        try:
            if path == "/metrics":
                return cast("Iterable[bytes]", metrics(environ, start_response))
            if path == "/healthz":
                read_stats()
                return _say(start_response, "200 OK", b"ok\n")
        except DataError as error:
            return _say(start_response, "503 Service Unavailable", f"{error}\n".encode())
        return _say(start_response, "404 Not Found", b"there are /metrics and /healthz\n")

    try:
        server_class = _Server6 if ":" in host else _Server
        server = make_server(host, port, answer, server_class=server_class, handler_class=_Handler)
    except OSError as error:
        raise BadInputError(f"cannot serve metrics at {endpoint}: {error.strerror or error}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="cache-metrics")
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Stats(Collector):
    def __init__(self, read_stats: Callable[[], dict[str, Any]]) -> None:
        self._read_stats = read_stats

    def collect(self) -> Iterable[Metric]:
        return families(self._read_stats())

    def describe(self) -> Iterable[Metric]:
        return []


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a scraper that stalls must not keep the daemon from ending

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # out of descriptors: those who wait, wait on, and the base would ask again at once
            time.sleep(_ACCEPT_AGAIN_S)
            raise


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base's name
        _log.debug(format, *args)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(_PREFIX + name, help_text, value=value)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, help_text, value=value)


def _say(start_response: Callable[..., Any], status: str, body: bytes) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]

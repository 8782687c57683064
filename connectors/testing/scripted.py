"""An HTTP server on loopback that answers what a function says: refusals, throttling, cut bodies, silence."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "Exchange", "ScriptedServer", "serve_objects"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it arrived.

    Attributes:
        method: `GET`, `HEAD`, `PUT` ...
        path: The decoded path without its leading slash and without a query.
        headers: Names in lower case.
        number: How many requests came before.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One response.

    Attributes:
        status: HTTP status.
        headers: Sent beside `Content-Length`, which is the length of `body` unless it is given here; what is empty is
            not sent.
        body: The whole body.
        cut_after_bytes: Close the connection after so many bytes of the body.
        silent: Say nothing until the server stops.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after_bytes: int | None = None
    silent: bool = False


class ScriptedServer:
    """A server whose every answer `script` chooses; a context manager that serves inside its block.

    Attributes:
        requests: What arrived so far.
    """

    def __init__(self, script: Callable[[Exchange], Answer]) -> None:
        self.script = script
        self.requests: list[Exchange] = []
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        """The root of the server, `http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _exchange(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        with self._lock:
            path = unquote(urlsplit(target).path).lstrip("/")
            exchange = Exchange(method, path, headers, len(self.requests))
            self.requests.append(exchange)
            return self.script(exchange)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = server._exchange(self.command, self.path, headers)
                if answer.silent:
                    server._stopped.wait()
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[: answer.cut_after_bytes])
                    self.close_connection = answer.cut_after_bytes is not None

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  http.server's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Stay quiet: `requests` is the log."""

        return Handler


def serve_objects(objects: Mapping[str, bytes]) -> Callable[[Exchange], Answer]:
    """Return a script that serves `objects` by path with ranges, etags and `If-Match`, read only."""

    def script(exchange: Exchange) -> Answer:
        if exchange.method not in ("GET", "HEAD"):
            return Answer(405)
        body = objects.get(exchange.path)
        if body is None:
            return Answer(404)
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if exchange.headers.get("if-match", etag) != etag:
            return Answer(412, headers)
        wanted = exchange.headers.get("range")
        if wanted is None:
            return Answer(200, headers | {"Content-Length": str(len(body))}, body)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last or len(body)) + 1, len(body))
        if begin >= len(body):
            return Answer(416, {"Content-Range": f"bytes */{len(body)}"})
        return Answer(206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(body)}"}, body[begin:end])

    return script

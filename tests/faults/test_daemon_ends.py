"""A daemon's end: the first signal lets it answer what it was asked, a second one does not wait, and data stay."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from crc32c import crc32c

from cache.client import CacheClient, ClientOptions
from cache.connection import ServerGoneError
from cache.keys import BlockRef
from connectors.objects import normalise_url
from connectors.testing.scripted import ScriptedServer, serve_objects

BODY = bytes(range(250)) * 400


@contextlib.contextmanager
def daemon(address, *options):
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "listening" in process.stderr.readline()
            yield process
        finally:
            process.kill()


class Asking(threading.Thread):
    """Reads one block; keeps its bytes, or why there are none."""

    def __init__(self, address, ref):
        super().__init__()
        self.client = CacheClient(address, options=ClientOptions(max_attempts=1))
        self.ref = ref
        self.found = None
        self.start()

    def run(self):
        with contextlib.closing(self.client):
            try:
                self.found = bytes(self.client.read_blocks([self.ref])[0].view)
            except ServerGoneError as error:
                self.found = error


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_waits_for_what_is_under_way_and_a_second_one_does_not(tmp_path, monkeypatch, signals):
    asked, gate, serve = threading.Event(), threading.Event(), serve_objects({"x": BODY})

    def hold(exchange):
        asked.set()
        gate.wait()
        return serve(exchange)

    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    address = str(tmp_path / "cache.sock")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        ScriptedServer(hold) as origin,
        contextlib.ExitStack() as end,
    ):
        manager.bind(str(tmp_path / "notify"))
        end.callback(gate.set)
        process = end.enter_context(daemon(address))
        assert manager.recv(100) == b"READY=1"
        asking = Asking(address, BlockRef(f"{origin.url}/x", "digest", 0, len(BODY), crc32c(BODY)))
        asked.wait()
        process.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        if signals == 2:
            process.terminate()
            assert process.wait() == 128 + signal.SIGTERM
        gate.set()
        assert process.wait() == (0 if signals == 1 else 128 + signal.SIGTERM)
        asking.join()
    assert asking.found == BODY if signals == 1 else isinstance(asking.found, ServerGoneError)
    assert not os.path.exists(address)


@pytest.mark.parametrize("end", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGKILL]])
def test_what_is_on_disk_outlives_the_daemon_however_it_ended(tmp_path, end):
    path = tmp_path / "data.bin"
    path.write_bytes(BODY * 5)
    uri, length = normalise_url(path), len(BODY)
    refs = [BlockRef(uri, "digest", number * length, length, crc32c(BODY)) for number in range(5)]
    address, disk = (
        str(tmp_path / "cache.sock"),
        ["--ram", "0", "--disk", str(tmp_path / "disk"), "--disk-size", "8MiB"],
    )
    with daemon(address, *disk) as process, contextlib.closing(CacheClient(address)) as client:
        while {block.source for block in client.read_blocks(refs)} != {"disk"}:
            pass
        for number in end:
            process.send_signal(number)
        process.wait()
    path.unlink()
    with daemon(address, *disk), contextlib.closing(CacheClient(address)) as client:
        assert [bytes(block.view) for block in client.read_blocks(refs)] == [BODY] * 5
        assert client.stats()["origin"]["requests"] == 0

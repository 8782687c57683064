import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cache import private
from cache.address import answers, listen, remove_socket, unused_address
from cache.client import CacheClient, ClientOptions
from cache.config import CacheConfig, TierConfig
from cache.connection import Connection, ServerGoneError
from cache.private import ServerLog, start_server
from connectors.errors import BadInputError, DataError


@pytest.fixture
def address():
    return unused_address()


def ended(pid: int) -> bool:
    """Wait for a process that is not ours to end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=20)
    return not psutil.pid_exists(pid)


def test_a_server_answers_when_its_start_returns_and_ends_with_its_last_user(address):
    log = start_server(address, CacheConfig(), timeout_s=30)
    client = CacheClient(address)
    pid = client.stats()["server"]["pid"]
    assert str(address) in psutil.Process(pid).cmdline()
    assert os.getsid(pid) != os.getsid(0)
    client.close()
    assert ended(pid)
    assert not answers(address)
    log.close()


def test_a_server_starts_no_threads_for_matrices(address, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    log = start_server(address, CacheConfig(), timeout_s=30)
    client = CacheClient(address)
    assert psutil.Process(client.stats()["server"]["pid"]).environ()["OPENBLAS_NUM_THREADS"] == "1"
    client.close()
    log.close()


def test_the_second_to_start_finds_the_address_taken_and_uses_the_first(address):
    log = start_server(address, CacheConfig(), timeout_s=30)
    assert start_server(address, CacheConfig(), timeout_s=30) is None
    Connection(address, timeout_s=10).close()
    log.close()


def test_a_client_starts_its_server_and_starts_it_again(address):
    client = CacheClient(address, private=CacheConfig())
    first = client.stats()["server"]["pid"]
    os.kill(first, signal.SIGKILL)
    second = client.stats()["server"]["pid"]
    assert second != first
    client.close()
    assert ended(second)


USER = """
import sys
from cache.client import CacheClient
from cache.config import CacheConfig
client = CacheClient(sys.argv[1], private=CacheConfig())
print(client.stats()["server"]["pid"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def user(address):
    """Another process that uses a private server, until it is killed; gives the server's process id."""
    with subprocess.Popen(
        [sys.executable, "-c", USER, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield int(process.stdout.readline())
        process.kill()


def test_a_server_outlives_who_started_it_as_long_as_somebody_uses_it(address):
    with user(address) as pid:
        client = CacheClient(address)
        assert client.stats()["server"]["pid"] == pid
    assert client.stats()["server"]["pid"] == pid
    client.close()
    assert ended(pid)


def test_a_server_ends_when_its_only_user_is_killed(address):
    with user(address) as pid:
        assert psutil.pid_exists(pid)
    assert ended(pid)


def test_what_is_wrong_with_the_configuration_surfaces_at_the_client(tmp_path):
    (tmp_path / "file").touch()
    config = CacheConfig((TierConfig("disk", 1 << 20, path=str(tmp_path / "file")),))
    client = CacheClient(unused_address(), private=config)
    with pytest.raises(BadInputError, match=r"cannot start: .*not a directory"):
        client.stats()


def test_a_directory_of_another_server_is_named(tmp_path):
    config = CacheConfig((TierConfig("disk", 1 << 20, path=str(tmp_path)),))
    with contextlib.closing(CacheClient(unused_address(), private=config)) as first:
        first.stats()
        with pytest.raises(BadInputError, match="in use by process"):
            CacheClient(unused_address(), private=config).stats()


def test_an_interpreter_that_cannot_be_run_is_said(address, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ServerGoneError, match="cannot start a private cache server"):
        start_server(address, CacheConfig(), timeout_s=30)


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_last_words_of_a_server_that_dies_at_once_are_in_the_error(address, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", script(tmp_path, "echo no such module >&2; exit 3"))
    with pytest.raises(ServerGoneError, match="no such module"):
        start_server(address, CacheConfig(), timeout_s=30)


def test_a_server_that_says_nothing_is_killed_and_reported(address, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 1000"))
    with pytest.raises(ServerGoneError, match=r"within 2 s"):
        start_server(address, CacheConfig(), timeout_s=2)
    assert ended(int((tmp_path / "pid").read_text()))


def test_no_descriptor_of_a_start_stays_open(address, monkeypatch, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    start_server(address, CacheConfig(), timeout_s=30).close()
    with contextlib.closing(Connection(address, timeout_s=10)):
        assert start_server(address, CacheConfig(), timeout_s=30) is None
    monkeypatch.setattr(sys, "executable", script(tmp_path, "exit 3"))
    with pytest.raises(ServerGoneError):
        start_server(address, CacheConfig(), timeout_s=30)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_server_says_reaches_the_log_in_bounded_lines(caplog):
    read_end, write_end = os.pipe()
    log = ServerLog(read_end)
    log.drain()
    assert caplog.text == ""
    os.write(write_end, b"one\n" + b"x" * 5000 + b"\n")
    log.drain()
    assert [len(record.getMessage()) < 2100 for record in caplog.records] == [True, True]
    assert "one" in caplog.text
    os.close(write_end)
    log.drain()
    log.drain()
    log.close()


def test_a_log_that_another_thread_closes_in_the_middle_of_a_look_says_nothing():
    class Contested(ServerLog):
        @property
        def _pipe(self):
            found, self.found = self.found, None
            return found

        @_pipe.setter
        def _pipe(self, pipe):
            self.found = pipe

    read_end, write_end = os.pipe()
    log = Contested(read_end)
    assert log.read() == log.read() == ""
    os.close(write_end)


def test_a_warning_of_the_server_reaches_the_clients_log(tmp_path, caplog):
    (tmp_path / "stranger").touch()
    config = CacheConfig((TierConfig("disk", 1 << 20, path=str(tmp_path)),))
    with contextlib.closing(CacheClient(unused_address(), private=config)) as client:
        client.stats()
        client.stats()
    assert "stranger" in caplog.text


def test_a_server_nobody_comes_to_ends_after_its_grace(address, monkeypatch):
    monkeypatch.setattr(private, "GRACE_S", 0.05)
    log = start_server(address, CacheConfig(), timeout_s=30)
    for process in psutil.process_iter(["cmdline"]):
        if address in (process.info["cmdline"] or ()):
            assert ended(process.pid)
    assert not answers(address)
    log.close()


def test_a_server_ends_without_waiting_for_threads_that_do_not(address):
    start = """
import cache.server, runpy, threading

def run_server(*arguments, **options):
    threading.Thread(target=threading.Event().wait).start()
    options["on_ready"]()

cache.server.run_server = run_server
runpy.run_module("cache.embedded", run_name="__main__")
"""
    settings = {"address": address, "config": CacheConfig().to_json(), "grace_s": 1, "log_level": 30}
    # Ends when the server closes its standard error, which it does by its own end.
    done = subprocess.run(
        [sys.executable, "-c", start], input=json.dumps(settings).encode(), capture_output=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == {"state": "listening"}
    assert done.stderr == b""


def test_a_server_started_by_hand_says_one_line(address):
    listener = listen(address)
    settings = {"address": address, "config": CacheConfig().to_json(), "grace_s": 1, "log_level": 30}
    body = [sys.executable, "-P", "-m", "cache.embedded", address]
    done = subprocess.run(body, input=json.dumps(settings).encode(), capture_output=True, check=True)
    assert json.loads(done.stdout) == {"state": "taken"}
    remove_socket(listener)


def test_a_stopped_private_server_is_an_error_within_the_time_limit(address):
    client = CacheClient(address, private=CacheConfig())
    pid = client.stats()["server"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    hasty = CacheClient(address, private=CacheConfig(), options=ClientOptions(silence_timeout_s=0.3))
    with pytest.raises(DataError, match="stopped or stuck"):
        hasty.stats()
    os.kill(pid, signal.SIGCONT)
    hasty.close()
    client.close()
    assert ended(pid)

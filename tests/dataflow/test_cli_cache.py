"""`dataflow cache`: a daemon from start to end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from click.testing import CliRunner

from cache.client import CacheClient
from dataflow.cli.cache import cache


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Where a daemon listens and its clients look, in this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return str(tmp_path / "dataflow" / "cache.sock")


START = "from dataflow.cli.main import main; main()"


@contextlib.contextmanager
def daemon(*options, start=START):
    command = [sys.executable, "-c", start, "cache", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            before = []  # a warning is no reason to fail, an error is one to be shown
            while not (line := process.stderr.readline()).startswith("listening at "):
                assert line, f"the daemon ended with {process.wait()}: {''.join(before)}"
                before.append(line)
            process.said = line
            yield process
        finally:
            process.kill()


def run(*arguments):
    return CliRunner().invoke(cache, arguments)


def test_status_shows_a_running_daemon_and_sigterm_ends_it(address):
    with daemon("--ram", "1MiB") as process:
        result = run("status")
        assert result.exit_code == 0, result.output
        assert "1.0 MiB" in result.output
        assert str(process.pid) in result.output
        stats = json.loads(run("status", "--json").stdout)
        assert stats["tiers"][0]["capacity_bytes"] == 1 << 20
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert not os.path.exists(address)
    assert run("status").exit_code != 0


@pytest.mark.usefixtures("address")
def test_a_daemon_ends_without_waiting_for_threads_that_do_not():
    # Nor, then, does it take the interpreter down under those of a native client.
    stuck = "import threading; threading.Thread(target=threading.Event().wait).start(); "
    with daemon("--ram", "1MiB", start=stuck + START) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_the_disk_is_used_and_a_second_daemon_is_refused(address, tmp_path):
    with daemon("--ram", "0", "--disk", str(tmp_path / "disk"), "--disk-size", "8MiB"):
        [tier] = json.loads(run("status", "--json").stdout)["tiers"]
        assert (tier["name"], tier["capacity_bytes"]) == ("disk", 8 << 20)
        assert "already listens" in str(run("serve").exception)


def test_a_killed_daemons_socket_does_not_stop_the_next(address):
    with daemon() as first:
        first.kill()
        first.wait()
    assert os.path.exists(address)
    with daemon() as second:
        client = CacheClient(address)
        assert client.stats()["server"]["pid"] == second.pid
        client.close()
        second.terminate()
        assert second.wait() == 0


def test_a_file_configures_everything(address, tmp_path):
    (tmp_path / "cache.toml").write_text('ring_bytes = 0\n[[tiers]]\nname = "fast"\ncapacity_bytes = 4096\n')
    with daemon("--config", str(tmp_path / "cache.toml")):
        stats = json.loads(run("status", "--json").stdout)
        assert (stats["tiers"][0]["name"], stats["ring"]["capacity_bytes"]) == ("fast", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--disk", "/somewhere"], "belong together"),
        (["--ram", "lots"], "not a size"),
        (["--config", "x.toml", "--ram", "1G"], "says everything"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    result = run("serve", *options)
    assert result.exit_code == 2
    assert message in result.output


def test_where_no_daemon_listens_a_command_says_how_to_start_one(address):
    result = run("status")
    assert result.exit_code == 1
    assert "start one with `dataflow cache serve`" in result.output


def test_metrics_and_health_are_those_of_the_daemon(address):
    with daemon("--metrics", "127.0.0.1:0") as process:
        port = int(process.said.rpartition(" ")[2])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b"dataflow_cache_uptime_seconds" in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert answer.read() == b"ok\n"
        process.terminate()
        assert process.wait() == 0
    assert "HOST:PORT" in str(run("serve", "--metrics", "9464").exception)
    assert not os.path.exists(address)


def test_the_service_manager_hears_when_clients_are_answered(address, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with daemon() as process:
            assert manager.recv(100) == b"READY=1"
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait() == 0

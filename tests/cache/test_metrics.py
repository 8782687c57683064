"""Every number reaches Prometheus under the name that the documentation gives it."""

import errno
import re
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from socketserver import TCPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache.client import CacheClient
from cache.config import CacheConfig, TierConfig
from cache.connection import ServerGoneError
from cache.keys import BlockRef
from cache.metrics import families, parse_endpoint, serve_metrics
from cache.testing import running_server
from connectors.errors import BadInputError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_numbers_of_a_real_server_are_served(tmp_path):
    (tmp_path / "data").write_bytes(bytes(5000))
    with running_server(CacheConfig((TierConfig("ram", 1 << 20),))) as running:
        client = CacheClient(running.address)
        uri = f"file://{tmp_path}/data"
        client.read_blocks([BlockRef(uri, client.head(uri).version, 0, 5000)] * 2)
        stats = client.stats()
        client.close()
    with serve_metrics("127.0.0.1:0", lambda: stats) as port:
        status, text = get(port, "/metrics")
        assert (get(port, "/healthz"), get(port, "/")[0]) == ((200, "ok\n"), 404)
    assert status == 200
    samples = {
        (sample.name, sample.labels.get("tier") or sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["dataflow_cache_tier_blocks", "ram"] == 1
    assert samples["dataflow_cache_tier_capacity_bytes", "ram"] == 1 << 20
    assert samples["dataflow_cache_origin_bytes_total", None] == 5000
    assert samples["dataflow_cache_blocks_requested_total", None] == 2
    assert samples["dataflow_cache_tier_faulty", "ring"] == 0
    assert {kind for name, kind in samples if name == "dataflow_cache_prefetch_useful_total"} == {
        "plan", "sequential", "strided", "repeated"
    }  # fmt: skip


def test_a_daemon_serves_the_metrics_that_are_documented_and_no_other(tmp_path):
    address = f"@metrics-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "dataflow", "cache", "serve", "--socket", address, "--metrics", "127.0.0.1:0"]
    command += ["--ram", "1MiB", "--disk", str(tmp_path / "disk"), "--disk-size", "1MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(process.stderr.readline().rpartition(" ")[2])
            status, text = get(port, "/metrics")
        finally:
            process.terminate()
    assert status == 200
    found = list(text_string_to_metric_families(text))
    # What has a sample only where something is configured is served by its name alone.
    served = {sample.name for family in found for sample in family.samples}
    served |= {family.name for family in found if not family.samples}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `dataflow_cache_")]
    documented = {name for row in rows for name in re.findall(r"`(dataflow_cache_\w+)`", row.split("|")[1])}
    assert served == documented
    assert all(family.documentation for family in found)
    assert all(row.split("|")[2].strip() for row in rows)


def test_an_ill_disk_shows(tmp_path):
    disk = TierConfig("disk", 1 << 20, path=str(tmp_path), medium="nvme")
    with running_server(CacheConfig((disk,))) as running, closing(CacheClient(running.address)) as client:
        stats = client.stats()
    stats["tiers"][0] |= {"fault": "No space left on device", "state": "unstable", "full": {"since_unix_s": 1.0}}
    values = {
        (family.name.removeprefix("dataflow_cache_tier_"), *sample.labels.values()): sample.value
        for family in families(stats)
        for sample in family.samples
    }
    assert [values["faulty", "disk"], values["faulty", "ring"], values["full", "disk"]] == [1, 0, 1]
    assert [values["state", "disk", state] for state in ("normal", "unstable", "down")] == [0, 1, 0]
    assert ("state", "ring", "normal") not in values


def test_a_server_that_does_not_answer_is_not_healthy():
    def silent():
        raise ServerGoneError("nobody answers")

    with serve_metrics("127.0.0.1:0", silent) as port:
        assert get(port, "/healthz") == (503, "nobody answers\n")
        assert get(port, "/metrics")[0] == 503


def test_out_of_descriptors_it_asks_for_connections_now_and_then(monkeypatch):
    accept, failures, pauses = TCPServer.get_request, [OSError(errno.EMFILE, "too many")] * 3, []

    def get_request(server):
        if failures:
            raise failures.pop()
        return accept(server)

    monkeypatch.setattr(TCPServer, "get_request", get_request)
    monkeypatch.setattr("cache.metrics.time.sleep", pauses.append)
    with serve_metrics("127.0.0.1:0", dict) as port:
        assert get(port, "/healthz")[0] == 200
    assert len(pauses) == 3


@pytest.mark.parametrize("text", ["", "9464", ":9464", "host:", "host:x", "host:70000"])
def test_an_endpoint_that_is_none_is_refused(text):
    with pytest.raises(BadInputError, match="HOST:PORT"):
        parse_endpoint(text)


@pytest.mark.parametrize("host", ["[::1]", "[::]"])
def test_an_endpoint_may_be_of_ipv6(host):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serve_metrics(f"{host}:0", dict) as port, closing(HTTPConnection("::1", port)) as connection:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"


def test_a_taken_endpoint_is_refused_by_name():
    with serve_metrics("127.0.0.1:0", dict) as port, pytest.raises(BadInputError, match=str(port)):
        serve_metrics(f"127.0.0.1:{port}", dict).__enter__()


def test_without_the_client_library_the_error_names_the_extra():
    program = "import sys; sys.modules['prometheus_client'] = None; import cache.metrics"
    found = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert "pip install 'tiered-dataflow[metrics]'" in found.stderr

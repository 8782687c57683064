import psutil
import pytest

from connectors import BadInputError, TransientError, open_store, run_sync
from connectors.testing import seaweed
from connectors.testing.seaweed import SeaweedServer

pytestmark = pytest.mark.s3


def test_the_environment_alone_opens_a_new_bucket(s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(s3_server.create_bucket("by-environment"))
    run_sync(store.put("key", b"x"))
    assert bytes(run_sync(store.get("key"))) == b"x"


def test_a_bucket_that_is_there_is_as_good_as_a_new_one(s3_server):
    assert s3_server.create_bucket("twice") == s3_server.create_bucket("twice") == "s3://twice"


def test_it_listens_on_loopback_only(s3_server):
    listening = [
        connection.laddr
        for child in psutil.Process(s3_server._keeper.pid).children()
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.port for address in listening} >= set(s3_server._ports.values())
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_without_the_program_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(seaweed.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[demo\]"):
        SeaweedServer().start()


def test_a_program_that_ends_at_once_is_an_error_with_its_log(monkeypatch, tmp_path):
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho this machine has no disk\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(seaweed.shutil, "which", lambda *args, **kwargs: str(program))
    monkeypatch.setattr(seaweed.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(TransientError, match="no disk"):
        SeaweedServer().start()
    assert list(tmp_path.iterdir()) == [program]

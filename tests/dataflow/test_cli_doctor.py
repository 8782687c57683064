"""`dataflow doctor` finds what is wrong and says what to do."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from cache.client import CacheClient
from cache.server import ServerLimits
from cache.testing import running_server
from dataflow.cli import doctor
from dataflow.cli.doctor import Finding


def test_nothing_is_wrong_where_the_tests_run() -> None:
    result = CliRunner().invoke(doctor.doctor)
    assert result.exit_code == 0
    subjects = {line[6:].split("  ")[0] for line in result.output.splitlines()}
    assert {"python", "package cache", "RLIMIT_NOFILE", "/dev/shm", "cache daemon", "torch"} <= subjects


def test_json_holds_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("disk", "full", "wrong", "Delete something.")
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    result = CliRunner().invoke(doctor.doctor, ["--json"])
    assert json.loads(result.output) == [
        {"subject": "disk", "found": "full", "level": "wrong", "advice": "Delete something."}
    ]


@pytest.mark.parametrize(("level", "exit_code"), [("fine", 0), ("note", 0), ("wrong", 1)])
def test_only_what_is_wrong_fails(level: doctor.Level, exit_code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("disk", "as it is", level, "Look at it.")]))
    result = CliRunner().invoke(doctor.doctor)
    assert result.exit_code == exit_code
    assert "Look at it." in result.output


def test_few_open_files_are_noted() -> None:
    assert doctor._descriptors(1024, 1024).level == "note"
    assert doctor._descriptors(1024, resource.RLIM_INFINITY).level == "fine"


def test_a_missing_shared_memory_is_wrong(tmp_path: Path) -> None:
    finding = doctor._shared_memory(tmp_path / "shm")
    assert finding.level == "wrong"
    assert finding.advice


@pytest.mark.parametrize(
    ("tunables", "levels"),
    [
        ("glibc.cpu.x86_non_temporal_threshold: 0x6300000 (min: 0x4040, max: 0xf)", ["note"]),
        ("glibc.cpu.x86_non_temporal_threshold: 0xc0000 (min: 0x4040, max: 0xf)", ["fine"]),
        ("glibc.malloc.check: 0 (min: 0, max: 3)", []),
        ("", []),
    ],
)
def test_a_c_library_that_copies_through_the_cache_is_noted(tunables: str, levels: list[str], tmp_path: Path) -> None:
    linker = tmp_path / "ld.so"
    linker.write_text(f"#!/bin/sh\necho 'glibc.rtld.nns: 0x4 (min: 0x1, max: 0x10)'\necho '{tunables}'\n")
    linker.chmod(0o755)
    assert [finding.level for finding in doctor._large_copies(linker)] == levels
    assert list(doctor._large_copies(tmp_path / "none")) == []


def test_a_users_file_that_would_take_our_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache.py").touch()
    monkeypatch.chdir(tmp_path)
    [finding] = [finding for finding in doctor._places() if finding.level != "fine"]
    assert finding.subject == "package cache"
    assert str(tmp_path / "cache.py") in finding.advice


def test_a_torch_that_cannot_be_imported_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is missing')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor._torch()
    assert finding.level == "wrong"
    assert "libcudart.so is missing" in finding.found


OLD_TORCH = """
__version__ = "2.4.1"

class cuda:
    device_count = staticmethod(lambda: 2)
"""
TORCH_WITHOUT_A_DRIVER = """
__version__ = "2.7.1"

class accelerator:
    is_available = staticmethod(lambda: False)

    def device_count():
        raise RuntimeError("Found no NVIDIA driver on your system")
"""


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (OLD_TORCH, "2.4.1, devices: cuda:0, cuda:1"),
        (TORCH_WITHOUT_A_DRIVER, "2.7.1, devices: cpu only"),
    ],
    ids=["before torch.accelerator", "without a driver"],
)
def test_devices_are_counted_under_any_torch(
    module: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._torch() == doctor.Finding("torch", found)


def test_a_daemon_that_was_named_and_does_not_answer_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "cache.sock")
    assert doctor._daemon([address]).level == "fine"
    monkeypatch.setenv("DATAFLOW_CACHE", address)
    assert doctor._daemon([address]).level == "wrong"


def test_a_daemon_without_room_is_noted() -> None:
    limits = ServerLimits(max_connections=1)
    with running_server(limits=limits) as running, contextlib.closing(CacheClient(running.address)) as client:
        client.stats()
        finding = doctor._daemon([running.address])
    assert (finding.level, "1 connections already" in finding.found) == ("note", True)


def test_a_daemon_that_is_stuck_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "cache.sock")
    monkeypatch.setattr(doctor, "_DAEMON_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        finding = doctor._daemon([address])
    assert finding.level == "wrong"
    assert "stuck" in finding.found

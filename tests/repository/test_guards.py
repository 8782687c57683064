"""What every test runs under does catch what it is there for: each case is a run of pytest that has to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _run(tmp_path: Path, test: str) -> subprocess.CompletedProcess[str]:
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    assert "GRACE_S = 20.0" in conftest
    (tmp_path / "conftest.py").write_text(conftest.replace("GRACE_S = 20.0", "GRACE_S = 0.2"))
    (tmp_path / "test_case.py").write_text(test)
    environment = {name: value for name, value in os.environ.items() if name != "DATAFLOW_TEST_RUN"}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-n", "0", "test_case.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


GOOD = """
import multiprocessing, subprocess
def test_a_child_that_has_ended(): subprocess.run(["true"], check=True)
def test_what_multiprocessing_keeps():
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.map(abs, [-1]) == [1]
"""

BAD = """
import connectors, os, subprocess, time, warnings
kept = []
def test_process(): kept.append(subprocess.Popen(["sleep", "1"]))
def test_memory_file(): os.memfd_create("block")
def test_warning(): warnings.warn("old")
# Code that stands in our package, as far as its frames say.
blocking = compile("time.sleep(0)", connectors.__path__[0] + "/case.py", "exec")
async def test_blocked_loop(): exec(blocking)
"""


def test_a_run_that_leaves_nothing_passes(tmp_path: Path) -> None:
    done = _run(tmp_path, GOOD)
    assert done.returncode == 0, done.stdout


def test_a_test_fails_that_leaves_something_or_warns_or_blocks_the_loop(tmp_path: Path) -> None:
    done = _run(tmp_path, BAD)
    assert "2 failed, 2 passed, 2 errors" in done.stdout  # what is left behind is an error of the teardown
    for message in ("left running", "left open: {'/memfd:block", "UserWarning: old", "Blocking call to time.sleep"):
        assert message in done.stdout


def test_a_run_fails_that_leaves_an_orphan_or_an_entry_in_shared_memory(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    entry = Path(f"/dev/shm/dataflow-guard-{os.getpid()}")
    until_it_is_one = "until grep -aq ^sleep /proc/$!/cmdline; do :; done"
    orphan = f"setsid sleep 60 > /dev/null 2>&1 & echo $! > {pid_file}; {until_it_is_one}; touch {entry}"
    done = _run(tmp_path, f"import subprocess\ndef test_it(): subprocess.run({orphan!r}, shell=True, check=True)")
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    entry.unlink()
    assert "1 passed" in done.stdout
    assert done.returncode == 1
    assert f"process {pid} (sleep 60)" in done.stdout
    assert str(entry) in done.stdout

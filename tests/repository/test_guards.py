"""What every test runs under does catch what it is there for: each case is a run of pytest that has to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_test_that_leaves_nothing_passes(tmp_path: Path) -> None:
    done = _run(tmp_path, "import subprocess\ndef test_it(): subprocess.run(['true'], check=True)\n")
    assert done.returncode == 0, done.stdout


# Code that stands in our package, as far as its frames say.
BLOCKING = """
import connectors, time
code = compile('time.sleep(0)', connectors.__path__[0] + '/case.py', 'exec')
async def test_it(): exec(code)
"""


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("import subprocess\ndef test_it(): global p; p = subprocess.Popen(['sleep', '2'])", "left running"),
        ("import os\ndef test_it(): os.memfd_create('block')", "left open: {'/memfd:block"),
        (BLOCKING, "BlockingError: Blocking call to time.sleep"),
        ("import warnings\ndef test_it(): warnings.warn('old')", "UserWarning: old"),
    ],
    ids=["leaves a process", "leaves a memory file", "blocks the loop", "warns"],
)
def test_a_test_fails_that(test: str, message: str, tmp_path: Path) -> None:
    done = _run(tmp_path, test)
    assert done.returncode == 1
    assert message in done.stdout


def test_a_run_fails_that_leaves_an_orphan(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    orphan = f"setsid sleep 60 > /dev/null 2>&1 & echo $! > {pid_file}"
    done = _run(tmp_path, f"import subprocess\ndef test_it(): subprocess.run({orphan!r}, shell=True, check=True)")
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    assert done.returncode == 1
    assert f"process {pid} (sleep 60)" in done.stdout


def test_a_run_fails_that_leaves_an_entry_in_shared_memory(tmp_path: Path) -> None:
    entry = Path(f"/dev/shm/dataflow-guard-{os.getpid()}")
    done = _run(tmp_path, f"from pathlib import Path\ndef test_it(): Path({str(entry)!r}).touch()")
    entry.unlink()
    assert done.returncode == 1
    assert str(entry) in done.stdout

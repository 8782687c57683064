"""What every test of the three packages runs under.

A test fails that blocks the event loop, or that leaves a process, a descriptor of a memory file or an entry in
/dev/shm behind.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
from blockbuster import blockbuster_ctx

TESTING_PACKAGES = ["connectors.testing", "cache.testing", "dataflow.testing"]
RUN_VARIABLE = "DATAFLOW_TEST_RUN"
GRACE_S = 20.0  # what a server may take to notice that its last user has gone

pytest.register_assert_rewrite(*TESTING_PACKAGES)
pytest_plugins = ["connectors.testing.fixtures"]

# A server that runs on this machine must not answer what a test asks of its own.
os.environ.pop("DATAFLOW_CACHE", None)

# Every descendant inherits this, also one whose parent has died, so the end of the run can find what was left.
os.environ.setdefault(RUN_VARIABLE, uuid.uuid4().hex)

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("dev", hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=30)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("dev"), max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests whose names hold an address: two processes that share the suite must agree on the names."""
    if unstable := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError("give the parameters of these tests ids: " + ", ".join(unstable))


@pytest.fixture(scope="session", autouse=True)
def _event_loops_never_block() -> Iterator[None]:
    """A blocking call of ours inside any running event loop of this process is an error."""
    with blockbuster_ctx(["connectors", "cache", "dataflow"], excluded_modules=TESTING_PACKAGES):
        yield


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """A test ends with the child processes and the memory files that it began with."""
    children, memory_files = _children(), _memory_files()
    yield
    _until(lambda: not _children() - children)
    if left := _children() - children:
        pytest.fail("left running: " + ", ".join(map(_describe, sorted(left))))
    if _memory_files() - memory_files:
        gc.collect()  # a failed assertion's traceback may hold a view for a moment
    if open_files := _memory_files() - memory_files:
        pytest.fail(f"left open: {dict(open_files)}")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember what /dev/shm holds before the first test."""
    session.config.stash[_SHM_BEFORE] = _shared_memory()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when a process or a shared memory entry outlives it."""
    if hasattr(session.config, "workerinput"):
        return  # the controller looks once, when its workers have gone
    before = session.config.stash[_SHM_BEFORE]
    _until(lambda: not _descendants())
    left = [f"process {_describe(pid)}" for pid in sorted(_descendants())]
    # Another program may be just between making its entry and using it.
    _until(lambda: not _orphans(before))
    left += [str(entry) for entry in sorted(_orphans(before))]
    session.config.stash[_LEFT] = left
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what outlived the run."""
    if left := config.stash.get(_LEFT, []):
        terminalreporter.section("left behind by this run", red=True)
        terminalreporter.write_line("\n".join(left))


_SHM_BEFORE = pytest.StashKey[set[Path]]()
_LEFT = pytest.StashKey[list[str]]()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GRACE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _children() -> set[int]:
    """Living children of this process, but for the two that multiprocessing keeps until its end."""
    # A tenth of what psutil takes, which reads every process of the machine.
    pids = {int(pid) for task in Path("/proc/self/task").iterdir() for pid in _read(task / "children").split()}
    return {pid for pid in pids if _alive(pid) and not _is_kept(pid)}


def _descendants() -> set[int]:
    """Living processes that this run has started, also those whose parents have died."""
    mark = f"{RUN_VARIABLE}={os.environ[RUN_VARIABLE]}"
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {pid for pid in psutil.pids() if mark in _read(Path(f"/proc/{pid}/environ")).split("\0") and _alive(pid)}
    return {pid for pid in found - own if not _is_kept(pid)}


def _is_kept(pid: int) -> bool:
    """Whether this is the resource tracker or the fork server of this very process."""
    if not re.search(r"multiprocessing\.(resource_tracker|forkserver)", _describe(pid)):
        return False
    return _status(pid)[1:2] == [str(os.getpid())]


def _alive(pid: int) -> bool:
    return _status(pid)[:1] not in ([], ["Z"], ["X"])


def _status(pid: int) -> list[str]:
    """State, parent and what follows in `/proc/PID/stat`; empty for a process that has ended."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _describe(pid: int) -> str:
    return f"{pid} ({_read(Path(f'/proc/{pid}/cmdline')).replace(chr(0), ' ').strip()})"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended, or is another user's
        return ""


def _memory_files() -> Counter[str]:
    """Open descriptors of memory files, by name: what a block that was not closed looks like."""
    targets = Counter[str]()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith("/memfd:"):
            targets[target] += 1
    return targets


def _shared_memory() -> set[Path]:
    """Entries of this user in /dev/shm."""
    found = set()
    for entry in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another program has just removed it
            if entry.lstat().st_uid == os.getuid():
                found.add(entry)
    return found


def _orphans(before: set[Path]) -> set[Path]:
    """Entries that were not there before and that nobody uses."""
    return {entry for entry in _shared_memory() - before if not _held(entry)}


def _held(entry: Path) -> bool:
    """Whether a living process uses the entry: another run's, since ours have ended."""
    names = (str(entry), f"{entry}/")
    for process in Path("/proc").glob("[0-9]*"):
        paths = [
            line[line.index("/dev/shm/") :] for line in _read(process / "maps").splitlines() if "/dev/shm/" in line
        ]
        try:
            paths += [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(path == names[0] or path.startswith(names[1]) for path in paths):
            return True
    return False

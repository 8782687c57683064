import signal
import subprocess
import sys
import time

import psutil
import pytest

# A user who starts a keeper with a server that tells its number, then waits to be ended.
USER = """
import subprocess, sys
server = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
keeper = subprocess.Popen(
    [sys.executable, "-P", "-m", "connectors.testing.keeper", sys.argv[1], sys.executable, "-c", server],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
print(keeper.pid, keeper.stdout.readline().strip(), flush=True)
if "close" in sys.argv:
    sys.stdin.readline()
    keeper.stdin.close()
    keeper.wait()
else:
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    (made / "file").write_bytes(b"x")
    return made


def _start(folder, *arguments):
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(folder), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    keeper, server = map(psutil.Process, map(int, user.stdout.readline().split()))
    return user, keeper, server


def _end(user):
    user.stdin.close()
    user.stdout.close()
    user.wait(30)


def _assert_gone(*processes):
    deadline_s = time.monotonic() + 30
    while alive := [process for process in processes if _is_alive(process)]:
        assert time.monotonic() < deadline_s, alive
        time.sleep(0.01)


def _is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_user_killed_by_sigkill_takes_the_server_and_its_folder_along(folder):
    user, keeper, server = _start(folder)
    assert server.is_running()
    user.kill()
    _assert_gone(keeper, server)
    assert not folder.exists()
    _end(user)


def test_a_closed_pipe_ends_the_server_and_removes_its_folder(folder):
    user, keeper, server = _start(folder, "close")
    user.stdin.write("close\n")
    _end(user)
    _assert_gone(keeper, server)
    assert not folder.exists()


def test_a_keeper_killed_by_sigkill_takes_the_server_along(folder):
    user, keeper, server = _start(folder)
    keeper.kill()
    _assert_gone(keeper, server)
    _end(user)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_waits_for_the_user(folder, number):
    user, keeper, server = _start(folder)
    keeper.send_signal(number)
    user.kill()  # the keeper still does its work
    _assert_gone(keeper, server)
    assert not folder.exists()
    _end(user)


def test_a_server_that_ends_by_itself_ends_the_keeper_with_its_status(folder):
    command = [sys.executable, "-P", "-m", "connectors.testing.keeper", str(folder), "sh", "-c", "exit 3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as keeper:
        assert keeper.wait(60) == 3
    assert not folder.exists()

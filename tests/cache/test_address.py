import fcntl
import os
import socket
import stat
import threading

import pytest

from cache.address import (
    answers,
    daemon_addresses,
    default_address,
    listen,
    peer,
    private_address,
    remove_socket,
    socket_address,
    unused_address,
)
from cache.config import CacheConfig, DirectoryConfig, TierConfig
from connectors.errors import BadInputError, DataError, PermissionDeniedError


@pytest.mark.parametrize("address", ["", "@", "/", "cache.sock", "/" + "x" * 108, "@" + "x" * 200])
def test_what_cannot_be_an_address_is_refused(address):
    with pytest.raises(BadInputError):
        socket_address(address)


def test_a_daemon_listens_where_its_clients_look():
    assert default_address({"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/dataflow/cache.sock"
    assert default_address({}) in daemon_addresses({})
    assert daemon_addresses({"XDG_RUNTIME_DIR": "/r"}) == ["/r/dataflow/cache.sock", "/run/dataflow/cache.sock"]
    assert daemon_addresses({"DATAFLOW_CACHE": "/my/socket", "XDG_RUNTIME_DIR": "/r"}) == ["/my/socket"]


@pytest.mark.parametrize("runtime", ["", "run/user", "./run"])
def test_a_runtime_directory_that_is_not_absolute_counts_as_none(runtime):
    assert default_address({"XDG_RUNTIME_DIR": runtime}) == default_address({})


@pytest.mark.parametrize("address", ["", "cache.sock", "/" + "x" * 108])
def test_nobody_answers_where_no_socket_can_be(address):
    assert not answers(address)


def test_an_ordinary_user_without_a_runtime_directory_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 77)
    assert default_address({}) == "/tmp/dataflow-77/cache.sock"


def test_private_servers_of_the_same_directories_share_an_address(tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (tmp_path / "link").symlink_to(tmp_path)

    def address(*paths, ram=0):
        tiers = [TierConfig(f"disk{number}", 1, path=path) for number, path in enumerate(paths)]
        return private_address(CacheConfig((*tiers, TierConfig("ram", ram))))

    assert address(one, two) == address(two, one, ram=5) == address(str(tmp_path / "link" / "one"), two)
    assert address(one) != address(two)
    assert address() != address()
    together = TierConfig("disks", 1, medium="nvme", directories=(DirectoryConfig(two), DirectoryConfig(one)))
    assert private_address(CacheConfig((together,))) == address(one, two)
    assert len(socket_address(address(one))) < 100


@pytest.mark.parametrize(("mode", "folder_mode"), [(0o666, 0o755), (0o660, 0o755), (0o600, 0o700)])
def test_a_new_folder_lets_in_whom_the_socket_lets_in_whatever_the_umask(tmp_path, mode, folder_mode):
    umask = os.umask(0o077)
    try:
        listener = listen(str(tmp_path / "new" / "s"), mode=mode)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == folder_mode
    assert stat.S_IMODE(os.stat(tmp_path / "new" / "s").st_mode) == mode
    remove_socket(listener)


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(0o711)
    remove_socket(listen(str(tmp_path / "own" / "s"), mode=0o666))
    assert stat.S_IMODE(os.stat(tmp_path / "own").st_mode) == 0o711


def test_a_group_that_the_socket_cannot_be_given_to_is_named(tmp_path, monkeypatch):
    def chown(path, uid, gid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(BadInputError, match=f"group 4000001: user {os.geteuid()} is no member"):
        listen(str(tmp_path / "s"), group_id=4_000_001)


def test_an_abstract_address_cannot_be_taken_twice():
    address = unused_address()
    first = listen(address)
    with pytest.raises(BadInputError, match="already listens"):
        listen(address)
    assert answers(address)
    remove_socket(first)
    assert not answers(address)
    remove_socket(listen(address))


def test_a_live_socket_is_a_clear_error_and_stays(tmp_path):
    address = str(tmp_path / "cache.sock")
    first = listen(address)
    with pytest.raises(BadInputError, match="already listens"):
        listen(address)
    assert answers(address)
    remove_socket(first)
    assert not os.path.exists(address)


def test_a_busy_daemon_with_a_full_backlog_counts_as_alive(tmp_path):
    address = str(tmp_path / "cache.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(address)
        busy.listen(0)
        waiting.connect(address)
        with pytest.raises(BadInputError, match="already listens"):
            listen(address)


def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path):
    address = str(tmp_path / "cache.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    assert os.path.exists(address)
    second = listen(address)
    assert answers(address)
    remove_socket(second)


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(BadInputError, match="no socket"):
        listen(str(tmp_path / "precious"))
    assert (tmp_path / "precious").read_text() == "data"


def test_a_removed_server_does_not_take_its_successors_socket(tmp_path):
    address = str(tmp_path / "cache.sock")
    first = listen(address)
    os.unlink(address)
    second = listen(address)
    remove_socket(first)
    assert answers(address)
    remove_socket(second)


def test_the_folder_is_made_for_the_owner_alone(tmp_path):
    address = str(tmp_path / "a" / "cache.sock")
    listener = listen(address)
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o700
    assert stat.S_IMODE(os.stat(address).st_mode) == 0o600
    remove_socket(listener)


def test_a_folder_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionDeniedError, match="others may write"):
        listen(str(tmp_path / "open" / "cache.sock"))


def test_of_many_that_start_at_once_exactly_one_wins(tmp_path):
    address = str(tmp_path / "cache.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    won, start = [], threading.Barrier(8)

    def compete():
        start.wait()
        try:
            won.append(listen(address))
        except DataError:
            won.append(None)

    threads = [threading.Thread(target=compete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [listener for listener in won if listener is not None]
    assert answers(address)
    remove_socket(winner)


def test_nobody_looks_while_a_socket_is_bound_and_does_not_listen(tmp_path, monkeypatch):
    listen_really, locked = socket.socket.listen, []

    def look_and_listen(listener, backlog):
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.append(True)
        finally:
            os.close(folder)
        listen_really(listener, backlog)

    monkeypatch.setattr(socket.socket, "listen", look_and_listen)
    remove_socket(listen(str(tmp_path / "cache.sock")))
    assert locked == [True]


def test_the_kernel_says_who_the_other_side_is():
    here, there = socket.socketpair()
    with here, there:
        assert peer(here) == (os.getpid(), os.geteuid())

"""A server is believed where it cannot have put itself."""

import os

import pytest

from cache.trust import trusts

ROOT, ME, DAEMON, OTHER = 0, 4_000_001, 4_000_002, 4_000_003
DIRECTORY, LINK = 0o040000, 0o120000


@pytest.fixture(autouse=True)
def me(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    # None of the folders here exists.
    monkeypatch.setattr(os.path, "realpath", lambda path: path)


def believes(address: str, *folders: tuple[str, int, int], uid: int = DAEMON) -> bool:
    """Ask about the server of `uid` where the folders have these owners and modes."""
    found = {"/": (ROOT, DIRECTORY | 0o755)} | {path: (owner, mode) for path, owner, mode in folders}

    def status_of(path: str) -> os.stat_result:
        owner, mode = found[path]
        return os.stat_result((mode, 1, 1, 1, owner, 0, 0, 0, 0, 0))

    return trusts(address, uid, status_of=status_of)


RUN = ("/run", ROOT, DIRECTORY | 0o755)
TMP = ("/tmp", ROOT, DIRECTORY | 0o1777)


@pytest.mark.parametrize("uid", [ROOT, ME])
@pytest.mark.parametrize("address", ["@name", "/tmp/s", "/nowhere/s"])
def test_a_server_of_this_user_or_of_root_is_believed_anywhere(address, uid):
    assert believes(address, TMP, uid=uid)


@pytest.mark.parametrize("owner", [ROOT, ME, DAEMON])
def test_a_folder_that_root_has_given_to_a_daemon_is_its_place(owner):
    assert believes("/run/dataflow/s", RUN, ("/run/dataflow", owner, DIRECTORY | 0o755))


def test_a_folder_of_this_users_below_a_shared_one_is_good():
    mine = ("/tmp/mine", ME, DIRECTORY | 0o755)
    assert believes("/tmp/mine/s", TMP, mine)
    assert believes("/tmp/mine/its/s", TMP, mine, ("/tmp/mine/its", DAEMON, DIRECTORY | 0o755))


@pytest.mark.parametrize(
    ("address", "folders"),
    [
        ("@name", []),
        ("/tmp/s", [TMP]),
        ("/tmp/its/s", [TMP, ("/tmp/its", DAEMON, DIRECTORY | 0o755)]),
        ("/tmp/its/deep/s", [TMP, ("/tmp/its", DAEMON, DIRECTORY | 0o755), ("/tmp/its/deep", ROOT, DIRECTORY | 0o755)]),
        ("/open/s", [("/open", ROOT, DIRECTORY | 0o777)]),
        ("/open/mine/s", [("/open", ROOT, DIRECTORY | 0o777), ("/open/mine", ME, DIRECTORY | 0o755)]),
        ("/run/group/s", [RUN, ("/run/group", ROOT, DIRECTORY | 0o775)]),
        ("/run/other/s", [RUN, ("/run/other", OTHER, DIRECTORY | 0o755)]),
        ("/run/other/its/s", [RUN, ("/run/other", OTHER, DIRECTORY | 0o755), ("/run/other/its", DAEMON, 0o40755)]),
        ("/tmp/link/s", [TMP, ("/tmp/link", DAEMON, LINK | 0o777)]),
        ("/run/dataflow/../dataflow/s", [RUN, ("/run/dataflow", DAEMON, DIRECTORY | 0o755)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_place_that_somebody_else_may_have_taken_is_not_believed(address, folders):
    assert not believes(address, *folders)


def test_a_link_is_as_good_as_where_it_leads(monkeypatch):
    folders = [RUN, TMP, ("/var", ROOT, DIRECTORY | 0o755), ("/var/run", ROOT, LINK | 0o777)]
    monkeypatch.setattr(os.path, "realpath", lambda path: "/run")
    assert believes("/var/run/s", *folders)
    monkeypatch.setattr(os.path, "realpath", lambda path: "/tmp")
    assert not believes("/var/run/s", *folders)


def test_a_place_that_cannot_be_looked_at_is_not_believed():
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    assert not trusts("/run/dataflow/s", DAEMON, status_of=refuse)

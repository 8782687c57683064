"""Who may ask, and for what; however a name is spelt."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.address import listen, remove_socket
from cache.client import CacheClient
from cache.daemon_config import DaemonConfig
from cache.keys import BlockRef
from cache.rights import AccessConfig, PrefixRule, Rights
from cache.testing import running_server
from connectors.errors import BadInputError, PermissionDeniedError

STRANGER, FRIEND = 4_000_001, 4_000_002
ACCESS = AccessConfig(
    rules=(PrefixRule("s3://bucket/private", (FRIEND,)), PrefixRule("s3://bucket/private/open", (FRIEND, STRANGER)))
)


@pytest.fixture
def strange(monkeypatch):
    """Every client is the stranger, as far as the server can tell."""
    monkeypatch.setattr("cache.server.peer", lambda connection: (os.getpid(), STRANGER))


@pytest.mark.parametrize(
    ("uri", "readable"),
    [
        ("s3://bucket/other", True),
        ("s3://bucket/privateer", True),
        ("s3://bucket/private", False),
        ("s3://bucket/private/a", False),
        ("S3://bucket/private/a", False),
        ("s3://bucket/private/open/a", True),
    ],
)
def test_the_longest_prefix_decides(uri, readable):
    Rights(ACCESS, FRIEND).check([uri])
    if readable:
        Rights(ACCESS, STRANGER).check(["s3://bucket/other", uri])
    else:
        with pytest.raises(PermissionDeniedError, match="4000001"):
            Rights(ACCESS, STRANGER).check(["s3://bucket/other", uri])


@pytest.mark.parametrize(
    "uri", ["file:///a/../secret/x", "/secret/x", "file:///%73ecret/x", "file://localhost/secret/x"]
)
def test_another_spelling_of_a_name_opens_nothing(uri):
    access = AccessConfig(rules=(PrefixRule("/secret"),))
    with pytest.raises(PermissionDeniedError):
        Rights(access, STRANGER).check([uri])


@pytest.mark.parametrize(
    ("rule", "uri"),
    [
        ("s3://bucket/private", "s3a://bucket/private/x"),
        ("s3a://bucket/private", "s3://bucket/private/x"),
        ("s3://bucket", "s3a://bucket"),
        ("gs://bucket/private", "gcs://bucket/private/x"),
        ("sftp://host/private", "ssh://host/private/x"),
        ("oci://bucket/private", "ocilake://bucket/private/x"),
        ("tosfs://bucket/private", "tos://bucket/private/x"),
        ("jupyter://host/private", "jlab://host/private/x"),
        ("az://box/private", "abfs://box@account.dfs.core.windows.net/private/x"),
        ("https://host/private", "http://HOST.:80/private/x"),
        ("http://host/private", "https://somebody@host:443/private/x"),
        ("http://host:8080/private", "https://host:8080/private/x"),
        ("hdfs://node:8020/private", "webhdfs://node:9870/private/x"),
        ("webhdfs://node/private", "hdfs://somebody@NODE.:8020/private/x"),
        ("sftp://host/private", "ssh://somebody@host:22/private/x"),
        ("sftp://somebody@host:2222/private", "sftp://host:2222/private/x"),
        ("ftp://host/private", "ftp://somebody@host:21/private/x"),
        ("smb://host/share", "smb://somebody@host:445/share/x"),
    ],
)
def test_another_scheme_or_spelling_of_the_same_store_opens_nothing(rule, uri):
    rights = Rights(AccessConfig(rules=(PrefixRule(rule),)), STRANGER)
    with pytest.raises(PermissionDeniedError):
        rights.check([uri])
    with pytest.raises(PermissionDeniedError):
        rights.check_listing(uri)
    assert not rights.sees(uri)


def test_a_listing_that_would_name_what_is_private_is_refused():
    rights = Rights(ACCESS, STRANGER)
    rights.check_listing("s3://bucket/other")
    rights.check_listing("s3://bucket/private/open")
    for url in ("s3://bucket", "s3://bucket/private"):
        with pytest.raises(PermissionDeniedError):
            rights.check_listing(url)
    Rights(ACCESS, os.geteuid()).check_listing("s3://bucket")


@given(
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b", "ab"]), max_size=3),
)
def test_a_rule_covers_what_lies_below_it_and_nothing_else(parts, rule):
    covered = parts[: len(rule)] == rule
    assert PrefixRule("/".join(["s3://bucket", *rule])).covers("/".join(["s3://bucket", *parts])) == covered


def test_what_a_user_may_not_read_stays_unread_also_when_it_is_cached(tmp_path, strange):
    for name in ("public", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(b"12345")
    access = AccessConfig(allowed_uids=(STRANGER,), rules=(PrefixRule(str(tmp_path / "secret")),))
    refs = [BlockRef(f"file://{tmp_path}/{name}/x", "v", 0, 5, None) for name in ("public", "secret")]
    with running_server(access=access) as running:
        client = CacheClient(running.address)
        assert client.read_object(refs[0].uri).data == b"12345"
        for call in (
            lambda: client.read_blocks(refs),
            lambda: client.read_object(refs[1].uri),
            lambda: client.head(refs[1].uri),
            lambda: client.list_objects(f"file://{tmp_path}"),
        ):
            with pytest.raises(PermissionDeniedError, match="secret"):
                call()
        assert [meta.key for meta in client.list_objects(f"file://{tmp_path}/public")] == ["x"]
        client.close()


@pytest.mark.parametrize("allowed", [None, (FRIEND,)])
def test_a_user_who_is_not_named_is_refused(strange, allowed):
    # An abstract socket has no file whose permissions could let anybody in.
    with running_server(access=AccessConfig(allowed_uids=allowed)) as running:
        client = CacheClient(running.address)
        with pytest.raises(PermissionDeniedError, match="4000001"):
            client.stats()
        client.close()


def test_where_nobody_is_named_the_sockets_file_decides(strange, tmp_path):
    with running_server(access=AccessConfig(), address=str(tmp_path / "s")) as running:
        client = CacheClient(running.address)
        assert client.stats()["server"]["pid"] == os.getpid()
        client.close()


def test_the_socket_has_the_mode_and_group_that_were_asked_for(tmp_path):
    group = os.getgroups()[0] if os.geteuid() else 12345
    listener = listen(str(tmp_path / "s"), mode=0o660, group_id=group)
    found = os.stat(tmp_path / "s")
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group)
    remove_socket(listener)


def test_a_daemons_file_says_everything(tmp_path):
    path = tmp_path / "cache.toml"
    path.write_text(
        """
        ring_bytes = 5
        [[tiers]]
        name = "ram"
        capacity_bytes = 10
        [access]
        socket_mode = "0660"
        group = "root"
        allowed_uids = [1001]
        [[access.rules]]
        prefix = "s3://bucket/private/"
        uids = [1001]
        """
    )
    config = DaemonConfig.from_toml(path)
    assert (config.cache.ring_bytes, config.cache.tiers[0].capacity_bytes) == (5, 10)
    assert config.access == AccessConfig("0660", "root", (1001,), (PrefixRule("s3://bucket/private", (1001,)),))
    assert (config.access.mode, config.access.group_id()) == (0o660, 0)
    path.write_text("")
    assert DaemonConfig.from_toml(path) == DaemonConfig()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[access]\nmode = 1", "unknown setting 'mode'"),
        ("[access]\nsocket_mode = '999'", "octal"),
        ("[access]\nallowed_uids = ['bob']", "int"),
        ("[[access.rules]]\nurl = 's3://b'", "unknown setting 'url'"),
        ("[[access.rules]]\nuids = [1]", "prefix"),
        ("[[access.rules]]\nprefix = 's3://b'\n[[access.rules]]\nprefix = 's3://b/'", "two rules"),
        ("access = 3", "access"),
        ("rings = 3", "unknown setting 'rings'"),
        ("=", "cannot read"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, complaint):
    path = tmp_path / "cache.toml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=complaint):
        DaemonConfig.from_toml(path)


def test_a_group_that_does_not_exist_is_named():
    with pytest.raises(BadInputError, match="nosuchgroup"):
        AccessConfig(group="nosuchgroup").group_id()


@pytest.mark.parametrize("uri", ["", "x", "../x", "s3:", "s3:/b", "local://a/b", "Local://a/b"])
@pytest.mark.parametrize("uid", [0, STRANGER])
def test_a_name_that_depends_on_the_servers_folder_is_refused(uri, uid):
    for check in (Rights(ACCESS, uid).check_listing, lambda uri: Rights(AccessConfig(), uid).check([uri])):
        with pytest.raises(BadInputError, match="names no object"):
            check(uri)

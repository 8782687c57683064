import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors import BadInputError, Span, join_uri, normalise_url, split_uri
from connectors.objects import check_key, check_prefix

SEGMENTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda segment: segment not in (".", "..")
)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join)
ROOTS = st.sampled_from(["file:///", "s3://bucket", "memory://name", "az://box", "https://host:8080", "sftp://me@host"])


@given(ROOTS, KEYS)
def test_split_takes_apart_what_join_put_together(root, key):
    assert split_uri(join_uri(root, key)) == (root, key)


@given(ROOTS, KEYS, KEYS)
def test_joining_in_two_steps_is_joining_once(root, folder, key):
    assert join_uri(join_uri(root, folder), key) == join_uri(root, f"{folder}/{key}")


@given(ROOTS, KEYS)
def test_a_normal_url_stays_as_it_is(root, key):
    uri = join_uri(root, key)
    assert normalise_url(uri) == uri
    assert join_uri(uri, "") == uri


@given(KEYS)
def test_a_path_and_its_file_url_are_the_same_place(key):
    assert normalise_url("/" + key) == join_uri("file:///", key)


@given(st.binary(min_size=1).filter(lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")))
def test_a_file_name_that_is_no_text_survives(name):
    key = os.fsdecode(name)
    uri = join_uri("file:///", key)
    assert uri.isascii()
    assert os.fsencode(split_uri(uri)[1]) == name


@pytest.mark.parametrize(
    ("url", "root", "key"),
    [
        ("file:///", "file:///", ""),
        ("/", "file:///", ""),
        ("//data//set/", "file:///", "data/set"),
        ("/data/../x/./y", "file:///", "x/y"),
        ("file://localhost/a%20b", "file:///", "a b"),
        (Path("/data/50% #1?"), "file:///", "data/50% #1?"),
        ("S3://Bucket/Key/", "s3://Bucket", "Key"),
        ("s3://bucket", "s3://bucket", ""),
        ("s3://bucket/50% #1?", "s3://bucket", "50% #1?"),
        ("https://host/a%20b%23", "https://host", "a b#"),
        ("/odd://path", "file:///", "odd:/path"),
    ],
)
def test_split_examples(url, root, key):
    assert split_uri(url) == (root, key)


def test_a_tilde_is_the_home_folder_at_the_beginning_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert normalise_url("~/my set") == normalise_url(Path("~/my set")) == (tmp_path / "my set").as_uri()
    assert normalise_url("~") == tmp_path.as_uri()
    assert normalise_url("./~/x") == (tmp_path / "~" / "x").as_uri()
    assert normalise_url(f"{tmp_path}/~/x") == (tmp_path / "~" / "x").as_uri()


@pytest.mark.parametrize("url", ["s3:/bucket/x", "gs:/bucket", "file:/data/x", "S3:/b"])
def test_a_url_that_lost_a_slash_is_no_folder_of_that_name(url):
    with pytest.raises(BadInputError, match=r"neither a URL \(scheme://\.\.\.\) nor a plain path"):
        normalise_url(url)
    assert normalise_url(f"./{url}").endswith(url.replace(":", "%3A"))


def test_a_relative_path_begins_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normalise_url("set") == join_uri("file:///", f"{tmp_path}/set"[1:])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3://",
        "s3:///key",
        "memory:///key",
        "s3://bucket//key",
        "s3://bucket/a//b",
        "s3://bucket/../up",
        "s3://bucket/a/./b",
        "s3://bucket/nul\0",
        "/nul\0byte",
        "file://host/path",
        "https://host/f?X-Amz-Signature=abc",
        "https://host?x",
        "https://host/f#part",
        "simplecache::s3://bucket/key",
    ],
)
def test_a_url_that_names_nothing_exact_is_refused(url):
    with pytest.raises(BadInputError):
        split_uri(url)
    with pytest.raises(BadInputError):
        normalise_url(url)


@pytest.mark.parametrize("url", ["sftp://me:hunter2@host/x", "https://host/f?sig=hunter2", "https://host?sig=hunter2"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(BadInputError) as raised:
        normalise_url(url)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("key", ["", "/absolute", "trailing/", "a//b", ".", "a/..", "../a", "nul\0"])
def test_a_key_that_could_lead_elsewhere_is_refused(key):
    with pytest.raises(BadInputError):
        check_key(key)
    if key:
        with pytest.raises(BadInputError):
            join_uri("s3://bucket/set", key)


def test_a_lone_surrogate_cannot_be_written_into_a_file_url():
    with pytest.raises(BadInputError):
        join_uri("file:///", "\ud800")


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [("", ("", "")), ("a", ("", "a")), ("a/", ("a", "")), ("a/b/c", ("a/b", "c")), ("..", ("", ".."))],
)
def test_a_prefix_is_a_folder_and_the_beginning_of_a_name(prefix, parts):
    assert check_prefix(prefix) == parts


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1)])
def test_a_span_before_the_beginning_is_refused(offset, length):
    with pytest.raises(BadInputError):
        Span(offset, length)


def test_a_span_ends_past_its_last_byte():
    assert Span(3, 4).end == 7

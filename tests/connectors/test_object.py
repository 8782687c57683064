import asyncio
import contextlib
import itertools
import json
import logging
import pickle
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from cache.testing import until
from connectors import (
    BadInputError,
    ChangedError,
    DataError,
    ErrorKind,
    NotFoundError,
    PermissionDeniedError,
    Span,
    ThrottledError,
    TransientError,
    open_store,
    split_uri,
)
from connectors.limits import DEFAULT_LIMITS, FIRST_ANSWER_VARIABLE, RequestLimits
from connectors.testing.scripted import Answer, ScriptedServer, serve_objects
from connectors.testing.stores import StoreTests

SECRET = "hunter2hunter2hunter2"
BODY = bytes(range(256)) * 40_000  # 10 MB
SERVE = serve_objects({"bucket/key": BODY, "bucket/small": BODY[:100], "key": BODY})
# Tries again at once; waits as long as a busy machine may need.
QUICK = RequestLimits(
    connect_timeout_s=60, read_timeout_s=60, request_timeout_s=60, max_retries=2, max_pause_s=0.01, retry_timeout_s=60
)


def _open(url, server, limits=QUICK, **options):
    keys = {"access_key_id": "an-access-key-id", "secret_access_key": SECRET}
    return open_store(url, endpoint=server if isinstance(server, str) else server.url, limits=limits, **keys, **options)


# Against a real server


@pytest.fixture(scope="module")
def bucket(s3_server):
    return s3_server.create_bucket("connectors")


@pytest.mark.s3
class TestS3Store(StoreTests):
    chunk_bytes = 6 << 20  # parts leave from 5 MiB on
    numbers = itertools.count()

    @pytest.fixture
    def store(self, s3_server, bucket, monkeypatch):
        self.server = s3_server
        for name, value in s3_server.environment().items():
            monkeypatch.setenv(name, value)
        return open_store(f"{bucket}/test-{next(self.numbers)}")

    def peek(self, store, key):
        try:
            with urllib.request.urlopen(self._url(store, key), timeout=10) as answer:
                # The server answers a folder with a page.
                return None if answer.headers.get("Content-Type", "").startswith("text/html") else answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                raise
            return None

    def poke(self, store, key, data):
        request = urllib.request.Request(self._url(store, key), data, {"Content-Type": "application/x"}, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def _url(self, store, key):
        return self.server.object_url("connectors", f"{split_uri(store.url)[1]}/{key}")

    async def test_an_object_of_several_parts_is_whole_and_versioned(self, store):
        written = await store.put("large", BODY * 2)
        assert await store.head("large") == written
        assert bytes(await store.get("large", version=written.version)) == BODY * 2

    async def test_the_server_itself_refuses_another_version(self, store, s3_server):
        # The other half of the check, comparing what comes back, is tested against a server that does not refuse.
        await store.put("key", b"x")
        with ScriptedServer(lambda exchange: Answer()) as spy:
            with pytest.raises(DataError):
                await _open(store.url, spy).get_range("key", Span(0, 1), version='"other"')
            assert spy.requests[0].headers["if-match"] == '"other"'
        with pytest.raises(ChangedError):
            await store.get_range("key", Span(0, 1), version='"other"')


@pytest.mark.s3
class TestRefusals:
    async def test_an_aborted_upload_leaves_no_parts(self, s3_server, s3_bucket):
        store = open_store(f"s3://{s3_bucket}", **s3_server.options())
        uploads = []

        async def failing():
            for _ in range(4):
                yield bytes(6 << 20)
                uploads.extend(await asyncio.to_thread(_listed, s3_server, s3_bucket))
            raise ValueError("the source broke")

        with pytest.raises(ValueError, match="the source broke"):
            await store.put_stream("key", failing())
        assert uploads, "nothing had begun, so nothing was tested"
        assert _listed(s3_server, s3_bucket) == []

    async def test_a_bucket_that_does_not_exist_is_not_found(self, s3_server):
        store = open_store("s3://absent-bucket", **s3_server.options())
        with pytest.raises(NotFoundError, match=r"s3://absent-bucket/key \(NoSuchBucket\)"):
            await store.get("key")

    async def test_a_wrong_secret_is_permission_denied_and_not_told(self, s3_server, bucket):
        store = open_store(bucket, **s3_server.options() | {"secret_access_key": SECRET})
        with pytest.raises(PermissionDeniedError, match="SignatureDoesNotMatch") as raised:
            await store.get("key")
        _assert_silent(raised.value, SECRET, s3_server.options()["access_key_id"])


def _listed(server, bucket):
    request = urllib.request.Request(server.object_url(bucket, ".uploads/"), headers={"Accept": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["Entries"] or []
    except urllib.error.HTTPError:
        return []


# Against a server that answers what it is told to


async def test_near_ranges_share_a_request_and_far_ones_do_not():
    with ScriptedServer(SERVE) as server:
        store = _open("s3://bucket", server)
        spans = [Span(0, 10), Span(9_000_000, 10), Span(500_000, 10), Span(3, 3)]
        buffers = await store.get_ranges("key", spans)
    assert [bytes(buffer) for buffer in buffers] == [BODY[span.offset : span.end] for span in spans]
    assert sorted(request.headers["range"] for request in server.requests) == [
        "bytes=0-500009",
        "bytes=9000000-9000009",
    ]


async def test_empty_objects_that_stand_for_folders_are_not_listed():
    # As the S3 console and some mounts leave them; the order of a page is not relied on.
    entries = [("set/z", 3), ("set/cats/", 0), ("set/cats/1.png", 5), ("set/empty", 0), ("settings", 1)]
    assert await _listing(entries) == [("set/cats/1.png", 5), ("set/empty", 0), ("set/z", 3)]


@pytest.mark.parametrize("size_bytes", [0, 5])
async def test_of_keys_that_differ_by_a_slash_at_the_end_the_empty_one_is_not_listed(size_bytes):
    entries = [("set/a/", 0), ("set/a", size_bytes), ("set/b", 1)]
    for order in (entries, entries[::-1]):
        assert await _listing(order) == [("set/a", size_bytes), ("set/b", 1)]


async def test_two_objects_whose_keys_differ_by_a_slash_at_the_end_are_refused_by_name():
    with pytest.raises(BadInputError, match="two objects have the key 'set/a', one with a slash"):
        await _listing([("set/a", 5), ("set/a/", 7)])


@pytest.mark.parametrize("key", ["set/a//b", "set/../a", "set/a\x7fb"])
async def test_a_listed_key_that_cannot_be_read_is_named(key):
    with pytest.raises(BadInputError) as raised:
        await _listing([("set/a", 1), (key, 1)])
    assert repr(key) in str(raised.value)


async def _listing(entries):
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>e</ETag>"
        "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
        for key, size in entries
    )
    with ScriptedServer(
        lambda exchange: Answer(200, {}, f"<ListBucketResult>{contents}</ListBucketResult>".encode())
    ) as s3:
        return [(meta.key, meta.size_bytes) async for meta in _open("s3://bucket", s3).list("set/")]


@pytest.mark.parametrize("spans", [[Span(0, 4)], [Span(0, 4), Span(9_000_000, 4)], [Span(0, 0)]])
async def test_a_server_that_ignores_if_match_is_caught_by_its_etag(spans):
    def ignorant(exchange):
        return SERVE(_without(exchange, "if-match"))

    with ScriptedServer(ignorant) as server:
        store = _open("s3://bucket", server)
        version = (await store.head("key")).version
        assert len(await store.get_ranges("key", spans, version=version)) == len(spans)
        with pytest.raises(ChangedError):
            await store.get_ranges("key", spans, version='"other"')
        with pytest.raises(ChangedError):
            await store.get("key", version='"other"')


async def test_parts_of_different_contents_are_never_put_together():
    other = serve_objects({"bucket/key": bytes(len(BODY))})
    with ScriptedServer(lambda exchange: (SERVE if exchange.number else other)(exchange)) as server:
        store = _open("s3://bucket", server)
        with pytest.raises(ChangedError):
            await store.get_ranges("key", [Span(0, 4), Span(9_000_000, 4)])


async def test_a_body_that_is_cut_is_resumed():
    with ScriptedServer(lambda exchange: _cut(exchange, SERVE) if exchange.number < 2 else SERVE(exchange)) as server:
        assert bytes(await _open("s3://bucket", server).get("key")) == BODY
        assert len(server.requests) == 3


@pytest.mark.parametrize("honours_if_match", [True, False])
async def test_a_body_that_is_cut_is_not_resumed_from_other_content(honours_if_match):
    other = serve_objects({"bucket/key": bytes(len(BODY))})

    def script(exchange):
        if exchange.number == 1:
            return _cut(exchange, SERVE)
        exchange = exchange if honours_if_match else _without(exchange, "if-match")
        return (other if exchange.number else SERVE)(exchange)

    with ScriptedServer(script) as server:
        store = _open("s3://bucket", server)
        version = (await store.head("key")).version
        with pytest.raises((ChangedError, TransientError)):
            await store.get("key", version=version)


async def test_a_body_shorter_than_its_range_is_asked_for_again_and_then_an_error():
    def short(exchange):
        answer = SERVE(exchange)
        return Answer(answer.status, {**answer.headers, "Content-Length": "50"}, answer.body[:50])

    with ScriptedServer(short) as server:
        with pytest.raises(TransientError) as raised:
            await _open("s3://bucket", server).get_range("key", Span(0, 100))
        assert raised.value.kind == ErrorKind.SHORT_BODY
        assert len(server.requests) == 3


async def test_a_server_that_answers_the_whole_for_a_range_is_a_protocol_error():
    with ScriptedServer(lambda exchange: SERVE(_without(exchange, "range"))) as server:
        with pytest.raises(DataError) as raised:
            await _open("s3://bucket", server).get_range("key", Span(5, 100))
        assert raised.value.kind == ErrorKind.PROTOCOL
        assert len(server.requests) == 3


async def test_a_server_that_answers_the_whole_for_a_range_once_is_asked_again():
    def busy(exchange):
        return SERVE(exchange if exchange.number else _without(exchange, "range"))

    with ScriptedServer(busy) as server:
        assert bytes(await _open("s3://bucket", server).get_range("key", Span(5, 100))) == BODY[5:105]
        assert len(server.requests) == 2


STATUSES = [
    (400, BadInputError, ErrorKind.BAD_INPUT, 1),
    (401, PermissionDeniedError, ErrorKind.PERMISSION_DENIED, 1),
    (403, PermissionDeniedError, ErrorKind.PERMISSION_DENIED, 1),
    (404, NotFoundError, ErrorKind.NOT_FOUND, 1),
    (405, BadInputError, ErrorKind.BAD_INPUT, 1),
    (409, TransientError, ErrorKind.TRANSIENT, 1),
    (412, ChangedError, ErrorKind.CHANGED, 1),
    (416, BadInputError, ErrorKind.BAD_RANGE, 1),
    (429, ThrottledError, ErrorKind.THROTTLED, 3),
    (500, TransientError, ErrorKind.TRANSIENT, 3),
    (502, TransientError, ErrorKind.TRANSIENT, 3),
    (503, ThrottledError, ErrorKind.THROTTLED, 3),
    (504, TransientError, ErrorKind.TRANSIENT, 3),
]


@pytest.mark.parametrize(("status", "error", "kind", "attempts"), STATUSES)
async def test_a_refusal_is_one_of_our_errors_and_tells_no_secret(status, error, kind, attempts, caplog):
    caplog.set_level(logging.DEBUG)

    def refuse(exchange):
        # As S3 answers a wrong signature: with all that it was computed from.
        echo = f"<Error><Code>Refused</Code><Message>{SECRET} {dict(exchange.headers)}</Message></Error>"
        return Answer(status, {"x-amz-meta": SECRET}, echo.encode())

    with ScriptedServer(refuse) as server:
        store = _open("s3://bucket/set", server)
        for attempt in (store.get("key"), store.get_range("key", Span(0, 9)), store.put("key", b"x")):
            with pytest.raises(error) as raised:
                await attempt
            assert type(raised.value) is error
            assert raised.value.kind == kind
            assert raised.value.uri == "s3://bucket/set/key"
            assert "s3://bucket/set/key" in str(raised.value)
            _assert_silent(raised.value, SECRET, "an-access-key-id", "Signature=", "AWS4")
        assert len(server.requests) == 3 * attempts
    assert SECRET not in caplog.text
    assert SECRET not in repr(store)


def _assert_silent(error, *secrets):
    told = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    told += repr(pickle.loads(pickle.dumps(error)).__dict__)
    assert error.__cause__ is None
    assert error.__context__ is None
    for secret in secrets:
        assert secret not in told


async def test_throttling_that_ends_in_time_is_not_seen():
    with ScriptedServer(lambda exchange: Answer(503) if exchange.number < 2 else SERVE(exchange)) as server:
        assert bytes(await _open("s3://bucket", server).get("small")) == BODY[:100]


async def test_by_default_a_store_that_is_overloaded_for_a_while_is_asked_ten_times_and_more():
    limits = replace(DEFAULT_LIMITS, max_pause_s=0.01)
    with ScriptedServer(lambda exchange: Answer(503) if exchange.number < 10 else SERVE(exchange)) as server:
        assert bytes(await _open("s3://bucket", server, limits).get("small")) == BODY[:100]


async def test_a_silent_server_is_a_time_out():
    limits = replace(QUICK, read_timeout_s=0.3)
    with ScriptedServer(lambda exchange: Answer(silent=True)) as server:
        with pytest.raises(TransientError) as raised:
            await _open("s3://bucket", server, limits).get("key")
        assert raised.value.kind == ErrorKind.TIMEOUT
        # A thread of the server may come to the last one after it was given up.
        await until(lambda: len(server.requests) >= 3)
    assert len(server.requests) == 3


async def test_nobody_at_the_endpoint_is_unreachable():
    with ScriptedServer(SERVE) as server:
        pass
    with pytest.raises(TransientError, match="endpoint") as raised:
        await _open("s3://bucket", server).get("key")
    assert raised.value.kind == ErrorKind.UNREACHABLE
    _assert_silent(raised.value, SECRET)


# With these a client asks for longer than a test may take.
ENDLESS = replace(QUICK, max_retries=1_000_000, retry_timeout_s=3600, first_answer_s=0.01)


def _listed_with(store):
    return anext(store.list("folder/"))


async def _streamed_with(store):
    async def chunks():
        for _ in range(2):
            yield bytes(6 << 20)

    return await store.put_stream("key", chunks())


@pytest.mark.parametrize(
    "request_of",
    [
        lambda store: store.get("key"),
        lambda store: store.put("key", b"x"),
        lambda store: store.copy("key", "other"),
        _listed_with,
        _streamed_with,
    ],
)
async def test_a_store_that_never_answered_and_is_out_of_reach_is_given_up(request_of):
    with ScriptedServer(SERVE) as server:
        pass
    store = _open("s3://bucket", server, ENDLESS)
    for _ in range(2):
        with pytest.raises(TransientError, match=FIRST_ANSWER_VARIABLE) as raised:
            await request_of(store)
        assert raised.value.kind == ErrorKind.UNREACHABLE
        _assert_silent(raised.value, SECRET)


async def test_a_store_whose_name_does_not_resolve_is_given_up():
    # Too long for a label, so that nobody has to be asked.
    with pytest.raises(TransientError, match=FIRST_ANSWER_VARIABLE):
        await _open("s3://bucket", f"http://{'x' * 64}.invalid", ENDLESS).head("key")


@pytest.mark.parametrize("status", [200, 404, 403, 500])
async def test_a_store_that_has_answered_anything_is_asked_as_often_as_its_limits_say(status):
    # A connection that stayed open would be served after the end of the server.
    with ScriptedServer(lambda exchange: Answer(status, {"Connection": "close"})) as server:
        store = _open("s3://bucket", server, replace(QUICK, first_answer_s=0.0001))
        with contextlib.suppress(DataError):
            await store.get("key")
    with pytest.raises(TransientError) as raised:
        await store.get("key")
    assert raised.value.kind == ErrorKind.UNREACHABLE
    assert FIRST_ANSWER_VARIABLE not in str(raised.value)


async def test_a_store_that_refuses_for_a_while_is_not_taken_for_a_mistake():
    limits = replace(ENDLESS, first_answer_s=0.0001)
    with ScriptedServer(lambda exchange: Answer(503) if exchange.number < 5 else SERVE(exchange)) as server:
        assert bytes(await _open("s3://bucket", server, limits).get("small")) == BODY[:100]


async def test_a_store_that_is_slow_at_first_is_waited_for():
    limits = replace(ENDLESS, read_timeout_s=0.3)
    with ScriptedServer(lambda exchange: SERVE(exchange) if exchange.number else Answer(silent=True)) as server:
        assert bytes(await _open("s3://bucket", server, limits).get("small")) == BODY[:100]


async def test_missing_credentials_are_named(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with ScriptedServer(lambda exchange: Answer(404)) as server:
        store = open_store("s3://bucket", endpoint=server.url, metadata_endpoint=server.url, limits=QUICK)
        with pytest.raises(PermissionDeniedError, match="AWS_ACCESS_KEY_ID"):
            await store.get("key")


async def test_a_key_with_control_characters_is_bad_input():
    with ScriptedServer(SERVE) as server:
        with pytest.raises(BadInputError, match="control"):
            await _open("s3://bucket", server).put("tab\there", b"x")
        assert server.requests == []


@pytest.mark.parametrize("options", [{"nonsense": "x"}, {"client_options": {"nonsense": "x"}}, {"region": 3}])
def test_an_option_that_does_not_exist_is_refused(options):
    with pytest.raises(BadInputError) as raised:
        _open("s3://bucket", "http://127.0.0.1:1", **options)
    _assert_silent(raised.value, SECRET)


def test_settings_that_do_not_fit_together_are_named_but_not_told(monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(BadInputError, match="access_key_id") as raised:
        open_store("s3://bucket", access_key_id=SECRET)
    _assert_silent(raised.value, SECRET)


async def test_a_web_server_is_read_with_versions_and_ranges():
    with ScriptedServer(SERVE) as server:
        store = open_store(server.url, limits=QUICK)
        meta = await store.head("key")
        assert meta.size_bytes == len(BODY)
        assert bytes(await store.get_range("key", Span(7, 9), version=meta.version)) == BODY[7:16]
        with pytest.raises(ChangedError):
            await store.get("key", version='"other"')
        with pytest.raises(NotFoundError):
            await store.get("absent")
        for attempt in (store.put("key", b""), store.delete("key")):
            with pytest.raises(BadInputError, match="refuses"):
                await attempt
        with pytest.raises(BadInputError):
            await anext(store.list())


async def test_a_web_server_that_gives_only_whole_objects_is_a_protocol_error():
    with ScriptedServer(lambda exchange: SERVE(_without(exchange, "range"))) as server:
        store = open_store(server.url, limits=QUICK)
        assert bytes(await store.get("key")) == BODY
        with pytest.raises(DataError, match="answers other ranges than asked") as raised:
            await store.get_range("key", Span(5, 100))
        assert raised.value.kind == ErrorKind.PROTOCOL


@pytest.mark.parametrize("total", ["*", "?"])
async def test_a_range_that_does_not_say_of_what_it_is_is_a_protocol_error(total):
    with ScriptedServer(lambda _: Answer(206, {"Content-Range": f"bytes 5-8/{total}"}, BODY[5:9])) as server:
        with pytest.raises(DataError) as raised:
            await open_store(server.url, limits=QUICK).get_range("key", Span(5, 4))
        assert raised.value.kind == ErrorKind.PROTOCOL


async def test_a_body_of_unknown_length_is_a_protocol_error():
    chunked = Answer(200, {"Transfer-Encoding": "chunked", "Content-Length": ""}, b"3\r\nabc\r\n0\r\n\r\n")
    with ScriptedServer(lambda _: chunked) as server:
        with pytest.raises(DataError, match="does not say how many bytes it has") as raised:
            await open_store(server.url, limits=QUICK).get("key")
        assert raised.value.kind == ErrorKind.PROTOCOL


async def test_a_web_server_without_head_refuses_it_and_lacks_nothing():
    with ScriptedServer(lambda exchange: Answer(405) if exchange.method == "HEAD" else SERVE(exchange)) as server:
        store = open_store(server.url, limits=QUICK)
        assert bytes(await store.get("key")) == BODY
        with pytest.raises(BadInputError, match=r"refuses the request \(status 405\)"):
            await store.head("key")


async def test_an_encoded_web_url_names_its_object():
    with ScriptedServer(serve_objects({"my set/a#b.bin": b"odd"})) as server:
        assert bytes(await open_store(f"{server.url}/my%20set", limits=QUICK).get("a#b.bin")) == b"odd"


@pytest.mark.parametrize("etag", ['W/"weak"', None])
async def test_without_a_strong_etag_the_version_is_only_compared(etag):
    headers = {"ETag": etag} if etag else {}
    date = "Thu, 01 Jan 2026 00:00:00 GMT"
    with ScriptedServer(lambda exchange: Answer(200, {**headers, "Last-Modified": date}, b"x" * 9)) as server:
        store = open_store(server.url, limits=QUICK)
        version = (await store.head("key")).version
        assert bytes(await store.get("key", version=version)) == b"x" * 9
        date = "Thu, 01 Jan 2026 00:00:01 GMT"
        headers = {"ETag": 'W/"other"'} if etag else {}
        with pytest.raises(ChangedError):
            await store.get("key", version=version)
        assert all("if-match" not in request.headers for request in server.requests)


@pytest.mark.parametrize(
    ("url", "options"),
    [("gs://bucket", {"endpoint": "base_url"}), ("az://bucket", {"endpoint": "endpoint", "account_name": "account"})],
)
async def test_google_and_azure_are_read_alike(url, options):
    with ScriptedServer(SERVE) as server:
        options = {options.pop("endpoint"): server.url, **options} if "endpoint" in options else options
        store = open_store(url, skip_signature=True, limits=QUICK, **options)
        meta = await store.head("key")
        assert bytes(await store.get_range("key", Span(7, 9), version=meta.version)) == BODY[7:16]
        with pytest.raises(ChangedError):
            await store.get("key", version='"other"')


# A fork

FORKING = """
import os, sys
from connectors import BadInputError, open_store, run_sync

def read(store):
    return bytes(run_sync(store.get("small")))

store = open_store("s3://bucket")
if "used" in sys.argv:
    read(store)
child = os.fork()
if child == 0:
    try:
        for one in (store, open_store("s3://bucket")):
            print("read", len(read(one)), flush=True)
    except BadInputError as error:
        print("refused", error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent read", len(read(store)))
"""


@pytest.mark.parametrize(
    ("argument", "first"), [("used", "refused s3://bucket/small cannot be read here"), ("unused", "read 100\nread 100")]
)
def test_a_forked_child_is_refused_where_the_client_would_hang(argument, first, monkeypatch):
    with ScriptedServer(SERVE) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key-id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        done = subprocess.run(
            [sys.executable, "-c", FORKING, argument], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.stdout.startswith(first), done.stderr
    assert done.stdout.endswith("parent read 100\n")
    assert "spawn" in done.stdout or argument == "unused"


def _without(exchange, header):
    headers = {name: value for name, value in exchange.headers.items() if name != header}
    return type(exchange)(exchange.method, exchange.path, headers, exchange.number)


def _cut(exchange, script):
    answer = script(exchange)
    return Answer(answer.status, answer.headers, answer.body, cut_after_bytes=1_000)

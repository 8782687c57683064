"""Coverage-guided fuzzing of what either side of a cache connection takes from the other.

    python benchmarks/fuzz_frames.py -max_total_time=600 [FOLDER]

It needs `atheris`, and takes the options of libFuzzer; a folder keeps the streams that it finds.

Any bytes, cut into any pieces, are messages or one protocol error, for the server and for the client; what the server
takes for a request of blocks passes the checks that come next; nothing is kept of it but the frame that is not complete
yet. Every message that is understood says the same when it is said again. libFuzzer ends with what made it fail: an
exception, 5 s over one input, or 512 MiB.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cache", "connectors"]):
    from cache import frames, orders
    from cache.block_table import TablePage
    from cache.frames import FrameReader, encode, error_of, failure_of, replies, requests
    from cache.keys import BlockRef, block_key
    from cache.rights import AccessConfig, PrefixRule, Rights
    from cache.session import check_sizes, slice_refs
    from connectors.errors import BadInputError, DataError, ErrorKind, PermissionDeniedError

LIMIT_BYTES = {requests: frames.MAX_REQUEST_BYTES, replies: frames.MAX_REPLY_BYTES}
RIGHTS = Rights(AccessConfig(rules=(PrefixRule("s3://bucket/private", (7,)),)), 8)


def seeds() -> list[bytes]:
    """Streams to begin with: a choice of sides and cuts, and something of every kind of message."""
    ref = BlockRef("s3://bucket/key", "version", 10, 1000, 7)
    said = [
        frames.Hello(frames.PROTOCOL_VERSION, "job"),
        frames.ReadBlocks([ref, BlockRef("file:///x", "1-2-3", 0, 1)]),
        frames.ReadObject("s3://bucket/key"),
        frames.ListObjects("s3://bucket"),
        frames.Head("s3://bucket/key"),
        frames.Stats(),
        frames.ReportBad([ref]),
        frames.OpenPlan(bytes(16), 3),
        TablePage(["u"], ["v"], bytes(4), bytes(8), bytes(8), None),
        frames.ExtendPlan(bytes(8)),
        frames.AdvancePlan(3),
        frames.ReplacePlan(),
        orders.AskUsage("s3://bucket", 1, ""),
        orders.PinPrefix("s3://bucket", 1000, 60.0),
        orders.ResizeTier("ram", 1000, None),
    ]
    answered = [
        frames.Welcome(frames.PROTOCOL_VERSION, 1),
        frames.Blocks([frames.Inline("ram", b"x"), frames.Passed("disk", 10, True), frames.Failed("x", "y")], False),
        frames.Object("v", 1, b"x"),
        frames.Listing([], True),
        frames.Statistics({"tiers": [1, 2.5, None]}),
        frames.PlanOpened(True),
        frames.Done(),
        frames.Waiting(),
    ]
    return [bytes([side, cut]) + encode(message) for side, cut, message in [
        *((0, number, message) for number, message in enumerate(said)),
        *((1, number, message) for number, message in enumerate(answered)),
    ]]  # fmt: skip


def check_stream(data: bytes) -> None:
    """Feed a stream to one side; the first two bytes say which, and the size of the pieces."""
    if len(data) < 3:
        return
    make = (requests, replies)[data[0] & 1]
    piece_bytes = data[1] + 1
    reader: FrameReader[frames.Request] | FrameReader[frames.Reply] = make()
    try:
        for begin in range(2, len(data), piece_bytes):
            for message in reader.feed(data[begin : begin + piece_bytes]):
                check_message(make, message)
            assert reader.pending_bytes <= min(len(data), LIMIT_BYTES[make] + 4)
    except DataError as error:
        if error.kind is not ErrorKind.PROTOCOL:
            raise


def check_message(make: object, message: frames.Request | frames.Reply) -> None:
    """What was understood once is understood again, and what comes next in a server can be done with it."""
    said = encode(message)
    (again,) = (requests if make is requests else replies)().feed(said)
    assert encode(again) == said
    if isinstance(message, frames.Failed):
        # A kind that this release does not know becomes one that it does.
        again = failure_of(error_of(message))
        assert encode(failure_of(error_of(again))) == encode(again)
    if isinstance(message, frames.ReadBlocks):
        try:
            RIGHTS.check(ref.uri for ref in message.refs)
            check_sizes(message.refs)
        except (BadInputError, PermissionDeniedError):
            return
        parts = list(slice_refs(message.refs, max_blocks=3, max_bytes=1 << 20))
        assert [ref for part in parts for ref in part] == message.refs
        assert all(len(block_key(ref)) == 16 for ref in message.refs)


def main() -> None:
    """Check the streams to begin with, then let libFuzzer go on from them."""
    for stream in seeds():
        check_stream(stream)
    corpus = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if corpus:
        for number, stream in enumerate(seeds()):
            with open(f"{corpus[0]}/seed-{number}", "wb") as file:
                file.write(stream)
    atheris.Setup([sys.argv[0], "-timeout=5", "-rss_limit_mb=512", *sys.argv[1:]], check_stream)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

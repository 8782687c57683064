"""What tests of caches share: servers, faulty disks, invariants, a reader that checks, and strategies."""

from cache.testing.blocks import make_block, make_key
from cache.testing.children import digest_files, hold_plan, read_until_told, send_awaited_blocks, send_blocks
from cache.testing.engines import running_engine
from cache.testing.faulty_system import FaultySystem
from cache.testing.frame_strategies import garbage, reply_messages, request_messages
from cache.testing.invariants import check_directory, check_limits
from cache.testing.reading import read_blocks, read_handle
from cache.testing.replay import Replay
from cache.testing.servers import RunningServer, running_server
from cache.testing.strategies import block_contents
from cache.testing.until import until

__all__ = [
    "FaultySystem",
    "Replay",
    "RunningServer",
    "block_contents",
    "check_directory",
    "check_limits",
    "digest_files",
    "garbage",
    "hold_plan",
    "make_block",
    "make_key",
    "read_blocks",
    "read_handle",
    "read_until_told",
    "reply_messages",
    "request_messages",
    "running_engine",
    "running_server",
    "send_awaited_blocks",
    "send_blocks",
    "until",
]

"""What tests of readers and servers share."""

from cache.testing.children import send_blocks
from cache.testing.servers import RunningServer, running_server

__all__ = ["RunningServer", "running_server", "send_blocks"]

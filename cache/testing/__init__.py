"""What tests of readers share."""

from cache.testing.children import send_blocks

__all__ = ["send_blocks"]

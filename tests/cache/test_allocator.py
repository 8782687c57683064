"""A server takes the memory for one block after another from what it has freed."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from cache.allocator import keep_freed_memory

assert keep_freed_memory()

def fill():
    return [b"x" * (1 << 20) for _ in range(32)]

fill()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    pages_of_one_round = 32 * (1 << 20) // 4096
    assert int(found.stdout) < pages_of_one_round

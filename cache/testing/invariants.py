"""What must hold of every cache at every moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.block import block_path, file_bytes, parse_name, verify

__all__ = ["check_directory", "check_limits"]

_PAGE_BYTES = 4096


def check_limits(stats: dict[str, Any]) -> None:
    """No tier says that it holds more than it may."""
    for tier in [*stats["tiers"], stats["ring"]]:
        assert 0 <= tier["used_bytes"] <= tier["capacity_bytes"], tier
        assert tier["blocks"] >= 0, tier
        assert tier["capacity_blocks"] is None or tier["blocks"] <= tier["capacity_blocks"], tier


def check_directory(
    path: Path, *, capacity_bytes: int, capacity_blocks: int | None = None, verified: bool = True
) -> dict[bytes, bytes]:
    """The files under a tier's directory, unfinished ones included, are within its limits, whatever anybody says.

    Args:
        path: The tier's directory.
        capacity_bytes: Its limit, for sizes rounded up to 4 KiB.
        capacity_blocks: Its limit on files.
        verified: Check as well that every published block is whole and under its own name.

    Returns:
        The published blocks by key.
    """
    files = [file for top in ("blocks-1", "tmp") for file in (path / top).rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    taken_bytes = sum(-(-size // _PAGE_BYTES) * _PAGE_BYTES for size in sizes)
    assert taken_bytes <= capacity_bytes, f"{taken_bytes} bytes on the medium, {capacity_bytes} allowed"
    assert capacity_blocks is None or len(files) <= capacity_blocks, f"{len(files)} files, {capacity_blocks} allowed"
    blocks: dict[bytes, bytes] = {}
    for file in (path / "blocks-1").glob("*/*"):
        name = parse_name(file.name)
        assert name is not None, file
        key, length = name
        assert file == path / "blocks-1" / block_path(key, length)
        content = file.read_bytes()
        if verified:
            assert len(content) == file_bytes(length)
            verify(key, content[:length], content[length:])
        blocks[key] = content[:length]
    return blocks

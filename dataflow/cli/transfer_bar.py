"""The bar of commands that move bytes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

__all__ = ["transfer_bar"]


def transfer_bar(text: str = "{task.description}") -> Progress:
    """Return a bar on stderr for each task, with bytes, bytes a second and the time left behind `text`."""
    return Progress(
        TextColumn(text),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

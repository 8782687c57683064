"""The bar of commands that move bytes."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

__all__ = ["transfer_bar"]


class _Bars(Progress):
    def stop(self) -> None:
        if self.tasks:
            super().stop()
        else:  # which would end a line where there is no terminal, also one that was never begun
            self.live.stop()


def transfer_bar(text: str = "{task.description}") -> Progress:
    """Return a bar on stderr for each task, with bytes, bytes a second and the time left behind `text`."""
    return _Bars(
        TextColumn(text),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

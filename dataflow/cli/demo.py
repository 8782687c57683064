"""`dataflow demo`: the main job on real data, ending with a table of what happened."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from connectors.errors import BadInputError
from dataflow.demo.showcase import EpochTraffic, Facts, Origin, run_demo

__all__ = ["demo"]

_EPOCHS = 10
_TARGET_ACCURACY = 0.95  # after so many epochs


@click.command()
@click.option(
    "--origin",
    type=click.Choice(["local", "s3"]),
    default="local",
    show_default=True,
    help="Where the shards lie: a folder, or a real S3 server with a cache daemon in front.",
)
@click.option(
    "--epochs", type=click.IntRange(min=2), default=_EPOCHS, show_default=True, help="Passes over the training set."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=None,
    help="Keep images, shards, logs and traces here (an empty or new folder). Default: a temporary one.",
)
def demo(origin: Origin, epochs: int, folder: Path | None) -> None:
    """Convert real images, train on 2 ranks through a small cache, kill a run, resume it, and account for it all."""
    console = Console()
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise BadInputError(f"{folder} is not empty; give --folder a new or an empty folder")
    work = Path(tempfile.mkdtemp(prefix="dataflow-demo-")) if folder is None else folder
    work.mkdir(parents=True, exist_ok=True)
    failed = False
    try:
        facts = run_demo(
            work.resolve(), origin=origin, epochs=epochs, say=lambda line: console.print(f"[bold]·[/] {line}")
        )
    except Exception:
        failed = True
        raise
    finally:
        # A failed demo leaves its logs for whoever wants to know why; who breaks it off does not.
        if folder is None and not failed:
            shutil.rmtree(work)
    console.print(_outcome(facts), _time(facts), _traffic(facts))
    failures = _failures(facts)
    for failure in failures:
        console.print(f"[bold red]failed:[/] {failure}")
    raise SystemExit(1 if failures else 0)


def _failures(facts: Facts) -> list[str]:
    """The claims of the demo that did not hold."""
    first, later = facts.epochs[0], facts.epochs[1:]
    failures = []
    if len(facts.epochs) >= _EPOCHS and facts.accuracy < _TARGET_ACCURACY:
        failures.append(f"test accuracy {facts.accuracy:.1%} is below {_TARGET_ACCURACY:.0%}")
    if not facts.same_sequence:
        failures.append("the resumed run saw other global batches than the undisturbed one")
    if any(epoch.origin_bytes >= first.origin_bytes for epoch in later):
        failures.append("a later epoch took no less from the origin than the first")
    if any(not _is_share_outside(epoch, facts) for epoch in later):
        failures.append("a later epoch's origin traffic is not the share that does not fit")
    return failures


def _is_share_outside(epoch: EpochTraffic, facts: Facts) -> bool:
    """Whether the blocks outside the tiers were fetched, and of those in the tiers none.

    What the ring holds blurs the number: blocks that it carried over from the epoch before are not fetched, and where a
    rank or a worker stood still for a while, the others displaced what it had not read yet, which is fetched again.
    """
    return 0 < epoch.origin_blocks <= facts.blocks_outside + facts.ring_blocks


def _outcome(facts: Facts) -> Table:
    table = Table(title="What happened", show_header=False)
    table.add_row("test accuracy", f"{facts.accuracy:.2%}")
    table.add_row("training speed, 2 ranks", f"{facts.samples_per_s:,.0f} samples/s")
    table.add_row("killed after step, resumed from step", f"{facts.killed_at}, {facts.resumed_at}")
    verdict = "identical" if facts.same_sequence else "DIFFERENT"
    table.add_row(f"{facts.compared_steps} global batches, undisturbed against killed and resumed", verdict)
    return table


def _time(facts: Facts) -> Table:
    table = Table("stage", "seconds", "of", title="Where the time of rank 0 went")
    for name, seconds in facts.seconds.items():
        table.add_row(name, f"{seconds:.2f}", "the loop" if name in ("wait", "model") else "its workers")
    return table


def _traffic(facts: Facts) -> Table:
    names = list(facts.epochs[0].hits)
    kept = 1 - facts.blocks_outside / facts.blocks
    table = Table(
        title=f"{facts.blocks} blocks, {facts.dataset_bytes / 1e6:.2f} MB; the tiers keep {kept:.0%}, "
        f"{facts.blocks_outside} blocks stay outside"
    )
    for column in (
        "epoch",
        "requests per 1,000 samples",
        "blocks from origin",
        "MB",
        *(f"{name} hits" for name in names),
    ):
        table.add_column(column, justify="right")
    for number, epoch in enumerate(facts.epochs):
        total = sum(epoch.hits.values()) + epoch.origin_blocks
        hits = (f"{epoch.hits[name]:,} ({epoch.hits[name] / total:.0%})" for name in names)
        requests = f"{epoch.origin_requests / facts.samples * 1000:.1f}"
        table.add_row(str(number), requests, str(epoch.origin_blocks), f"{epoch.origin_bytes / 1e6:.2f}", *hits)
    return table

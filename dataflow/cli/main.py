"""The `dataflow` command.

A subcommand's module is imported only when it is used, so `dataflow --help` and `dataflow --version` answer at once:
neither pyarrow nor torch is loaded for them. To add a command, add its line to `COMMANDS`.
"""

from __future__ import annotations

import errno
import io
import logging
import sys
from importlib import import_module
from typing import NamedTuple, cast

import click

__all__ = ["main"]

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class _Subcommand(NamedTuple):
    target: str  # "module:attribute"
    help: str  # shown by `dataflow --help`, so that the module need not be imported for it


COMMANDS = {
    "bench": _Subcommand("dataflow.cli.bench:bench", "Read a dataset as training would; say what limits it."),
    "cache": _Subcommand("dataflow.cli.cache:cache", "Run this node's cache daemon, or ask it something."),
    "convert": _Subcommand("dataflow.cli.convert:convert", "Turn a dataset into native shards, or another format."),
    "demo": _Subcommand("dataflow.cli.demo:demo", "Train on real images through the cache, kill, resume, report."),
    "diff": _Subcommand("dataflow.cli.diff:diff", "Compare two datasets, whatever their formats."),
    "doctor": _Subcommand("dataflow.cli.doctor:doctor", "Say what this installation is and what is wrong with it."),
    "formats": _Subcommand("dataflow.cli.formats:formats", "List the formats that are read and written."),
    "index": _Subcommand("dataflow.cli.index:index", "Scan files that have no index, once, and keep what was found."),
    "inspect": _Subcommand("dataflow.cli.inspection:inspect", "Show a dataset's fields, shards and blocks."),
    "plan": _Subcommand("dataflow.cli.plan:plan", "Show what each rank will read; check that nothing is lost."),
    "state": _Subcommand("dataflow.cli.state:state", "Show where a loader stands, from its state or a checkpoint."),
    "verify": _Subcommand("dataflow.cli.verify:verify", "Read a whole dataset: every checksum, every count."),
}


class _Failure(click.ClickException):
    """An error of ours as click shows it: one message on stderr and exit code 1."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)


class _BadInput(_Failure):
    """The caller has to change something: click's own code for a wrong argument."""

    exit_code = 2


class _LazyGroup(click.Group):
    """A group that knows its commands by name and imports the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        subcommand = COMMANDS.get(cmd_name)
        if subcommand is None:
            return None
        module, _, attribute = subcommand.target.partition(":")
        return cast("click.Command", getattr(import_module(module), attribute))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own version imports every command to read its help.
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].help) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> object:
        # Imported here because `--help` and `--version` never come this far.
        from connectors.errors import BadInputError, DataError

        try:
            return super().invoke(ctx)
        except DataError as error:
            if ctx.params["debug"]:
                raise
            raise (_BadInput if isinstance(error, BadInputError) else _Failure)(error) from error
        except OSError as error:  # such as a full disk behind stdout; a reader that went away is click's to end
            if ctx.params["debug"] or error.errno == errno.EPIPE:
                raise
            raise _Failure(error) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Log everything to stderr and show tracebacks.")
@click.version_option(package_name="tiered-dataflow", prog_name="dataflow")
def main(*, debug: bool) -> None:
    """Keep accelerators fed: convert datasets, cache them near, and see what happens."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names and texts that the locale cannot write
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

"""The command itself: its subcommands exist, and an error is a line, not a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from connectors.errors import BadInputError, DataError, NotFoundError
from dataflow.cli import main as cli


def _run_failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(sys.modules[__name__], "failing", failing, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "failing", cli._Subcommand(f"{__name__}:failing", "Fails."))
    return CliRunner().invoke(cli.main, [*options, "failing"])


def test_version_is_the_installed_one() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    assert result.output.split()[-1] == version("tiered-dataflow")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_in_the_help_exists(name: str) -> None:
    assert name in CliRunner().invoke(cli.main, ["--help"]).output
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage:")


@pytest.mark.parametrize("group", [[], ["cache"], ["state"]], ids=" ".join)
def test_the_help_of_a_group_cuts_no_summary_short(group: list[str]) -> None:
    assert "..." not in CliRunner().invoke(cli.main, [*group, "--help"]).output.partition("Commands:")[2]


def test_an_unknown_command_is_named() -> None:
    result = CliRunner().invoke(cli.main, ["feed"])
    assert result.exit_code == 2
    assert "No such command 'feed'" in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(DataError("no"), 1), (NotFoundError("no object at s3://b/k"), 1), (BadInputError("epochs must be >= 1"), 2)],
)
def test_an_error_of_ours_is_one_line_on_stderr(
    error: DataError, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run_failing_with(error, monkeypatch)
    assert result.exit_code == exit_code
    assert result.stderr == f"Error: {error}\n"
    assert result.stdout == ""


def test_what_the_system_refuses_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_failing_with(OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    assert result.exit_code == 1
    assert result.stderr == "Error: [Errno 28] No space left on device\n"


def test_text_that_the_locale_cannot_write_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "日本"}\n', "utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [Path(sys.executable).with_name("dataflow"), "inspect", tmp_path]
    shown = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert rb"\u65e5\u672c" in shown.stdout


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_failing_with(NotFoundError("gone"), monkeypatch, "--debug")
    assert isinstance(result.exception, NotFoundError)


def test_a_defect_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_failing_with(ZeroDivisionError(), monkeypatch)
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_ends_with_the_code_that_shells_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_failing_with(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_ctrl_c_while_a_command_is_still_imported_does_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "connectors.errors", Interrupted())
    result = CliRunner().invoke(cli.main, ["formats"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_reader_that_goes_away_is_not_an_error_message() -> None:
    command = Path(sys.executable).with_name("dataflow")
    with subprocess.Popen([command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything is written: Python takes longer to start
        assert process.stderr.read() == b""

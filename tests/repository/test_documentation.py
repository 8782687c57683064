"""Every example in the documentation runs, in an empty folder, and every page is reachable."""

from __future__ import annotations

import codeop
import re
import shlex
from pathlib import Path

import click
import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

from cache.daemon_config import DaemonConfig
from dataflow.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _check_cache_configuration(example: Example) -> None:
    Path("cache.toml").write_text(example.parsed)
    DaemonConfig.from_toml("cache.toml")


EXAMPLES = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser(), CodeBlockParser("toml", _check_cache_configuration)],
    path=str(ROOT),
    patterns=["**/*.md"],
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run_in_the_order_they_are_read(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES.parse(page).examples():
        example.evaluate()


def test_the_tutorial_can_be_typed_line_by_line_at_the_prompt_of_python() -> None:
    typed = codeop.CommandCompiler()
    for example in EXAMPLES.parse(ROOT / "docs" / "tutorials" / "first-run.md").examples():
        statement: list[str] = []
        for line in [*str(example.parsed).splitlines(), ""]:
            statement.append(line)
            if typed("\n".join(statement), symbol="single") is not None:
                statement = []
        assert statement == []


def test_examples_are_found_at_all() -> None:
    assert any(list(EXAMPLES.parse(page).examples()) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    text = page.read_text().replace("\\\n", "")
    lines = re.findall(r"^(?:    |\$ )(dataflow .*)$", text, flags=re.MULTILINE)
    assert [fault for line in [*lines, *re.findall(r"`(dataflow [^`]*)`", text)] for fault in _faults(line)] == []


def _faults(line: str) -> list[str]:
    """What of a command line does not exist; what stands for several (`a|b`, `...`) ends the look."""
    command: click.Command = main
    faults = []
    for word in shlex.split(line, comments=True)[1:]:
        if word == "..." or "|" in word:
            break
        if word.startswith("-"):
            known = {name for option in command.params for name in [*option.opts, *option.secondary_opts, "--help"]}
            faults += [] if word.partition("=")[0] in known else [f"{line}: no {word}"]
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return [f"{line}: no {word}"]
            command = found
    return faults


def test_a_command_that_is_not_there_is_found() -> None:
    assert _faults("dataflow cache status --json") == _faults("dataflow cache warm|top") == []
    assert _faults("dataflow cache statsu") == ["dataflow cache statsu: no statsu"]
    assert _faults("dataflow convert a b --form x") == ["dataflow convert a b --form x: no --form"]

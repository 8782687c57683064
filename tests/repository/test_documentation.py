"""Every example in the documentation runs, in an empty folder, and every page is reachable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser

from cache.daemon_config import DaemonConfig

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


def test_examples_are_found_at_all() -> None:
    assert any(list(EXAMPLES.parse(page).examples()) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_that_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []

"""What the tests of datasets run under, and what they share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _conversions_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion has workers where a test asks for them, not where a busy machine made its first job look long."""
    monkeypatch.setattr("dataflow.convert.stages.WORTHWHILE_S", math.inf)


@pytest.fixture
def kept_scans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of the test's own for the indexes of what it scans."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dataflow" / "index"

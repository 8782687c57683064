"""What an import costs, and that it is ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _modules_after(code: str) -> set[str]:
    report = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", report], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


def test_the_repository_itself_is_not_importable() -> None:
    """Else the tests would pass on files that the wheel does not hold."""
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


@pytest.mark.parametrize("package", ["connectors", "cache", "dataflow"])
def test_torch_is_not_imported_before_a_loader_is_asked_for(package: str) -> None:
    assert "torch" not in _modules_after(f"import {package}")


def test_the_loader_is_where_torch_comes_in() -> None:
    assert "torch" in _modules_after("from dataflow import DataLoader")


def test_each_package_can_be_the_first_that_is_imported() -> None:
    """Each in a process of its own, which has nothing of ours: a circle of imports shows only from one end."""
    code = """
import importlib.util, os, sys
from pathlib import Path
import numpy, pyarrow, torch
names = []
for top in ("connectors", "cache", "dataflow"):
    folder = Path(*importlib.util.find_spec(top).submodule_search_locations)
    names += [".".join([top, *file.parent.relative_to(folder).parts]) for file in folder.rglob("__init__.py")]
assert len(names) > 15, names
for name in names:
    child = os.fork()
    if not child:
        __import__(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported first")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_answers_without_loading_what_reads_data(option: str) -> None:
    code = f"""
from dataflow.cli.main import main
try:
    main([{option!r}])
except SystemExit as end:
    assert not end.code
"""
    assert not _modules_after(code) & {"torch", "pyarrow", "numpy", "obstore"}

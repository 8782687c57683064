"""What the repository offers besides Python: `make`, and what CI runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("closing", "exit_code"),
    [
        ("=== 3 passed in 1.20s ===", 0),
        ("=== 1 failed, 2 passed in 61.20s (0:01:01) ===", 2),
    ],
)
def test_ci_ends_with_the_closing_line_of_pytest(closing: str, exit_code: int, tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text(
        f"#!/bin/sh\necho \"called with $*\"\necho '{closing}'\n"
        + ("echo 'make: *** [Makefile:1: test] Error 1'\nexit 2\n" if exit_code else "")
    )
    make.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[0] == "called with test"
    assert done.stdout.splitlines()[-1] == closing
    assert done.returncode == exit_code


def test_a_machine_without_a_python_that_fits_is_told_so(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    sh = shutil.which("sh")
    done = subprocess.run(
        [sh, ROOT / ".ci" / "find-python"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Python 3.11 or newer" in done.stderr


def test_make_explains_itself() -> None:
    done = subprocess.run(["make", "-C", ROOT, "-s"], capture_output=True, text=True, check=True, timeout=60)
    assert "make test" in done.stdout

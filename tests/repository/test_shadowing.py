"""A user's own `cache.py` beside the training script must not take our place in silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["cache", "connectors"])
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_users_own_module_of_our_name_is_named_by_the_error(tmp_path: Path, name: str, form: str) -> None:
    shadow = tmp_path / f"{name}.py" if form == "module" else tmp_path / name / "__init__.py"
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("mine = 1\n")
    script = tmp_path / "train.py"
    script.write_text("import dataflow\n")

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert str(shadow) in last_line


def test_other_modules_beside_the_script_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "caches.py").write_text("")
    script = tmp_path / "train.py"
    script.write_text("import caches, dataflow\n")
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)

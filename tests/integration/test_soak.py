"""The soak script finds nothing wrong: for two minutes under `make test`, for seconds otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_wrong_and_nothing_is_left_after_a_short_soak():
    minutes = os.environ.get("SOAK_MINUTES", "0.15")
    done = subprocess.run([sys.executable, SCRIPT, "--minutes", minutes, "--readers", "2"], stdout=-1, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert (report["wrong"], report["crashed"], set(report["leaks"].values())) == (0, 0, {0})
    assert report["blocks"] > 0
    assert report["faults"]

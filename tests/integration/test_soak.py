"""The soak script finds nothing wrong in a short run; `benchmarks/soak.py --minutes 30` is the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_nothing_is_wrong_and_nothing_is_left_after_a_short_soak():
    done = subprocess.run([sys.executable, SCRIPT, "--minutes", "0.15", "--readers", "2"], stdout=-1, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert (report["wrong"], report["crashed"], set(report["leaks"].values())) == (0, 0, {0})
    assert report["blocks"] > 0
    assert report["faults"]

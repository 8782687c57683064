"""One record of 300 MiB, through native shards and through a format of rows, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import numpy as np
import pyarrow as pa
from crc32c import crc32c
from dataflow import ShardWriter, open_dataset
from dataflow.convert import convert

where = sys.argv[1]
large = np.arange(75 << 20, dtype=np.uint32).tobytes()
checksum = crc32c(large)
with ShardWriter(f"{where}/native", pa.schema({"x": pa.binary(), "n": pa.int64()})) as writer:
    for number, value in enumerate([b"small", large, b""]):
        writer.write({"x": value, "n": number})
del large, value
convert(f"{where}/native", f"{where}/rows", to="webdataset", workers=0)
for name in ("native", "rows"):
    dataset = open_dataset(f"{where}/{name}", cache=None)
    first, record, last = dataset.get_batch([0, 1, 2])["x"]
    print(first, len(record), crc32c(record) == checksum, last)
    del record
    dataset.reader.close()
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM")))
"""


def test_a_record_of_300_mib_comes_back_in_bounded_memory(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    *shown, peak_mib = done.stdout.splitlines()
    assert shown == [f"b'small' {300 << 20} True b''"] * 2
    # The record itself, its file mapped, and at most two copies on their way from one to the other.
    assert 300 < int(peak_mib) < 1800

"""A process that ends leaves nothing open, whatever its loaders were at."""

import subprocess
import sys
import textwrap

import pytest

TRAINER = """
    import sys
    import pyarrow as pa
    from cache.config import CacheConfig, TierConfig
    from dataflow import DataLoader, ElasticBatchSampler, ShardWriter, open_dataset

    if __name__ == "__main__":
        with ShardWriter("numbers", pa.schema([("number", pa.int64())]), block_size_bytes=200) as writer:
            for number in range(100):
                writer.write({"number": number})
        dataset = open_dataset("numbers", cache=CacheConfig((TierConfig("ram", 1 << 20),)))
        processes = {"num_workers": 1}
        ways = [{}, processes, {**processes, "persistent_workers": True}, {**processes, "workers": "thread"}]
        held = []
        for options in ways:
            for steps in (1, 100):  # in the middle of an epoch, and behind it
                loader = DataLoader(dataset, batch_sampler=ElasticBatchSampler(dataset, 10), **options)
                iterator = iter(loader)
                held.append((loader, iterator, [batch for batch, _ in zip(iterator, range(steps))]))
        if sys.argv[1] == "exception":
            raise ZeroDivisionError
        print(len(held))
"""


@pytest.mark.parametrize("ending", ["plain", "exception"])
def test_a_process_that_ends_with_loaders_and_a_private_cache_leaves_nothing_unclosed(ending, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(textwrap.dedent(TRAINER))
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", str(script), ending],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert "ResourceWarning" not in done.stderr
    assert (done.returncode, done.stdout) == ((0, "8\n") if ending == "plain" else (1, ""))

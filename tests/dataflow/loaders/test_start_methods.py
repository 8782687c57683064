"""However workers are started, values of every kind arrive as they are made in the trainer's process."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from dataflow.loaders import DataLoader, crew
from dataflow.loaders.testing import Records


def plain(value):
    """What a value is made of, for comparison."""
    if isinstance(value, dict):
        return type(value), {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(inner) for inner in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return type(value), value.dtype, value.tolist()
    return value


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_values_of_every_kind_arrive_however_workers_are_started(method):
    """As they are and nested: `list` leaves samples alone."""
    inline = DataLoader(Records(6), batch_size=2, collate_fn=list)
    workers = DataLoader(Records(6), batch_size=2, collate_fn=list, num_workers=1, multiprocessing_context=method)
    assert [plain(batch) for batch in workers] == [plain(batch) for batch in inline]


LETTING_GO = """
    import os, sys
    from torch.utils.data import get_worker_info
    from dataflow.loaders import DataLoader
    from dataflow.loaders.testing import Numbers

    class Journal(Numbers):
        def __del__(self):
            if os.getpid() != self.trainer_pid:
                os.write(1, f"let go of by a worker, {get_worker_info()} now".encode())

    if __name__ == "__main__":
        dataset = Journal(6)
        dataset.trainer_pid = os.getpid()
        list(DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context=sys.argv[1]))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_lets_go_of_its_dataset_in_the_end(method, tmp_path):
    """As torch's do since 2.14, so that files are closed; a worker that is forked has the trainer's variables, too."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(LETTING_GO))
    done = subprocess.run(
        [sys.executable, str(script), method], stdout=subprocess.PIPE, text=True, timeout=90, check=True
    )
    assert done.stdout == "let go of by a worker, None now"


UNGUARDED = """
    from dataflow.loaders import DataLoader
    from dataflow.loaders.testing import Numbers

    for batch in DataLoader(Numbers(8), num_workers=1, multiprocessing_context="spawn"):
        print(batch)
"""


def test_spawning_without_a_guard_fails_once_in_the_words_of_multiprocessing_and_torch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(UNGUARDED))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("An attempt has been made to start a new process before") == 1
    assert "if __name__ == '__main__':" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: DataLoader worker (pid(s) ")
    assert last.endswith(") exited unexpectedly")


def fail(*arguments):
    raise LookupError("there is no such dataset here")


def be_killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("begin", "replaced"), [(fail, 0), (be_killed, 3)])
def test_a_worker_that_failed_before_it_began_is_not_replaced_and_one_that_was_killed_is(
    begin, replaced, monkeypatch, caplog, capfd
):
    monkeypatch.setattr(crew, "_work", begin)
    iterator = iter(DataLoader(Records(6), num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(iterator)
    assert sum("another one starts" in message for message in caplog.messages) == replaced
    assert capfd.readouterr().err.count("LookupError: there is no such dataset here") == (begin is fail)

"""Writers killed by SIGKILL before each change that they make to files, or in the middle of a write.

What readers see then is the old or the new, whole; doing it again ends as if nothing had happened.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from connectors.errors import BadInputError
from connectors.folders import is_partial
from dataflow import ShardWriter, open_dataset
from dataflow.convert import append
from dataflow.indexing import build_index

# One process that has imported everything forks one after the other: the first dies at its first change, the second at
# its second, until one comes through. Prints how many died.
KILLER = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from dataflow.convert import append
from dataflow.indexing import build_index

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
write, fsync = os.write, os.fsync

def die_at(last):
    changes = itertools.count()

    def change(torn=lambda: None):
        if next(changes) == last:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in EVENTS or (event == "open" and arguments[2] & WRITING):
            change()

    def dying_write(descriptor, data):
        change(lambda: write(descriptor, memoryview(data)[: len(data) // 2]))
        return write(descriptor, data)

    def dying_fsync(descriptor):
        change()
        fsync(descriptor)

    os.write, os.fsync = dying_write, dying_fsync
    sys.addaudithook(hook)

folder, work = Path(sys.argv[1]), sys.argv[2]
for number in itertools.count():
    own = folder / str(number)
    shutil.copytree(folder / "before", own)
    pid = os.fork()
    if not pid:
        try:
            os.environ["XDG_CACHE_HOME"] = str(own / "cache")
            die_at(number)
            exec(work, {"append": append, "build_index": build_index, "path": own / "set", "more": folder / "more"})
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        print(number)
        sys.exit(status)
"""


def kill_again_and_again(folder: Path, work: str) -> list[Path]:
    """Do `work` on copies of `folder/before`; return the copies, of which only the last was left to end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), work], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [folder / str(number) for number in range(int(done.stdout) + 1)]


def numbers(path: Path) -> list[int]:
    return [int(n) for n in open_dataset(path).get_batch(range(len(open_dataset(path))))["n"]]


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def visible(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(path).items() if not is_partial(Path(name).name)}


def write_numbers(path: Path, first: int, last: int) -> None:
    with ShardWriter(path, pa.schema([("n", pa.int64())]), block_size_bytes=100) as writer:
        writer.write_columns({"n": list(range(first, last))})


def test_an_append_is_there_whole_or_not_at_all_and_is_finished_by_the_next(tmp_path):
    write_numbers(tmp_path / "before" / "set", 0, 20)
    write_numbers(tmp_path / "more", 20, 30)
    shutil.copytree(tmp_path / "before" / "set", tmp_path / "undisturbed")
    append(tmp_path / "more", tmp_path / "undisturbed", workers=0)
    old, new = files(tmp_path / "before" / "set"), files(tmp_path / "undisturbed")
    seen = []
    for own in kill_again_and_again(tmp_path, "append(more, path, workers=0)"):
        path = own / "set"
        seen.append(len(numbers(path)))
        assert numbers(path) == list(range(seen[-1]))
        # Whatever has its name has its content: nothing half written is to be seen.
        found = visible(path)
        assert all(name.endswith(".part") or data in (old.get(name), new[name]) for name, data in found.items())
        if seen[-1] == 20:
            begun = any(name.startswith("rev-") for name in found)
            if begun:
                with pytest.raises(BadInputError, match="broke off: finish it with --resume"):
                    append(tmp_path / "more", path, workers=0)
            append(tmp_path / "more", path, workers=0, resume=begun)
        assert numbers(path) == list(range(30))
        assert files(path) == new
    assert set(seen) == {20, 30}
    assert seen == sorted(seen)


def content(file: int) -> bytes:
    return b"".join(json.dumps({"n": 10 * file + row}).encode() + b"\n" for row in range(10))


@pytest.mark.parametrize("resume", [True, False])
def test_an_index_is_old_or_new_and_built_by_the_next(tmp_path, monkeypatch, resume):
    place = tmp_path / "before" / "set"
    place.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "before" / "cache"))
    for file in range(3):
        (place / f"{file}.jsonl").write_bytes(content(file + 1))
    build_index(place, workers=0)
    (place / "0.jsonl").write_bytes(content(0))  # so that the index is out of date
    (place / "1.jsonl").write_bytes(content(1))
    (place / "2.jsonl").write_bytes(content(2))
    scanned = []
    for own in kill_again_and_again(tmp_path, "build_index(path, workers=0)"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(own / "cache"))
        assert numbers(own / "set") == list(range(30))
        build = build_index(own / "set", workers=0, resume=resume)
        assert (build.beside, build.num_samples) == (True, 30)
        scanned.append(build.num_scanned)
        assert numbers(own / "set") == list(range(30))
        assert sorted(files(own / "set")) == ["0.jsonl", "1.jsonl", "2.jsonl", "dataflow-index.arrow"]
        assert not list((own / "cache").rglob("*.journal"))
    assert set(scanned) == ({0, 1, 2, 3} if resume else {3})

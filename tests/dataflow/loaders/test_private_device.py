"""The road to a device, over one that is registered with torch as an accelerator's own package would: by PrivateUse1.

The device keeps its memory as numpy arrays and its streams as queues that run only when somebody waits for them, so a
batch that is used too early is seen to be empty. A registration is for good, so a process of its own does it.
"""

import json
import subprocess
import sys

import pytest
from torch.utils import backend_registration

if __name__ == "__main__":
    import contextlib
    import threading

    import numpy as np
    import torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Array(torch.Tensor):
        """A tensor of the device."""

        @staticmethod
        def __new__(cls, shape, dtype, memory):
            tensor = torch._C._acc.create_empty_tensor(shape, dtype)
            tensor.__class__ = cls
            return tensor

        def __init__(self, shape, dtype, memory):
            self.memory = memory

        def record_stream(self, stream):
            log.append(["record", stream.name])

    class Stream:
        def __init__(self, device=None, *, name="side"):
            self.name, self.work, self.lock = name, [], threading.RLock()

        def run(self):
            with self.lock:
                while self.work:
                    self.work.pop(0)()

        def record_event(self):
            # The copies before the event belong to it.
            return self

        def wait_event(self, event):
            log.append(["wait", self.name, event.name])
            event.run()

    class Module:
        """`torch.fake`."""

        Stream = Stream

        def __init__(self):
            self.default, self.local = Stream(name="default"), threading.local()

        def current_stream(self, device=None):
            return getattr(self.local, "stream", self.default)

        @contextlib.contextmanager
        def stream(self, stream):
            before, self.local.stream = self.current_stream(), stream
            try:
                yield
            finally:
                self.local.stream = before

        def is_initialized(self):
            return True

        def is_available(self):
            return True

        def _is_in_bad_fork(self):
            return False

        def manual_seed_all(self, seed):
            pass

        def device_count(self):
            return 1

        def current_device(self):
            return 0

        def set_device(self, index):
            log.append(["device", index, threading.current_thread() is threading.main_thread()])

    log = []
    module = Module()
    _setup_privateuseone_for_python_backend("fake", module)

    @torch.library.impl("aten::empty_strided", "privateuseone")
    def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
        memory = np.zeros(size, torch.empty(0, dtype=dtype).numpy().dtype)
        return Array(size, dtype, memory)

    @torch.library.impl("aten::_copy_from", "privateuseone")
    def _copy_from(source, target, non_blocking=False):
        if target.device.type == "cpu":
            target.numpy()[...] = source.memory
            return target
        stream, pinned = module.current_stream(), source.data_ptr() in pinned_at
        log.append(["copy", stream.name, non_blocking, pinned])
        stream.work.append(lambda: np.copyto(target.memory, source.numpy()))
        if stream is module.default:
            stream.run()
        return target

    pinned_at = set()

    @torch.library.impl("aten::_pin_memory", "CPU")
    def _pin_memory(tensor, device=None):
        pinned = torch.empty_like(tensor).copy_(tensor)
        pinned_at.add(pinned.data_ptr())
        return pinned

    @torch.library.impl("aten::is_pinned", "CPU")
    def _is_pinned(tensor, device=None):
        return tensor.data_ptr() in pinned_at

    def walk(options):
        from dataflow.loaders import DataLoader
        from dataflow.loaders.testing import Numbers

        log.clear()
        loader = DataLoader(Numbers(12, 600), batch_size=4, device="fake", **options)
        batches = []
        for batch in loader:
            assert batch.device == torch.device("fake:0"), batch.device
            batches.append(batch)
        return {"samples": [batch.memory[:, 599].tolist() for batch in batches], "log": list(log)}

    sys.stdout.write(json.dumps([walk(options) for options in json.loads(sys.argv[1])]))


WALKS = {
    "processes": {"num_workers": 1, "pin_memory": True},
    "threads": {"num_workers": 1, "pin_memory": True, "workers": "thread"},
    "none": {"num_workers": 0},
}


@pytest.fixture(scope="module")
def logs():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no backend written in Python")
    done = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps([*WALKS.values()])],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(zip(WALKS, json.loads(done.stdout), strict=True))
    for walk in found.values():
        assert walk["samples"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    return {name: walk["log"] for name, walk in found.items()}


@pytest.mark.parametrize("workers", ["processes", "threads"])
def test_pinned_batches_are_copied_aside_and_the_models_stream_waits_for_them(logs, workers):
    log = logs[workers]
    assert [entry for entry in log if entry[0] == "copy"] == [["copy", "side", True, True]] * 3
    assert [entry for entry in log if entry[0] == "wait"] == [["wait", "default", "side"]] * 3
    assert [entry for entry in log if entry[0] == "record"] == [["record", "default"]] * 3
    assert ["device", 0, False] in log  # the thread that copies was told which device is current
    places = {kind: [at for at, entry in enumerate(log) if entry[0] == kind] for kind in ("copy", "wait", "record")}
    for steps in zip(
        *places.values(), strict=True
    ):  # each batch is copied, waited for, then owned by the model's stream
        assert list(steps) == sorted(steps)


def test_without_workers_batches_are_copied_on_the_models_stream(logs):
    assert logs["none"] == [["copy", "default", True, False]] * 3

import _thread
import asyncio
import atexit
import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from connectors import BadInputError, bridge, open_store, run_sync


async def _where():
    return os.getpid(), threading.current_thread().name, id(asyncio.get_running_loop())


def test_all_threads_share_one_loop():
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: run_sync(_where()), range(50)))
    assert len(answers) == 1
    pid, thread, _ = answers.pop()
    assert (pid, thread) == (os.getpid(), "connectors-loop")


def test_calls_run_side_by_side():
    barrier = asyncio.Barrier(2)

    async def meet():
        return await barrier.wait()

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda _: run_sync(meet()), range(2))) == [0, 1]


def test_an_exception_arrives_as_it_was_raised():
    async def fail():
        raise KeyError("this one")

    with pytest.raises(KeyError, match="this one"):
        run_sync(fail())


def test_what_its_callers_held_is_free_once_an_exception_was_dealt_with():
    class Held:
        pass

    async def fail():
        raise KeyError("this one")

    def call():
        held = Held()
        with contextlib.suppress(KeyError):
            run_sync(fail())
        return weakref.ref(held)

    gc.disable()  # an exception refers to the frames that it went through, and must not need the collector
    try:
        assert call()() is None
    finally:
        gc.enable()


def test_inside_a_running_loop_it_is_a_call_like_any_other():
    # As in a notebook, and in a process of its own: here, whatever blocks a loop is an error.
    program = """
import asyncio
from connectors import open_store, run_sync
async def cell():
    run_sync(open_store("memory://cell").put("key", b"x"))
    print(bytes(run_sync(open_store("memory://cell").get("key"))))
asyncio.run(cell())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("b'x'\n", "")


def test_inside_the_bridges_own_loop_it_refuses_instead_of_standing_still():
    async def nested():
        run_sync(_where())

    with pytest.raises(BadInputError, match="await"):
        run_sync(nested())


def _in_child(answers):
    answers.put(run_sync(_where())[:2])
    answers.put(run_sync(_read("memory://forked")))


async def _read(url):
    return bytes(await open_store(url).get("key"))


def test_a_forked_child_gets_its_own_loop():
    run_sync(open_store("memory://forked").put("key", b"copied with the process"))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answers,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert answers.get() == (child.pid, "connectors-loop")
    assert answers.get() == b"copied with the process"


def test_a_fork_while_the_bridge_is_busy_does_not_hang_the_child():
    started, release = threading.Event(), threading.Event()

    async def busy():
        started.set()
        await asyncio.get_running_loop().run_in_executor(None, release.wait)

    waiting = threading.Thread(target=lambda: run_sync(busy()))
    waiting.start()
    started.wait()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(run_sync(_where())[0]))
    child.start()
    child.join(30)
    release.set()
    waiting.join()
    assert child.exitcode == 0
    assert answers.get() == child.pid


@pytest.fixture
def _interruptible():
    """Also where the tests were started in the background of a shell, which lets them ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_cancels_the_coroutine():
    cancelled = threading.Event()

    async def endless():
        main = threading.main_thread().ident
        while not _is_waiting(sys._current_frames()[main]):  # noqa: ASYNC110  another thread's doing
            await asyncio.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)  # as the terminal does
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        run_sync(endless())
    assert cancelled.wait(30)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_that_woke_nobody_is_noticed_all_the_same():
    async def endless():
        main = threading.main_thread().ident
        while not _is_waiting(sys._current_frames()[main]):  # noqa: ASYNC110  another thread's doing
            await asyncio.sleep(0.001)
        _thread.interrupt_main()  # says that there was a signal, without one that ends a system call
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run_sync(endless())


def _is_waiting(frame):
    names = [(entry.filename, entry.name) for entry in traceback.extract_stack(frame)]
    return (threading.__file__, "wait") in names


def test_the_interpreter_ends_while_a_call_hangs():
    program = """
import asyncio, threading
from connectors import run_sync
started = threading.Event()
async def hang():
    started.set()
    await asyncio.Event().wait()
threading.Thread(target=lambda: run_sync(hang()), daemon=True).start()
started.wait()
print("ends")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ends\n")


def test_the_end_waits_for_threads_that_have_brought_a_result_and_are_not_back_yet(monkeypatch):
    ours = bridge._LoopThread()
    main, inside, released = threading.get_ident(), threading.Event(), threading.Event()
    wake = ours.loop._write_to_self

    def wake_slowly():
        wake()
        if threading.get_ident() != main:
            inside.set()
            released.wait()

    def let_go(_):
        released.set()
        bringer.join()

    monkeypatch.setattr(ours.loop, "_write_to_self", wake_slowly)
    bringer = threading.Thread(target=ours.loop.call_soon_threadsafe, args=(int,))
    bringer.start()
    monkeypatch.setattr("connectors.bridge.time.sleep", let_go)
    try:
        inside.wait()
        ours._stop()
        assert released.is_set()
        assert not ours.loop.callers
    finally:
        released.set()
        bringer.join()
        atexit.unregister(ours._stop)

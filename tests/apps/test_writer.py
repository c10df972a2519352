"""The thread that writes pictures: order, errors, and what an interruption leaves."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sana.apps.cli import writer as module
from sana.apps.cli.writer import WAITING, Task, Writer
from sana.engine.images import write_atomically


def task(done: list[str], name: str, write: object = None) -> Task:
    return Task(Path(name), write or (lambda: None), lambda: done.append(name))  # type: ignore[arg-type]


def test_everything_is_written_in_order_and_told_by_the_caller() -> None:
    done: list[str] = []
    where: list[str] = []
    names = [str(i) for i in range(3 * WAITING)]
    with Writer() as writer:
        for name in names:
            writer.put(task(done, name, lambda: where.append(threading.current_thread().name)))
    assert done == names
    assert set(where) == {"writer"}


def test_writing_goes_on_beside_the_callers_work() -> None:
    done: list[str] = []
    gate = threading.Event()
    with Writer() as writer:
        writer.put(task(done, "slow", gate.wait))
        writer.poll()
        assert done == []
        gate.set()
        end = time.monotonic() + 60
        while not done and time.monotonic() < end:
            writer.poll()
            time.sleep(0.001)  # lets the writer run
        assert done == ["slow"]


def test_the_first_error_stops_all_writing_and_is_raised_once() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def put() -> None:
        with Writer() as writer:
            writer.put(task(done, "a"))
            writer.put(task(done, "b", fail))
            for i in range(3 * WAITING):  # more than wait in the queue: nobody may be stuck
                writer.put(task(done, f"after {i}"))

    with pytest.raises(OSError, match="No space"):
        put()
    assert done == ["a"]


def test_an_error_of_the_last_file_is_not_lost() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Writer() as writer:
        writer.put(task([], "a", fail))


def test_an_error_of_the_caller_wins_and_what_was_handed_over_is_finished() -> None:
    done: list[str] = []

    def put() -> None:
        with Writer() as writer:
            for i in range(5):
                writer.put(task(done, str(i), lambda: time.sleep(0.01)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put()
    assert done == ["0", "1", "2", "3", "4"]


def test_a_second_interruption_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    target, gate, begun = tmp_path / "a[1]*.png", threading.Event(), threading.Event()

    def write() -> None:
        def content(file: object) -> None:
            file.write(b"half")  # type: ignore[attr-defined]
            begun.set()
            gate.wait(60)

        write_atomically(target, content)

    done: list[str] = []
    writer = Writer()
    writer.__enter__()
    writer.put(Task(target, write, lambda: done.append("a")))
    writer.put(task(done, "b"))
    assert begun.wait(60)
    assert len(list(tmp_path.iterdir())) == 1
    original = threading.Thread.join

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if timeout is None:
            raise KeyboardInterrupt  # the second Ctrl-C comes while the last files are waited for
        original(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []
    gate.set()
    original(writer._thread, 60)
    assert not writer._thread.is_alive()
    assert list(tmp_path.iterdir()) == []  # nor does the thread bring it back
    assert done == []


def test_an_interruption_waits_until_a_file_is_told_and_a_second_does_not() -> None:
    done: list[str] = []

    def told() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("told")

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")

    def put(say: Callable[[], None]) -> None:
        with Writer() as writer:
            writer.put(Task(Path("a"), lambda: None, say))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            put(told)
        assert done == ["told"]
        with pytest.raises(KeyboardInterrupt):
            put(twice)
        assert done == ["told"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)

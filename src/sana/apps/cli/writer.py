"""A thread that writes finished pictures while the next ones are drawn."""

import contextlib
import glob
import io
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from sana.engine.request import Result

WAITING = 8
"""Pictures that may wait; drawing pauses when the disk is that much behind."""
PATIENCE = 0.5
"""Seconds that the file in hand may still take when all is to stop at once."""


class Task(NamedTuple):
    """A file to be written."""

    target: Path
    write: Callable[[], object]
    """Writes it; runs on the thread."""
    told: Callable[[], None]
    """Says so; runs where `poll` is called."""


class Writer:
    """Writes files one after another beside the caller's work, for a `with` block.

    Whatever ends the block, the files handed over are finished first; a second Ctrl-C gives that up, and then removes
    what is half written. The first error stops all writing and is raised by the next call.
    """

    def __init__(self) -> None:
        self._tasks: queue.Queue[Task | None] = queue.Queue(WAITING)
        self._written: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._raised = False
        self._target: Path | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)  # never holds up the exit

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tasks.put(None)
            self._thread.join()
        except KeyboardInterrupt:
            self._abandon()
            raise
        self._tell()
        if error is None:
            self.poll()

    def put(self, task: Task) -> None:
        """Hand over a file.

        Raises:
            OSError, SanaError: an earlier one could not be written.
        """
        self.poll()
        self._tasks.put(task)

    def poll(self) -> None:
        """Tell what was written since the last call.

        Raises:
            OSError, SanaError: something could not be written.
        """
        self._tell()
        if self._error is not None and not self._raised:
            self._raised = True
            raise self._error

    def _tell(self) -> None:
        while not self._written.empty():
            with _held_back():  # what was written is told, whatever comes
                self._written.get().told()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is not None:
                continue  # the queue is emptied, so that nobody waits for room in it
            self._target = task.target
            try:
                task.write()
            except BaseException as error:  # carried over to the thread that waits for it
                self._error = error
            else:
                self._written.put(task)
            self._target = None

    def _abandon(self) -> None:
        """Write nothing more, and remove what is half written unless it is finished in a moment."""
        from sana.engine.images import beginning

        self._error = self._error or InterruptedError("Interrupted.")
        target = self._target
        try:
            self._thread.join(PATIENCE)
        finally:
            if target is not None:
                for half in target.parent.glob(f".{glob.escape(beginning(target))}.*.tmp"):
                    half.unlink(missing_ok=True)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of a `with` block; a second one does not."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            before(number, frame)
        came.append((number, frame))

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])


def print_png(result: "Result", i: int, metadata: Any) -> None:
    """Write the bytes of a picture to the standard output."""
    from sana.engine.metadata import png_info
    from sana.engine.png import write_png

    data = io.BytesIO()
    write_png(data, result.images[i], png_info(result, i, metadata))
    sys.stdout.buffer.write(data.getvalue())
    sys.stdout.buffer.flush()

"""A thread for what nobody waits for, which loses nothing when the process ends."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Work = Callable[[], None]


class Background:
    """A thread that does one thing after another.

    Args:
        finish: called at the end, after all else.
    """

    def __init__(self, finish: Work) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._queue,), name="mlx_kvcache", daemon=True)
        thread.start()
        # Runs at `close`, when this object is dropped, or at the end of the process. What waits
        # holds whoever gave it, so behind a dropped one nothing waits, and dropping is quick.
        self._end = weakref.finalize(self, _end, self._queue, thread, finish)

    @property
    def is_open(self) -> bool:
        return self._end.alive

    def add(self, work: Work) -> None:
        """Have something done that raises nothing. What is added behind a close is not done."""
        self._queue.put(work)

    def close(self) -> None:
        """Wait for all that was added, and end. A second close does nothing."""
        self._end()


def _work(queue: SimpleQueue[Work | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # It may hold arrays, which must not live on until there is something to do again.
        del work


def _end(queue: SimpleQueue[Work | None], thread: threading.Thread, finish: Work) -> None:
    queue.put(None)
    # The thread itself may be the one that drops the last reference.
    if thread is not threading.current_thread():
        thread.join()
    finish()

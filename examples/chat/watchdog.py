"""Saves and ends the chat when its terminal closes, or on SIGHUP or SIGTERM."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

ORDERLY, AT_ONCE = 0.7, 0.3
"""Seconds for a normal exit, and after that for the main thread to restore the terminal."""

_GONE = select.POLLHUP | select.POLLERR


class Watchdog(threading.Thread):
    """A thread that saves and ends the process within about a second of a request to end.

    SIGTERM, SIGHUP and the hang-up of a terminal that the process reads or writes are such requests.
    The thread works even if the main thread is busy or blocked. Create it in the main thread.

    Args:
        leave: asks the main thread for a normal exit, which calls `finish` at its end.
        save: saves everything; called if the normal exit takes too long.
        quit: asks the main thread to exit at once; called after `save`.

    Attributes:
        status: the exit status; None until a request to end.
    """

    def __init__(self, leave: Callable[[], None], save: Callable[[], None], quit: Callable[[], None]) -> None:  # noqa: A002
        super().__init__(name="watchdog", daemon=True)
        self.status: int | None = None
        self._steps = (leave, ORDERLY), (save, 0.0), (quit, AT_ONCE)
        self._signals, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python's signal handlers must wait for the main thread; the wakeup descriptor works at once.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP; this must stay so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        self.start()

    def run(self) -> None:
        self.status = 128 + wait_for_end(self._signals)
        for step, seconds in self._steps:
            # A failed step must not keep the process from ending.
            with suppress(Exception):
                step()
            # The main thread may end the process with `finish` during this time.
            time.sleep(seconds)
        os._exit(self.status)

    def finish(self) -> None:
        """End the process if there was a request to end. The main thread calls this when it is done."""
        if self.status is not None:
            os._exit(self.status)


def exit_without_terminal() -> None:
    """Start a thread that ends the process when its terminal closes, even without a signal."""

    def watch() -> NoReturn:
        os._exit(128 + wait_for_end())

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def wait_for_end(signals: int | None = None) -> int:
    """Wait until a terminal closes, or until SIGTERM or SIGHUP arrives.

    Args:
        signals: a file descriptor from which the numbers of signals are read as bytes.

    Returns:
        The signal's number; SIGHUP if a terminal closed.
    """
    poll = select.poll()
    # Only terminals: a pipe also hangs up when its writer is done, which is no reason to end.
    for terminal in filter(os.isatty, range(3)):
        poll.register(terminal, 0)
    if signals is not None:
        poll.register(signals, select.POLLIN)
    while True:
        for descriptor, happened in poll.poll():
            if descriptor == signals:
                told = {signal.SIGTERM, signal.SIGHUP}.intersection(os.read(descriptor, 4096))
                if told:
                    return min(told)
            elif happened & _GONE:
                return signal.SIGHUP
            else:
                poll.unregister(descriptor)

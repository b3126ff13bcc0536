"""Ends the chat when its terminal is gone or a signal says so."""

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
"""Seconds for ending as a user would, and after that for the main thread to put the terminal right."""

_GONE = select.POLLHUP | select.POLLERR


class Watchdog(threading.Thread):
    """A thread that ends the process within `ORDERLY + AT_ONCE` seconds of being told, and saves before.

    It is told by SIGTERM, by SIGHUP and by a hang-up of a terminal that the process reads or writes.
    Whatever the main thread does or waits for then, this thread goes on. To be made in the main thread.

    Args:
        leave: asks the main thread to end as it does when the user leaves, which ends with `finish`.
        save: saves everything that is known by now, where that took too long.
        quit: asks the main thread to end at once, after that.

    Attributes:
        status: what the process exits with; None while nothing has told it to end.
    """

    def __init__(self, leave: Callable[[], None], save: Callable[[], None], quit: Callable[[], None]) -> None:  # noqa: A002
        super().__init__(name="watchdog", daemon=True)
        self.status: int | None = None
        self._steps = (leave, ORDERLY), (save, 0.0), (quit, AT_ONCE)
        self._signals, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python's own handlers run when the main thread comes to it; this tells of a signal at once.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Under nohup, a hang-up means nothing.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        self.start()

    def run(self) -> None:
        self.status = 128 + wait_for_end(self._signals)
        for step, seconds in self._steps:
            # A failure must not keep the process from ending.
            with suppress(Exception):
                step()
            # Meanwhile the main thread ends the process by `finish`.
            time.sleep(seconds)
        os._exit(self.status)

    def finish(self) -> None:
        """End the process if it was told to end: the main thread is through."""
        if self.status is not None:
            os._exit(self.status)


def exit_without_terminal() -> None:
    """From here on, end the process when its terminal is gone, even where no signal tells of that."""

    def watch() -> NoReturn:
        os._exit(128 + wait_for_end())

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


def wait_for_end(signals: int | None = None) -> int:
    """Wait for the end of a terminal, or for a byte that is the number of SIGTERM or SIGHUP.

    Returns:
        The signal, SIGHUP for the end of a terminal.
    """
    poll = select.poll()
    # Pipes hang up, too, when all of them has been written, which is no reason to end.
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

"""The chat as a process in a pseudo-terminal, which tests can close."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONG = 300
"""Seconds after which a process hangs, on the most loaded machine."""

ENDS = ("hang-up", "vanish", "SIGTERM", "SIGHUP")
"""How a chat is ended from outside: "vanish" closes its terminal, but no signal tells of it."""

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[^\[\]])")


class ChatProcess:
    """`python -m examples.chat` with these options, in a session of its own.

    Args:
        hangs_up: the terminal controls the session, so that a signal tells of its end.

    Attributes:
        output: all that was printed so far.
    """

    def __init__(self, *options: str, hangs_up: bool = True) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        command = [sys.executable, "-m", "examples.chat", *options]
        if hangs_up:
            # A session without a terminal is controlled by the first one that it opens.
            command = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(slave), *command]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm-256color", "OPENBLAS_NUM_THREADS": "1"},
        )
        os.close(slave)
        self._wake = os.pipe()
        self._is_over = False
        self.output = b""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """The output without what moves the cursor or colors."""
        return _ESCAPES.sub("", self.output.decode("utf-8", "replace"))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, *patterns: str) -> None:
        """Wait until each of these has been printed."""
        self._wait(lambda: all(re.search(pattern, self.text) for pattern in patterns))

    def until_bytes(self, count: int) -> None:
        """Wait until so many bytes more have been printed."""
        least = len(self.output) + count
        self._wait(lambda: len(self.output) >= least)

    def end(self, way: str) -> float:
        """End it in one of `ENDS`, and wait for that. Returns how many seconds it took."""
        begin = time.perf_counter()
        if way.startswith("SIG"):
            self.process.send_signal(signal.Signals[way])
        else:
            self._hang_up()
        self.process.wait(LONG)
        seconds = time.perf_counter() - begin
        assert not self.family(), "child processes are left"
        return seconds

    def family(self) -> list[int]:
        """The processes of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(stat.read_text().rpartition(")")[2].split()[3])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if session == self.process.pid:
                found.append(int(stat.parent.name))
        return found

    def close(self) -> None:
        """Kill what is left of it."""
        self.process.kill()
        self.process.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._reader.is_alive():
            # While somebody reads from a terminal it stays open.
            os.write(self._wake[1], b"!")
            self._reader.join()
            os.close(self._master)

    def _read(self) -> None:
        """Read as a terminal does, until it is closed or nobody can print any more."""
        while self._master in select.select([self._master, self._wake[0]], [], [])[0]:
            try:
                part = os.read(self._master, 65536)
            except OSError:
                part = b""
            with self._changed:
                self.output += part
                self._is_over = not part
                self._changed.notify_all()
            if not part:
                select.select([self._wake[0]], [], [])
                return

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._is_over, LONG)
            assert condition(), self.text[-2000:]

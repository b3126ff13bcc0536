"""Textual's way to a terminal, which bears that the terminal is gone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from textual.drivers.linux_driver import LinuxDriver


class SteadyDriver(LinuxDriver):
    """Loses what it cannot write, and reads nothing where there is nothing to read.

    Textual's own driver ends its writing thread at the first error. What waits to be written then fills a
    queue, and the main thread stops for good when that is full. An error in reading ends the application
    without a word to it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file: Any = _Steady(self._file)

    def run_input_thread(self) -> None:
        with suppress(OSError):
            super().run_input_thread()


class _Steady:
    """A file whose errors are passed over."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()

    def fileno(self) -> int:
        descriptor: int = self._file.fileno()
        return descriptor

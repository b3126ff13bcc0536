"""A Textual driver that ignores errors after the terminal has closed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from textual.drivers.linux_driver import LinuxDriver


class SteadyDriver(LinuxDriver):
    """Ignores errors of reading and writing the terminal.

    Textual's own driver ends its writing thread at the first error. Its queue then fills up and blocks
    the main thread for good. An error of reading ends the application without notice.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file: Any = _Steady(self._file)

    def run_input_thread(self) -> None:
        with suppress(OSError):
            super().run_input_thread()


class _Steady:
    """A file whose errors are ignored."""

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

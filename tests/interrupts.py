"""Planting an exception at a line of the package."""

from __future__ import annotations

import dis
import gc
import linecache
import sys
from collections.abc import Callable
from functools import cache
from inspect import CO_GENERATOR
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx_kvcache

PACKAGE = str(Path(mlx_kvcache.__file__).parent)


class Planted(BaseException):
    """What nobody expects, such as an interrupt of the user's, or the end of memory."""


class Tracer:
    """Counts the lines that the package runs and the returns from its functions, and throws at one.

    Attributes:
        places: of each event so far, the file, the line and what happened there.
    """

    def __init__(self, at: int | None = None) -> None:
        self.places: list[tuple[str, int, str]] = []
        self._at = at

    def run(self, call: Callable[[], Any]) -> bool:
        """Make the call; whether the exception was thrown, and came out of it."""
        try:
            with self:
                call()
        except Planted:
            return True
        return False

    def __enter__(self) -> None:
        # Finalizers of what earlier calls left would be traced, too, and at another place each time.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _inside(self, frame: FrameType, event: str, arg: Any) -> Any:
        # What is thrown where a generator hands out a value does not reach the generator.
        is_generator = frame.f_code.co_flags & CO_GENERATOR
        is_place = not _leaves_with(frame) if event == "line" else event == "return" and not is_generator
        if is_place:
            self.places.append((frame.f_code.co_filename, frame.f_lineno, event))
            if len(self.places) - 1 == self._at:
                raise Planted
        return self._inside


def _leaves_with(frame: FrameType) -> bool:
    """Whether a `with` block is over and its `__exit__` comes next.

    CPython lets no signal in between (https://github.com/python/cpython/issues/74174), but asks a tracer.
    """
    begins = _withs(frame.f_code).get(frame.f_lineno)
    return begins is not None and frame.f_lasti != begins


@cache
def _withs(code: CodeType) -> dict[int, int]:
    """Lines of `with` statements, and where each begins."""
    begins: dict[int, int] = {}
    for offset, line in dis.findlinestarts(code):
        if line is not None and linecache.getline(code.co_filename, line).lstrip().startswith("with "):
            begins.setdefault(line, offset)
    return begins


def places(call: Callable[[], Any], nth: int = 1, first: int = 0) -> list[int]:
    """At which events of a call to throw: the first and the last of each place, or every nth of these."""
    tracer = Tracer()
    assert not tracer.run(call)
    every = range(len(tracer.places))
    firsts = {tracer.places[index]: index for index in reversed(every)}
    lasts = {tracer.places[index]: index for index in every}
    chosen = sorted({*firsts.values(), *lasts.values()})
    return chosen[first % nth :: nth]

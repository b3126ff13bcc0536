"""Interrupts a call: raises an exception at a chosen line or return inside the package.

It stands for ctrl-C or a lack of memory, which can strike anywhere. Tests use it to check that the cache is
unchanged afterwards.
"""

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
    """The exception that `Tracer` raises. No code of the package expects it."""


class Tracer:
    """Records the lines and returns that run inside the package, and raises `Planted` at one of them.

    Args:
        at: the index of the event to raise at; None only records.

    Attributes:
        places: the file, line and event ("line" or "return") of each event so far.
    """

    def __init__(self, at: int | None = None) -> None:
        self.places: list[tuple[str, int, str]] = []
        self._at = at

    def run(self, call: Callable[[], Any]) -> bool:
        """Make the call, and return whether `Planted` came out of it."""
        try:
            with self:
                call()
        except Planted:
            return True
        return False

    def __enter__(self) -> None:
        # A garbage collection would run finalizers of earlier objects, and add their events at random.
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
        # A generator also has a "return" event at each yield, and an exception there does not reach it.
        is_generator = frame.f_code.co_flags & CO_GENERATOR
        is_place = not _leaves_with(frame) if event == "line" else event == "return" and not is_generator
        if is_place:
            self.places.append((frame.f_code.co_filename, frame.f_lineno, event))
            if len(self.places) - 1 == self._at:
                raise Planted
        return self._inside


def _leaves_with(frame: FrameType) -> bool:
    """Whether this line event comes between the end of a `with` block and its `__exit__`.

    CPython handles no signals there (https://github.com/python/cpython/issues/74174), but calls the tracer.
    """
    begins = _withs(frame.f_code).get(frame.f_lineno)
    return begins is not None and frame.f_lasti != begins


@cache
def _withs(code: CodeType) -> dict[int, int]:
    """Map each line with a `with` statement to the offset of its first instruction."""
    begins: dict[int, int] = {}
    for offset, line in dis.findlinestarts(code):
        if line is not None and linecache.getline(code.co_filename, line).lstrip().startswith("with "):
            begins.setdefault(line, offset)
    return begins


def places(call: Callable[[], Any], nth: int = 1, first: int = 0) -> list[int]:
    """Choose the events of a call to raise at: the first and last event of each place.

    Args:
        call: the call to trace.
        nth: take only every nth of them.
        first: the offset of the first one, modulo `nth`.

    Returns:
        Indices for `Tracer(at=...)`.
    """
    tracer = Tracer()
    assert not tracer.run(call)
    every = range(len(tracer.places))
    firsts = {tracer.places[index]: index for index in reversed(every)}
    lasts = {tracer.places[index]: index for index in every}
    chosen = sorted({*firsts.values(), *lasts.values()})
    return chosen[first % nth :: nth]

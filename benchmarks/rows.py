"""Defines benchmark results: rows of a table, and curves of a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["speed", "less", "value"]
"""The meaning of a row's ratio: times as fast as the peer, times as much, or no ratio."""


@dataclass(frozen=True)
class Row:
    """The figures of one piece of work, for this package and a peer.

    Attributes:
        key: identifies the work and its bound.
        work: a description for readers.
        unit: the unit of `ours` and `theirs`, such as "ms" or "MB".
        ours, theirs: medians of all runs, or single measurements.
        peer: the name of the implementation compared with.
        ratio: theirs / ours for kind "speed", ours / theirs for "less"; for speed, the median
            over pairs of runs.
        spread: the lower and upper quartiles of the ratios of paired runs.
        runs: the number of pairs of runs.
        peak: peak bytes of MLX's arrays added during one run, for this package and the peer.
    """

    key: str
    work: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    kind: Kind = "value"
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    runs: int = 1
    peak: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"{self.work}: {self.ours:.4g} {self.unit}".rstrip()
        if self.theirs is not None:
            text += f", {self.peer} {self.theirs:.4g} {self.unit}".rstrip()
        if self.ratio is not None:
            text += f"; {self.ratio:.3g} times " + ("as fast" if self.kind == "speed" else "as much")
        if self.spread:
            text += f" (quartiles {self.spread[0]:.3g} to {self.spread[1]:.3g} of {self.runs})"
        return text


@dataclass(frozen=True)
class Curve:
    """The data of one plot: named lines over the same x."""

    key: str
    title: str
    x_label: str
    y_label: str
    x: list[float]
    lines: dict[str, list[float]]

    def __str__(self) -> str:
        ends = (f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in self.lines.items())
        return f"{self.title}: {'; '.join(ends)}"


def held(key: str, work: str, ours: int, peer: str, theirs: int) -> Row:
    """Make a row that compares sizes, given in bytes."""
    return less(key, work, "MB", ours / 1e6, peer, theirs / 1e6)


def less(key: str, work: str, unit: str, ours: float, peer: str, theirs: float) -> Row:
    """Make a row for a quantity of which less is better."""
    return Row(key, work, unit, ours, peer, theirs, "less", ours / theirs)

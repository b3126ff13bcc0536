"""What a benchmark finds: rows of a table, and curves of a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["speed", "less", "value"]
"""What a ratio says: how many times as fast as the peer; how much less of something; or there is none."""


@dataclass(frozen=True)
class Row:
    """One piece of work, here and in a peer.

    Attributes:
        key: names the work, and its bound.
        work: the same for a reader.
        unit: of `ours` and `theirs`, such as "ms" or "MB".
        ours, theirs: medians of all runs, or single measurements where nothing varies.
        peer: who else did it.
        ratio: by kind: theirs / ours of "speed", ours / theirs of "less".
        spread: lower and upper quartile of the ratios of neighboring runs.
        runs: how many pairs of runs there were.
        peak: bytes of MLX's arrays at most during one run above those before it, here and in the peer.
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
    """One plot: lines over the same x."""

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
    """A row of bytes."""
    return less(key, work, "MB", ours / 1e6, peer, theirs / 1e6)


def less(key: str, work: str, unit: str, ours: float, peer: str, theirs: float) -> Row:
    """A row of something that is counted, of which less is better."""
    return Row(key, work, unit, ours, peer, theirs, "less", ours / theirs)

"""One sequence's share of a forward pass: which of the batch's tokens, and which cells they see."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..arrays.lanes import index_of
from ..arrays.store import cells_in
from ..cells.placement import Placed

Rows = slice | mx.array | None
"""Some of a batch's tokens: neighbours, any, or all in order (None)."""


def rows_of(indices: Sequence[int], n: int) -> Rows:
    """How to take these batch indices out of n tokens."""
    if n == 1:
        return None
    indices, first = tuple(indices), indices[0]
    if indices == tuple(range(first, first + len(indices))):
        return None if len(indices) == n else slice(first, first + len(indices))
    return mx.array(indices)


def take(array: mx.array, rows: Rows) -> mx.array:
    """Rows of (1, heads, n, dim)."""
    if rows is None:
        return array
    if isinstance(rows, slice):
        return array[:, :, rows]
    return mx.take(array, rows, axis=2)


class Part:
    """One sequence's share of a step."""

    __slots__ = ("begin", "cells", "end", "fresh", "indices", "ranges", "rows", "sequence", "stores")

    def __init__(self, placed: Placed, n: int) -> None:
        self.sequence = placed.sequence
        self.indices = placed.rows
        self.rows = rows_of(placed.rows, n)
        self.move(placed, n)

    def move(self, placed: Placed, n: int) -> None:
        """Be the share of the same batch indices of the same sequence, at other positions and cells."""
        self.begin, self.end = placed.begin, placed.end
        self.fresh = placed.fresh
        self.stores = [
            (
                w.segment,
                index_of(w.cell, w.cell + w.size),
                rows_of(placed.rows[w.first : w.first + w.size], n),
            )
            for w in placed.writes
        ]
        self.cells = cells_in(placed.reads)
        self.ranges = [(span.position, span.end) for span in placed.reads]
        if placed.fresh:
            self.ranges.append((placed.begin, placed.end))

    @property
    def size(self) -> int:
        """How many keys there are to see."""
        return sum(high - low for low, high in self.ranges)

    @property
    def earlier(self) -> list[tuple[int, int]]:
        """Positions of the keys that were there before this step."""
        return [(low, min(high, self.begin)) for low, high in self.ranges if low < self.begin]

    @property
    def earlier_size(self) -> int:
        """How many keys were there before this step."""
        return sum(high - low for low, high in self.earlier)

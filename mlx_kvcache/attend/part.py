"""One sequence's share of a forward pass: which of the batch's tokens, and which cells they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..cells.placement import Placed
from ..storage.buffers import cells_in
from ..storage.codec import index_of

Rows = slice | mx.array | None
"""Some of a batch's tokens: neighbors, any, or all in order (None)."""


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


class Attending(NamedTuple):
    """The arguments of `mlx_kvcache.attention`, but for the cache."""

    queries: mx.array
    keys: mx.array | None
    values: mx.array | None
    scale: float
    sinks: mx.array | None


def check_queries(given: Attending, n: int, layer: int, heads: int, dim: int) -> None:
    """Raise ValueError unless the queries are n tokens' that fit keys with so many heads and features."""
    shape, sinks = given.queries.shape, given.sinks
    if len(shape) != 4 or shape[0] != 1 or shape[2] != n:
        raise ValueError(f"queries are {shape}, expected (1, n_heads, {n}, head_dim)")
    if shape[3] != dim:
        raise ValueError(
            f"queries are {shape}: {shape[3]} features a head, the keys of layer {layer} have {dim}"
        )
    if not shape[1] or shape[1] % heads:
        raise ValueError(
            f"queries are {shape}: {shape[1]} heads are not a multiple of layer {layer}'s {heads} K/V heads"
        )
    if not mx.issubdtype(given.queries.dtype, mx.floating):
        raise ValueError(f"queries are {given.queries.dtype}, expected floats")
    if sinks is not None and sinks.shape != (shape[1],):
        raise ValueError(f"sinks are {sinks.shape}, expected ({shape[1]},): one for each query head")

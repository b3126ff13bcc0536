"""The parts of a forward pass: each sequence's tokens in the batch, and the cells that they see.

Parts of one token each whose cells lie level by level in a stack are written by one update, and one product
attends to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..cells.placement import Placed
from ..cells.spans import Spans, clip, count
from ..cells.table import Level
from ..storage.codec import Index, index_of

Rows = slice | mx.array | None
"""Selects tokens of a batch: a slice, any indices, or None for all in order."""


def rows_of(indices: Sequence[int], n: int) -> Rows:
    """Returns the selection of these batch indices out of n tokens."""
    if n == 1:
        return None
    indices, first = tuple(indices), indices[0]
    if indices == tuple(range(first, first + len(indices))):
        return None if len(indices) == n else slice(first, first + len(indices))
    return mx.array(indices)


def take(array: mx.array, rows: Rows) -> mx.array:
    """Selects tokens of an array (1, heads, n, dim)."""
    if rows is None:
        return array
    if isinstance(rows, slice):
        return array[:, :, rows]
    return mx.take(array, rows, axis=2)


class Part:
    """One sequence's part of a forward pass.

    Attributes:
        sequence: the sequence.
        indices, rows: the batch indices of its tokens by rising position, and their selection.
        begin, end: the positions of its tokens, [begin, end).
        stores: the writes: for each, the segment, the index of the cells, and the selection of tokens.
        cells: the stored cells that the tokens see, by rising position.
        fresh: the tokens also see their own keys in the batch, because `cells` stops before them.
    """

    __slots__ = ("begin", "cells", "end", "fresh", "indices", "rows", "sequence", "stores")

    def __init__(self, placed: Placed, n: int, levels: Mapping[int, Level]) -> None:
        self.sequence, self.indices, self.begin, self.end, writes, self.cells, self.fresh = placed
        self.rows = rows_of(self.indices, n)
        self.stores = []
        for segment, cell, position, size in writes:
            first = position - self.begin
            rows = rows_of(self.indices[first : first + size], n)
            level = levels.get(segment)
            index = index_of(cell, cell + size, level.height if level else None)
            self.stores.append((segment, index, rows))

    def move(self, cells: Spans) -> None:
        """Becomes the part of the next step: as many tokens, in the last of these cells, which they see.

        The part is not `fresh`, so all its tokens are in one run of cells.
        """
        [(segment, index, rows)], n, last = self.stores, self.end - self.begin, cells[-1]
        self.begin, self.end, self.cells = self.end, self.end + n, cells
        stop = last.start + last.length
        self.stores[0] = segment, (*index[:2], slice(stop - n, stop)), rows

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The positions of all keys that the tokens see."""
        stored = [(span.position, span.end) for span in self.cells]
        return [*stored, (self.begin, self.end)] if self.fresh else stored

    @property
    def size(self) -> int:
        """The number of keys that the tokens see."""
        return sum(high - low for low, high in self.ranges)

    @property
    def earlier(self) -> list[tuple[int, int]]:
        """The positions of the keys from before this forward pass."""
        return [(low, min(high, self.begin)) for low, high in self.ranges if low < self.begin]

    @property
    def earlier_size(self) -> int:
        """The number of keys from before this forward pass."""
        return sum(high - low for low, high in self.earlier)


class Stack(NamedTuple):
    """Rows of one token each, whose newest cells lie in one column of a stack, level by level.

    Attributes:
        parts: the rows, in batch order.
        rows: selects their tokens from the batch.
        segment: one of their segments.
        new: the index of the new cells.
        seen: the index of the columns that at least one row sees.
        padding: for each row, how many of these columns it does not see, from the first on; None if all
            rows see all.
        prefix: the cells outside the stack that all rows see first.
        others: the cells outside the stack that only some rows see, after the prefix: for each group of
            rows, their number and these cells. Empty if there are none.
        order: the rows by group; None if they are in order.
    """

    parts: list[Part]
    rows: Rows
    segment: int
    new: Index
    seen: Index
    padding: tuple[int, ...] | None
    prefix: Spans
    others: list[tuple[int, Spans]]
    order: tuple[int, ...] | None

    def moved(self) -> Stack:
        """Returns the stack of the next step, after its parts have moved. They see the same cells outside."""
        levels, _, column = self.new
        sizes = [part.cells[-1].length for part in self.parts]
        new, seen, padding = _columns(levels, column.stop, sizes)
        return self._replace(new=new, seen=seen, padding=padding)

    def mask(self) -> mx.array:
        """The mask of the columns that are seen, (rows, 1, 1, columns). Not all rows see all."""
        assert self.padding is not None
        columns = np.arange(self.seen[2].stop - self.seen[2].start)
        return mx.array(columns >= np.array(self.padding)[:, None])[:, None, None, :]


def stacks_of(parts: list[Part], levels: Mapping[int, Level], n: int) -> list[Stack]:
    """Returns the stacks of a batch of n tokens, without the parts that are in none."""
    groups: list[tuple[tuple[tuple[int, ...], int], list[Leveled]]] = []
    for part in parts:
        if len(part.indices) != 1 or part.fresh or len(part.stores) != 1 or part.stores[0][0] not in levels:
            continue
        [(segment, index, _)], reads = part.stores, part.cells
        prefix, column = tuple(span for span in reads if span.segment != segment), index[2].start
        size, (stack, level) = count(reads) - count(prefix), levels[segment]
        if reads[: len(prefix)] != prefix or reads[len(prefix)].start != column + 1 - size:
            continue
        key, new = (stack, column), Leveled(level, size, prefix, part)
        if groups and groups[-1][0] == key and groups[-1][1][-1].level == level - 1:
            groups[-1][1].append(new)
        else:
            groups.append((key, [new]))
    return [_stack(*key, rows, n) for key, rows in groups if len(rows) > 1]


class Leveled(NamedTuple):
    """A row of a stack: its level, the number of cells that it sees there, and the cells before these."""

    level: int
    size: int
    prefix: Spans
    part: Part


def _stack(stack: tuple[int, ...], column: int, rows: list[Leveled], n: int) -> Stack:
    first, parts = rows[0].level, [row.part for row in rows]
    prefix = _common([row.prefix for row in rows])
    alike: dict[Spans, list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault(clip(row.prefix, prefix[-1].end if prefix else 0), []).append(number)
    order = [number for numbers in alike.values() for number in numbers]
    return Stack(
        parts,
        rows_of([part.indices[0] for part in parts], n),
        stack[first],
        *_columns(slice(first, first + len(rows)), column, [row.size for row in rows]),
        prefix,
        [(len(numbers), rest) for rest, numbers in alike.items()] if any(alike) else [],
        None if order == sorted(order) else tuple(order),
    )


def _columns(levels: slice, column: int, sizes: list[int]) -> tuple[Index, Index, tuple[int, ...] | None]:
    """The fields `new`, `seen` and `padding` of a stack whose rows see so many cells up to this column."""
    widest, every = max(sizes), slice(None)
    return (
        (levels, every, slice(column, column + 1)),
        (levels, every, slice(column + 1 - widest, column + 1)),
        tuple([widest - size for size in sizes]) if min(sizes) < widest else None,
    )


def _common(prefixes: Sequence[Spans]) -> Spans:
    """The cells with which all of these begin."""
    common = []
    for spans in zip(*prefixes, strict=False):
        if len({span[:3] for span in spans}) > 1:
            break
        common.append(min(spans, key=lambda span: span.length))
        if len(set(spans)) > 1:
            break
    return tuple(common)


class Attending(NamedTuple):
    """The arguments of `mlx_kvcache.attention`, except the cache."""

    queries: mx.array
    keys: mx.array | None
    values: mx.array | None
    scale: float
    sinks: mx.array | None


def check_queries(given: Attending, n: int, layer: int, heads: int, dim: int) -> None:
    """Raises ValueError unless queries and sinks fit n tokens and keys of `heads` heads of `dim` features."""
    shape, sinks = given.queries.shape, given.sinks
    if len(shape) != 4 or shape[0] != 1 or shape[2] != n:
        raise ValueError(f"queries are {shape}, expected (1, n_heads, {n}, head_dim)")
    if shape[3] != dim:
        raise ValueError(
            f"queries are {shape}: head_dim is {shape[3]}, expected {dim} as in the keys of layer {layer}"
        )
    if not shape[1] or shape[1] % heads:
        raise ValueError(
            f"queries are {shape}: {shape[1]} heads are not a multiple of layer {layer}'s {heads} K/V heads"
        )
    if not mx.issubdtype(given.queries.dtype, mx.floating):
        raise ValueError(f"queries are {given.queries.dtype}, expected floats")
    if sinks is not None and sinks.shape != (shape[1],):
        raise ValueError(f"sinks are {sinks.shape}, expected ({shape[1]},): one for each query head")

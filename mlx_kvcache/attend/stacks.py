"""Finds the rows of a forward pass that one update can write and one product attend to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..cells.placement import Placed
from ..cells.spans import Spans, count
from ..cells.table import Level
from ..storage.codec import Index
from .part import Part, Rows, rows_of


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
    """

    parts: list[Part]
    rows: Rows
    segment: int
    new: Index
    seen: Index
    padding: tuple[int, ...] | None
    prefix: Spans

    def mask(self) -> mx.array | None:
        """The mask of the columns that are seen, (rows, 1, 1, columns). None if all rows see all."""
        if self.padding is None:
            return None
        columns = np.arange(self.seen[2].stop - self.seen[2].start)
        return mx.array(columns >= np.array(self.padding)[:, None])[:, None, None, :]


def stacks_of(placed: list[Placed], parts: list[Part], levels: Mapping[int, Level], n: int) -> list[Stack]:
    """Returns the stacks of a batch of n tokens, without the parts that are in none."""
    groups: list[tuple[tuple[tuple[int, ...], int, Spans], list[tuple[int, int, Part]]]] = []
    for own, part in zip(placed, parts, strict=True):
        if len(own.rows) != 1 or own.fresh or len(own.writes) != 1 or own.writes[0].segment not in levels:
            continue
        segment, column = own.writes[0].segment, own.writes[0].start
        prefix = tuple(span for span in own.reads if span.segment != segment)
        size, (stack, level) = count(own.reads) - count(prefix), levels[segment]
        if own.reads[: len(prefix)] != prefix or own.reads[len(prefix)].start != column + 1 - size:
            continue
        key = stack, column, prefix
        if groups and groups[-1][0] == key and groups[-1][1][-1][0] == level - 1:
            groups[-1][1].append((level, size, part))
        else:
            groups.append((key, [(level, size, part)]))
    return [_stack(*group, n) for group in groups if len(group[1]) > 1]


def _stack(key: tuple[tuple[int, ...], int, Spans], rows: list[tuple[int, int, Part]], n: int) -> Stack:
    stack, column, prefix = key
    first, widest, parts = rows[0][0], max(size for _, size, _ in rows), [part for _, _, part in rows]
    padding = tuple(widest - size for _, size, _ in rows)
    levels, every = slice(first, first + len(rows)), slice(None)
    return Stack(
        parts,
        rows_of([part.indices[0] for part in parts], n),
        stack[first],
        (levels, every, slice(column, column + 1)),
        (levels, every, slice(column + 1 - widest, column + 1)),
        padding if any(padding) else None,
        prefix,
    )

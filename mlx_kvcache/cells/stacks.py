"""Decides which rows of a decoding batch are stacked: rows of about the same length, on the same prefix.

The segments of a stack lie in one array, and the rows in it end in the same column. So one update writes the
next token of all rows, and one product attends to their keys, as in a padded batch. Rows that differ much in
length are not stacked, because padding would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .spans import FOREVER, Span, Spans, clip, count
from .table import CellTable

LONG = 256
"""The number of shared cells from which they are not copied: they stay where they are."""
SLACK = 256
"""The number of cells of padding that costs less than a write and a product of its own."""


class Row(NamedTuple):
    """A row of a batch: the cells that it keeps, and whether its next ones are quantized."""

    sequence: int
    kept: Spans
    is_packed: bool


class Stack(NamedTuple):
    """Rows that are stacked.

    Attributes:
        sequences: the sequences, in batch order.
        prefix: the cells that all of them see first, which stay where they are.
        owns: for each, the cells after the prefix.
        column: the column of the next token.
        segments: the segments where the cells lie already; empty if they must move to a new stack.
        is_packed: whether the next cells are quantized.
    """

    sequences: tuple[int, ...]
    prefix: Spans
    owns: tuple[Spans, ...]
    column: int
    segments: tuple[int, ...]
    is_packed: bool


def stacks_of(table: CellTable, rows: Iterable[Row]) -> list[Stack]:
    """Returns the stacks of a batch, without the rows that are not stacked. Rows are in batch order."""
    found = []
    for prefix, alike in _alike(table, rows):
        for members in _buckets(alike, prefix):
            owns = tuple(_after(prefix, row) for row in members)
            sequences = tuple(row.sequence for row in members)
            segments = _stacked(table, owns, members[0].is_packed)
            column = owns[0][-1].stop if segments else max(map(count, owns))
            found.append(Stack(sequences, prefix, owns, column, segments, members[0].is_packed))
    return found


def _alike(table: CellTable, rows: Iterable[Row]) -> list[tuple[Spans, list[Row]]]:
    """Groups rows by the prefix that they share, and by how they are stored."""
    # What is stored twice counts twice, so only a table without a bound affords it.
    copied = LONG if table.room == FOREVER else 1
    by_first: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        by_first.setdefault(row.kept[0][:3], []).append(row)
    groups: dict[tuple[Spans, bool], list[Row]] = {}
    for (segment, start, position), members in by_first.items():
        # Each row keeps a cell of its own, which says where its next token goes.
        size = min(min(row.kept[0].length, count(row.kept) - 1) for row in members)
        is_kept = size > 0 and size * (len(members) - 1) >= copied
        prefix = (Span(segment, start, position, size),) if is_kept else ()
        for row in members:
            if _shared(table, row.sequence, _after(prefix, row)) < copied:
                groups.setdefault((prefix, row.is_packed), []).append(row)
    return [(prefix, members) for (prefix, _), members in groups.items() if len(members) > 1]


def _after(prefix: Spans, row: Row) -> Spans:
    """The cells of a row after the prefix."""
    return clip(row.kept, prefix[-1].end) if prefix else row.kept


def _shared(table: CellTable, sequence: int, spans: Spans) -> int:
    """The number of cells that other sequences hold, too."""
    shared = 0
    for segment, start, _, length in spans:
        if len(table.owners(segment)) > 1:
            stop, others = start + length, table.cells(segment, but=sequence)
            shared += sum(max(0, min(high, stop) - max(low, start)) for low, high in others)
    return shared


def _buckets(rows: list[Row], prefix: Spans) -> list[list[Row]]:
    """Divides rows by length, so that none has much more padding than cells. Leaves out single rows."""
    sizes = {row.sequence: count(row.kept) - count(prefix) for row in rows}
    left, found = sorted(rows, key=lambda row: -sizes[row.sequence]), []
    while left:
        longest = sizes[left[0].sequence]
        least = longest - max(SLACK, longest // 2)
        bucket = {row.sequence for row in left if sizes[row.sequence] >= least}
        left = [row for row in left if row.sequence not in bucket]
        if len(bucket) > 1:
            found.append([row for row in rows if row.sequence in bucket])
    return found


def _stacked(table: CellTable, owns: Sequence[Spans], is_packed: bool) -> tuple[int, ...]:
    """The segments of rows that lie in one stack, level by level, and can go on there; otherwise ()."""
    segments: list[int] = []
    for own in owns:
        segment, stop = own[-1].segment, own[-1].stop
        if (segment in table.packed) != is_packed:
            return ()
        level = table.levels.get(segment)
        if level is None or stop != owns[0][-1].stop or len({span.segment for span in own}) > 1:
            return ()
        if count(own) != stop - own[0].start or table.cells(segment)[-1][1] != stop:
            return ()
        if segments:
            below = table.levels[segments[-1]]
            if level.stack != below.stack or level.height != below.height + 1:
                return ()
        segments.append(segment)
    return tuple(segments)

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
RUNS = 3
"""Up to so many writes and products cost less than to copy all rows whenever one joins or leaves."""


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
            owns, is_packed = [_after(prefix, row) for row in members], members[0].is_packed
            runs = _runs(table, owns, is_packed)
            stay = [run for run in runs if len(run) > 1]
            full = [run for run in stay if owns[run[0]][-1].stop == table.capacity[owns[run[0]][-1].segment]]
            goes_on = len(runs) == 1 or (stay and len(runs) <= RUNS and not full)
            for run in stay if goes_on else [list(range(len(members)))]:
                own = tuple(owns[index] for index in run)
                segments = tuple(spans[-1].segment for spans in own) if goes_on else ()
                column = own[0][-1].stop if segments else max(map(count, own))
                names = tuple(members[index].sequence for index in run)
                found.append(Stack(names, prefix, own, column, segments, is_packed))
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


def _runs(table: CellTable, owns: Sequence[Spans], is_packed: bool) -> list[list[int]]:
    """Divides rows, by index, into runs that lie in one stack, level by level, and can go on there."""
    fits, runs = [_goes_on(table, own, is_packed) for own in owns], [[0]]
    for index in range(1, len(owns)):
        last, new = owns[index - 1][-1], owns[index][-1]
        below, level = table.levels.get(last.segment), table.levels.get(new.segment)
        is_next = level and below and level.stack == below.stack and level.height == below.height + 1
        if is_next and new.stop == last.stop and fits[index - 1] and fits[index]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _goes_on(table: CellTable, own: Spans, is_packed: bool) -> bool:
    """Whether a row lies in one segment without gaps, and its next token can, too."""
    segment, stop = own[-1].segment, own[-1].stop
    is_one = count(own) == stop - own[0].start and all(span.segment == segment for span in own)
    return is_one and (segment in table.packed) == is_packed and table.cells(segment)[-1][1] == stop

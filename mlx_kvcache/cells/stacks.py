"""Decides which rows of a decoding batch are stacked: rows that have about as many cells of their own.

The segments of a stack lie in one array, and the rows in it end in the same column. So one update writes the
next token of all rows, and one product attends to their keys, as in a padded batch. Long prefixes that rows
share with each other, or with sequences outside the batch, stay where they are. Rows that differ much in the
length of the rest are not stacked, because padding would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .spans import FOREVER, Spans, clip, count
from .table import CellTable

LONG = 256
"""The number of shared cells from which they are not copied: they stay where they are."""
SLACK = 256
"""The number of cells of padding that costs less than a write and a product of its own."""
RUNS = 3
"""Up to so many writes and products cost less than to copy all rows whenever one joins or leaves."""
PATIENCE, COPIED = 2, 256
"""After so many steps of the same rows, and one more for each `COPIED` cells of the longest, their further
writes and products have cost as much as a copy."""


class Row(NamedTuple):
    """A row of a batch: the cells that it keeps, and whether its next ones are quantized."""

    sequence: int
    kept: Spans
    is_packed: bool


class Stack(NamedTuple):
    """Rows that are stacked.

    Attributes:
        sequences: the sequences, in batch order.
        prefixes: for each, the first cells that it sees, which stay where they are because others share them.
        owns: for each, the cells after its prefix.
        column: the column of the next token.
        segments: the segments where the cells lie already; empty if they must move to a new stack.
        is_packed: whether the next cells are quantized.
    """

    sequences: tuple[int, ...]
    prefixes: tuple[Spans, ...]
    owns: tuple[Spans, ...]
    column: int
    segments: tuple[int, ...]
    is_packed: bool


def stacks_of(table: CellTable, rows: Iterable[Row], is_settled: bool = False) -> list[Stack]:
    """Returns the stacks of a batch, without the rows that are not stacked.

    Args:
        rows: in batch order.
        is_settled: these rows have decoded together for so long that a copy pays; see `PATIENCE`.
    """
    found = []
    for members in _buckets(_divided(table, rows)):
        are_whole = all(len(row.kept) == 1 for row, _, _ in members)
        if are_whole and len({prefix for _, prefix, _ in members}) > max(1, len(members) // 2):
            # A row that is one run costs no more than a prefix that only it has.
            continue
        owns, is_packed = [own for _, _, own in members], members[0][0].is_packed
        runs = _runs(table, owns, is_packed)
        stay = [run for run in runs if len(run) > 1]
        full = [run for run in stay if owns[run[0]][-1].stop == table.capacity[owns[run[0]][-1].segment]]
        goes_on = len(runs) == 1 or (stay and len(runs) <= RUNS and not full and not is_settled)
        for run in stay if goes_on else [list(range(len(members)))]:
            chosen, prefixes, own = zip(*(members[index] for index in run), strict=True)
            segments = tuple(spans[-1].segment for spans in own) if goes_on else ()
            column = own[0][-1].stop if segments else max(map(count, own))
            names = tuple(row.sequence for row in chosen)
            found.append(Stack(names, prefixes, own, column, segments, is_packed))
    return found


Divided = tuple[Row, Spans, Spans]
"""A row, the first of its cells, which stay where they are, and the others."""


def _divided(table: CellTable, rows: Iterable[Row]) -> list[Divided]:
    """Divides the cells of rows, in batch order. Leaves out those of which all is shared."""
    # What is stored twice counts twice, so only a table without a bound affords it.
    copied = LONG if table.room == FOREVER else 1
    common: dict[tuple[int, int, int], list[Row]] = {}
    for row in (rows := list(rows)):
        common.setdefault(row.kept[0][:3], []).append(row)
    found = []
    for row in rows:
        members = common[row.kept[0][:3]]
        # Each row keeps a cell of its own, which says where its next token goes.
        size = min(min(other.kept[0].length, count(other.kept) - 1) for other in members)
        begin = row.kept[0].position
        border = begin + size if size * (len(members) - 1) >= copied else begin
        shared = _shared(table, row.sequence, clip(row.kept, border))
        if sum(stop - start for start, stop in shared) >= copied:
            border = min(shared[-1][1], row.kept[-1].end - 1)
        own = clip(row.kept, border)
        if sum(stop - start for start, stop in _shared(table, row.sequence, own)) < copied:
            found.append((row, clip(row.kept, 0, border), own))
    return found


def _shared(table: CellTable, sequence: int, spans: Spans) -> list[tuple[int, int]]:
    """The positions in these spans, as intervals, of cells that other sequences hold, too."""
    shared = []
    for segment, start, position, length in spans:
        if len(table.owners(segment)) > 1:
            for low, high in table.cells(segment, but=sequence):
                low, high = max(low, start), min(high, start + length)
                if low < high:
                    shared.append((position + low - start, position + high - start))
    return shared


def _buckets(rows: list[Divided]) -> list[list[Divided]]:
    """Groups rows that are stored alike, so that none has much more padding than cells.

    Leaves out single rows.
    """
    sizes = {row.sequence: (row.is_packed, count(own)) for row, _, own in rows}
    left, found = sorted(sizes, key=lambda sequence: sizes[sequence], reverse=True), []
    while left:
        is_packed, longest = sizes[left[0]]
        least = is_packed, longest - max(SLACK, longest // 2)
        bucket = {sequence for sequence in left if sizes[sequence] >= least}
        left = [sequence for sequence in left if sequence not in bucket]
        if len(bucket) > 1:
            found.append([each for each in rows if each[0].sequence in bucket])
    return found


def _runs(table: CellTable, owns: Sequence[Spans], is_packed: bool) -> list[list[int]]:
    """Divides rows, by index, into runs that lie in one stack, level by level, and can go on there."""
    ends = [(own[-1].segment, own[-1].stop) for own in owns]
    # Only one of several forks with the same last cell can have the next.
    fits = [end not in ends[:n] and _goes_on(table, owns[n], is_packed) for n, end in enumerate(ends)]
    runs = [[0]]
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

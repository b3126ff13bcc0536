"""Plans the removal and re-basing of tokens of a sequence, without changing the table."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import CacheFullError, NotSupportedError
from .placement import capacity_for
from .spans import Sequence, Spans, clip, count, join, laid_out, moved, resumable, union
from .table import CellTable, Changes
from .visibility import Rule


class Target(NamedTuple):
    """The destination of re-based tokens: a segment, from `cell` on. `is_new`: it must be created."""

    segment: int
    cell: int
    capacity: int
    is_packed: bool
    is_new: bool


class Rebased(NamedTuple):
    """Tokens whose keys are re-based by `offset`: the cells to read, and the cells to write."""

    source: Spans
    offset: int
    target: Target


class Removal(NamedTuple):
    """A plan: the changes of the table, and the tokens to re-base, if any."""

    changes: Changes
    rebased: Rebased | None


def drop_tail(table: CellTable, sequence: int, begin: int) -> Removal:
    """Plans to remove the positions from `begin` on."""
    spans = clip(table[sequence].spans, 0, begin)
    return Removal({sequence: Sequence(begin, spans) if begin else None}, None)


def remove_range(
    table: CellTable, sequence: int, begin: int, end: int, rule: Rule, rebase_head: bool = False
) -> Removal:
    """Plans to remove the positions [begin, end) and move later ones down by end - begin.

    RoPE attention depends only on differences of positions, so either side can be re-based: the later
    tokens by -(end - begin), or with `rebase_head` the earlier ones by +(end - begin). In the latter case
    the caller must rotate the next queries and keys from the old end on.

    Args:
        table: the table, which stays unchanged.
        sequence: the sequence.
        begin, end: the range, which lies inside the sequence.
        rule: the visibility rule.
        rebase_head: re-base the tokens before the range instead of those after it.

    Raises:
        NotSupportedError: the next token would see a position that is not stored.
        CacheFullError: the cells to re-base are shared, and there is no room for a copy.
    """
    old = table[sequence]
    gap = end - begin
    head, tail = clip(old.spans, 0, begin), moved(clip(old.spans, end), -gap)
    new_end = old.end - gap
    if not resumable(rule, head + tail, new_end):
        raise NotSupportedError(
            f"cannot remove [{begin}, {end}) from sequence {sequence} of length {old.end}: the next token "
            f"at {new_end} would see positions from {max(0, rule.lower(new_end))} on, and not all of these "
            "are stored"
        )
    source, staying = (head, tail) if rebase_head else (tail, head)
    if not source or not gap:
        return _checked(table, sequence, Sequence(new_end, head + tail), None)
    target = _target(table, sequence, source, staying, rebase_head)
    placed = laid_out(target.segment, target.cell, source)
    spans = join(placed + tail if rebase_head else head + placed)
    cells_now = source if rebase_head else moved(source, gap)
    rebased = Rebased(cells_now, gap if rebase_head else -gap, target)
    return _checked(table, sequence, Sequence(new_end, spans), rebased)


def rebase_all(table: CellTable, sequence: int, offset: int) -> Removal:
    """Plans to re-base all stored tokens of a sequence by `offset`. Their positions in the table stay.

    Raises:
        CacheFullError: cells are shared, and there is no room for a copy.
    """
    end, source = table[sequence]
    target = _target(table, sequence, source, (), before=False)
    placed = laid_out(target.segment, target.cell, source)
    return _checked(table, sequence, Sequence(end, placed), Rebased(source, offset, target))


def _target(table: CellTable, sequence: int, source: Spans, staying: Spans, before: bool) -> Target:
    """The destination of re-based tokens: free cells next to those that stay, or a new segment."""
    size = count(source)
    if before and staying:
        segment, cell = staying[0].segment, staying[0].start - size
    elif staying:
        segment, cell = staying[-1].segment, staying[-1].stop
    else:
        segment, cell = source[0].segment, source[0].start
    taken = table.cells(segment, but=sequence)
    taken += [(span.start, span.stop) for span in staying if span.segment == segment]
    overlaps = any(low < cell + size and cell < high for low, high in union(taken))
    capacity = table.capacity[segment]
    if cell >= 0 and cell + size <= capacity and not overlaps:
        return Target(segment, cell, capacity, segment in table.packed, is_new=False)
    spare = max(0, table.room - table.allocated - size) // len(table.sequences)
    return Target(table.new_segment(), 0, capacity_for(size, spare), table.packs(source), is_new=True)


def _checked(table: CellTable, sequence: int, new: Sequence, rebased: Rebased | None) -> Removal:
    changes: dict[int, Sequence | None] = {sequence: new if new.end else None}
    live = table.live_after(changes)
    if live > table.room:
        needed = count(rebased.source) if rebased else 0
        raise CacheFullError(needed, table.room - live + needed, table.room, "shared cells must be copied")
    return Removal(changes, rebased)

"""Plans edits of sequences, without changing the table: removals, and tokens that join from elsewhere.

Tokens that get other positions move to other cells, where their keys are re-based.
"""

from __future__ import annotations

from ..errors import CacheFullError, NotSupportedError
from .placement import Move, Placement, capacity_for
from .spans import Sequence, Spans, clip, count, join, laid_out, moved, resumable, union
from .table import CellTable
from .visibility import Rule


def drop_tail(table: CellTable, sequence: int, begin: int) -> Placement:
    """Plans to remove the positions from `begin` on."""
    spans = clip(table[sequence].spans, 0, begin)
    return Placement(changes={sequence: Sequence(begin, spans) if begin else None})


def remove_range(
    table: CellTable, sequence: int, begin: int, end: int, rule: Rule, rebase_head: bool = False
) -> Placement:
    """Plans to remove the positions [begin, end) and move later ones down by end - begin.

    RoPE attention depends only on differences of positions, so either side can be re-based: the later
    tokens by -(end - begin), or with `rebase_head` the earlier ones by +(end - begin). In the latter case
    the caller must rotate the next queries and keys from the old end on. The range lies inside the sequence.

    Raises:
        NotSupportedError: the next token would see a position that is not stored.
        CacheFullError: the cells to re-base are shared, and there is no room for a copy.
    """
    old, gap = table[sequence], end - begin
    head, tail = clip(old.spans, 0, begin), moved(clip(old.spans, end), -gap)
    new_end = old.end - gap
    if not resumable(rule, head + tail, new_end):
        raise NotSupportedError(
            f"cannot remove [{begin}, {end}) from sequence {sequence} of length {old.end}: the next token "
            f"at {new_end} would see positions from {max(0, rule.lower(new_end))} on, and not all of these "
            "are stored"
        )
    placement = Placement()
    if rebase_head:
        head = _rebased(table, placement, sequence, head, gap, tail, is_before=True)
    else:
        tail = _rebased(table, placement, sequence, tail, -gap, head, is_before=False)
    placement.changes[sequence] = Sequence(new_end, join(head + tail)) if new_end else None
    return _checked(table, placement)


def rebase_all(table: CellTable, sequence: int, offset: int) -> Placement:
    """Plans to re-base all stored tokens of a sequence. Their positions in the table stay."""
    end, spans = table[sequence]
    placement = Placement()
    spans = _rebased(table, placement, sequence, spans, offset, (), is_before=False)
    placement.changes[sequence] = Sequence(end, spans)
    return _checked(table, placement)


def graft(
    table: CellTable, source: int, begin: int, end: int, sequence: int, rule: Rule, offset: int
) -> Placement:
    """Plans to append the positions [begin, end) of `source` to another sequence.

    They get the positions that follow the sequence's end. The range lies inside the source.

    Args:
        offset: what to add to their keys' positions (RoPE). With 0, the two sequences share cells.

    Raises:
        NotSupportedError: the next token would see a position that is not stored.
        CacheFullError: there is no room for copies of the cells to re-base.
    """
    old, by = table[sequence], table[sequence].end - begin
    run, new_end = moved(clip(table[source].spans, begin, end), by), end + by
    if not resumable(rule, old.spans + run, new_end):
        raise NotSupportedError(
            f"cannot append [{begin}, {end}) of sequence {source} to sequence {sequence} of length "
            f"{old.end}: the next token at {new_end} would see positions from "
            f"{max(0, rule.lower(new_end))} on, and not all of these are stored"
        )
    placement = Placement()
    run = _rebased(table, placement, sequence, run, offset, old.spans, is_before=False)
    placement.changes[sequence] = Sequence(new_end, join(old.spans + run)) if new_end else None
    return _checked(table, placement)


def _rebased(
    table: CellTable,
    placement: Placement,
    sequence: int,
    source: Spans,
    offset: int,
    staying: Spans,
    is_before: bool,
) -> Spans:
    """Adds the move of `source` to free cells before or after those that stay, or to a new segment."""
    size = count(source)
    if not size or not offset:
        return source
    if is_before and staying:
        segment, cell = staying[0].segment, staying[0].start - size
    elif staying:
        segment, cell = staying[-1].segment, staying[-1].stop
    else:
        segment, cell = source[0].segment, source[0].start
    taken = table.cells(segment, but=sequence)
    taken += [(span.start, span.stop) for span in staying if span.segment == segment]
    overlaps = any(low < cell + size and cell < high for low, high in union(taken))
    # Keys are re-based in new buffers, which a stack does not get for one row.
    if segment in table.levels or cell < 0 or cell + size > table.capacity[segment] or overlaps:
        spare = max(0, table.room - table.allocated - size) // len(table.sequences)
        segment = placement.new_segment(table, capacity_for(size, spare), table.packs(source))
        cell = 0
    else:
        placement.capacity[segment] = table.capacity[segment]
        placement.packed |= table.packed & {segment}
    placement.moves.append(Move(segment, source, cell, offset))
    return laid_out(segment, cell, source)


def _checked(table: CellTable, placement: Placement) -> Placement:
    live = table.live_after(placement.changes)
    if live > table.room:
        needed = sum(count(move.pieces) for move in placement.moves)
        raise CacheFullError(needed, table.room - live + needed, table.room, "shared cells must be copied")
    return placement

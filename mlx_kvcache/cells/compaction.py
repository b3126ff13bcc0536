"""How much is allocated, and giving unused cells back."""

from __future__ import annotations

from collections.abc import Iterable

from .placement import Move, Placement
from .spans import Sequence, Span
from .table import CellTable


def allocated_after(table: CellTable, placement: Placement) -> int:
    """Cells of all segments that would be owned."""
    emptied = {
        span.segment
        for sequence in placement.changes
        for span in table[sequence].spans
        if all(owner in placement.changes for owner in table.owners(span.segment))
    }
    kept = {span.segment for new in placement.changes.values() if new for span in new.spans}
    sizes = {segment: table.capacity[segment] for segment in table.owned()} | placement.capacity
    return sum(size for segment, size in sizes.items() if segment not in emptied - kept)


def compact(table: CellTable) -> Placement:
    """Plan to give all unused cells back: every segment that has some moves to an exact one."""
    placement = Placement()
    for segment in table.owned():
        cells = table.cells(segment)
        live = sum(high - low for low, high in cells)
        if live == table.capacity[segment]:
            continue
        target = table.new_segment()
        if segment in table.packed:
            placement.packed.add(target)
        pieces = tuple(Span(segment, low, 0, high - low) for low, high in cells)
        placement.moves.append(Move(target, pieces))
        placement.capacity[target] = live
        for owner in table.owners(segment):
            now = placement.changes.get(owner) or table[owner]
            spans = tuple(_relocated(span, segment, target, cells) for span in now.spans)
            placement.changes[owner] = Sequence(now.end, spans)
    return placement


def _relocated(span: Span, source: int, target: int, cells: Iterable[tuple[int, int]]) -> Span:
    """A span of `source` in `target`, which holds just these cells of it."""
    if span.segment != source:
        return span
    start = 0
    for low, high in cells:
        if low <= span.start < high:
            return Span(target, start + span.start - low, span.position, span.length)
        start += high - low
    raise AssertionError(f"{span} is not among the live cells")

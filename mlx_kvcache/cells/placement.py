"""Plans the cells of new tokens, and the compaction of segments, without changing the table.

A sequence's new tokens follow its last ones in the same segment if the cells there are free. Otherwise they
go to a new segment, with copies of the segments that only this sequence owns. Shared segments stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import CacheFullError, NotSupportedError
from .spans import Sequence, Span, Spans, clip, count, join, laid_out, resumable, seen_from
from .table import CellTable
from .visibility import Rule

STEP = 256
"""Segments grow by this number of cells, a compromise between copies and unused memory."""
SMALL_STEP = 64
"""Segments up to STEP cells and shared segments grow by this, so that many short branches stay cheap."""
DEAD = 128
"""A full segment with this number of dead cells is copied to a new one instead of growing."""


class Write(NamedTuple):
    """Stores a sequence's new tokens [first, first + size) in the cells from `cell` on."""

    first: int
    size: int
    segment: int
    cell: int


class Move(NamedTuple):
    """Creates a segment that begins with copies of these cells, in order."""

    segment: int
    pieces: Spans


class Placed(NamedTuple):
    """The placement of one sequence's tokens in a forward pass.

    Attributes:
        rows: the batch indices of the tokens, by rising position.
        begin, end: their positions, [begin, end).
        writes: the cells that store them.
        reads: the cells that they may see, by rising position.
        fresh: `reads` stops at `begin`, and new tokens are read from the batch, because not all tokens that
            they see are stored.
    """

    sequence: int
    rows: tuple[int, ...]
    begin: int
    end: int
    writes: tuple[Write, ...]
    reads: Spans
    fresh: bool


@dataclass(slots=True)
class Placement:
    """A plan: the changes of the table, the changes that undo them, and the work on arrays.

    Attributes:
        placed: the placement of each sequence's tokens.
        changes, undo: new states of sequences to assign.
        capacity: new capacities, of new segments and of those that grow.
        moves: the new segments that begin with copies.
        packed: the new segments that are quantized.
    """

    placed: list[Placed] = field(default_factory=list)
    changes: dict[int, Sequence | None] = field(default_factory=dict)
    undo: dict[int, Sequence | None] = field(default_factory=dict)
    capacity: dict[int, int] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    packed: set[int] = field(default_factory=set)

    def in_use(self) -> set[int]:
        """Returns the segments to keep until the forward pass is over, even without an owner."""
        spans = [span for placed in self.placed for span in placed.reads]
        for old in self.undo.values():
            spans += old.spans if old else ()
        return {span.segment for span in spans}


def place(table: CellTable, rows: Mapping[int, tuple[int, ...]], rule: Rule, rewind: int) -> Placement:
    """Plans a forward pass.

    Args:
        table: the table, which stays unchanged.
        rows: for each sequence, the batch indices of its next tokens.
        rule: the visibility rule.
        rewind: the number of newest tokens that can be dropped afterwards.

    Raises:
        NotSupportedError: a token would see a position that is not stored.
        CacheFullError: the cells to keep afterwards, and those that the tokens see meanwhile, exceed the
            room.
    """
    if len(rows) == 1:
        [(sequence, own)] = rows.items()
        appended = append(table, sequence, own, rule, rewind)
        if appended is not None:
            return appended
    spread = {s: _Tokens.next_of(table, s, len(own), rule, rewind) for s, own in rows.items()}
    _check_room(table, spread)
    new = sum(tokens.stored for tokens in spread.values())
    # Sequences that begin here also get a share of the free room.
    spare = max(0, table.room - table.allocated - new) // len(table.sequences.keys() | rows.keys())
    placement = Placement()
    for sequence, tokens in spread.items():
        _place_one(table, placement, sequence, rows[sequence], tokens, spare)
    return placement


def capacity_for(required: int, spare: int, reserve: int = 0, is_shared: bool = False) -> int:
    """Returns the capacity of a segment for `required` cells, with at most `spare` unused ones.

    A shared segment grows in small steps, because only one of its branches continues there.

    Args:
        required: the number of cells that are needed.
        spare: the largest number of unused cells.
        reserve: the number of unused cells to add before rounding up to full steps.
        is_shared: whether several sequences own the segment.
    """
    wanted = required + reserve
    step = SMALL_STEP if is_shared or wanted <= STEP else STEP
    return required + min(reserve + -wanted % step, spare)


class _Tokens(NamedTuple):
    """The next tokens of a sequence, at positions [begin, end).

    Attributes:
        rule: the visibility rule.
        old: the sequence before.
        kept: the spans of `old` to keep afterwards.
        during: the spans of `old` to keep afterwards or that the new tokens see.
        ranges: the positions of the new tokens to keep afterwards.
    """

    rule: Rule
    old: Sequence
    begin: int
    end: int
    kept: Spans
    during: Spans
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def next_of(cls, table: CellTable, sequence: int, n: int, rule: Rule, rewind: int) -> _Tokens:
        old = table[sequence]
        begin, end = old.end, old.end + n
        if not resumable(rule, old.spans, begin):
            raise NotSupportedError(
                f"sequence {sequence} cannot continue at position {begin}: a token there sees positions "
                f"from {max(0, rule.lower(begin))} on, and not all of these are stored"
            )
        back = max(0, end - rewind)
        low = max(0, rule.lower(back))
        sinks = (begin, min(end, rule.sinks, low))
        newest = (max(begin, low), end)
        return cls(
            rule,
            old,
            begin,
            end,
            kept=seen_from(rule, old.spans, back),
            during=seen_from(rule, old.spans, min(begin, back)),
            ranges=tuple((first, stop) for first, stop in (sinks, newest) if first < stop),
        )

    @property
    def stored(self) -> int:
        return sum(stop - first for first, stop in self.ranges)

    @property
    def whole(self) -> bool:
        """Whether all new tokens are kept afterwards."""
        return self.ranges == ((self.begin, self.end),)


def _check_room(table: CellTable, spread: Mapping[int, _Tokens]) -> None:
    live = table.live_after({s: Sequence(t.begin, t.during) for s, t in spread.items()})
    needed = sum(tokens.stored for tokens in spread.values())
    if live + needed > table.room:
        raise CacheFullError(needed, table.room - live, table.room)


def append(
    table: CellTable, sequence: int, rows: tuple[int, ...], rule: Rule, rewind: int
) -> Placement | None:
    """Plans the simplest case: one span without other owners, and free cells after it.

    Returns None in other cases. Decoding comes here for almost every token, so it does little.

    Args:
        table, rule, rewind: as for `place`.
        sequence: the sequence.
        rows: the batch indices of its next tokens.
    """
    old, n = table[sequence], len(rows)
    begin, spans = old
    if len(spans) != 1:
        return None
    segment, start, position, length = spans[0]
    stop, end = start + length, begin + n
    low = rule.lower(max(0, end - rewind))
    if (
        position + length != begin
        or position > max(0, rule.lower(begin))
        or low > begin
        or (rule.sinks and max(low, position) > 0)
        or stop + n > table.capacity[segment]
        or table.live + n > table.room
        or len(table.owners(segment)) > 1
        or (end > table.pack_after and segment not in table.packed)
    ):
        return None
    run = (Span(segment, start, position, length + n),)
    write = Write(0, n, segment, stop)
    placed = Placed(sequence, rows, begin, end, (write,), seen_from(rule, run, begin), False)
    return Placement([placed], {sequence: Sequence(end, clip(run, low))}, {sequence: old})


def _place_one(
    table: CellTable, placement: Placement, sequence: int, rows: tuple[int, ...], tokens: _Tokens, spare: int
) -> None:
    """Adds the tokens of one sequence to the plan: after its last ones, or in a new segment."""
    old, kept, n = tokens.old, tokens.kept, tokens.stored
    evicts = count(kept) < count(old.spans)
    undo = old
    segment, cell, readable = -1, 0, old.spans
    if tokens.whole and _can_extend(table, placement, sequence, tokens):
        segment, cell = old.spans[-1].segment, old.spans[-1].stop
        if cell + n > table.capacity[segment]:
            is_shared = table.owners(segment) != {sequence}
            placement.capacity[segment] = capacity_for(cell + n, spare, is_shared=is_shared)
    elif n:
        segment = table.new_segment()
        own = tuple(span for span in kept if table.owners(span.segment) == {sequence})
        cell = count(own)
        if table.packs(own, tokens.end):
            placement.packed.add(segment)
        if own:
            placement.moves.append(Move(segment, own))
            kept = _replaced(kept, own, laid_out(segment, 0, own))
            undo = old if evicts or _converts(table, placement, segment, own) else Sequence(old.end, kept)
        readable = kept
        reserve = DEAD if evicts or not tokens.whole else 0
        placement.capacity[segment] = capacity_for(cell + n, spare, reserve)

    writes, new = _writes(tokens, segment, cell)
    begin, end = tokens.begin, tokens.end
    fresh = not (tokens.whole and resumable(tokens.rule, readable, begin))
    reads = seen_from(tokens.rule, old.spans if fresh else _in_order(readable + new), begin)
    after = _in_order(kept + new)
    placement.placed.append(Placed(sequence, rows, begin, end, writes, reads, fresh))
    placement.changes[sequence] = Sequence(end, after)
    placement.undo[sequence] = undo if sequence in table.sequences else None


def _can_extend(table: CellTable, placement: Placement, sequence: int, tokens: _Tokens) -> bool:
    """Whether new cells can follow the last ones, in their segment as it is or grown."""
    if not tokens.old.spans:
        return False
    last = tokens.old.spans[-1]
    if tokens.end > table.pack_after and last.segment not in table.packed:
        return False
    claimed = any(write.segment == last.segment for placed in placement.placed for write in placed.writes)
    if claimed or last.end != tokens.begin or table.cells(last.segment)[-1][1] != last.stop:
        return False
    if last.stop + tokens.stored <= table.capacity[last.segment]:
        return True
    if table.owners(last.segment) != {sequence}:
        return True
    if any(s.segment != last.segment and table.owners(s.segment) == {sequence} for s in tokens.kept):
        # Growing copies the segment anyway, so copy the spans in other segments with it.
        return False
    dead = last.stop - count(span for span in tokens.kept if span.segment == last.segment)
    tight = table.room - table.allocated < tokens.stored
    return dead < (1 if tight else DEAD)


def _converts(table: CellTable, placement: Placement, segment: int, own: Spans) -> bool:
    """Whether moving these spans to a new segment changes how they are stored."""
    return segment in placement.packed and any(span.segment not in table.packed for span in own)


def _replaced(spans: Spans, own: Spans, by: Spans) -> Spans:
    """`spans` with those of `own` replaced by `by`, in order of position."""
    return _in_order(tuple(span for span in spans if span not in own) + by)


def _in_order(spans: Spans) -> Spans:
    return join(tuple(sorted(spans, key=lambda span: span.position)))


def _writes(tokens: _Tokens, segment: int, cell: int) -> tuple[tuple[Write, ...], Spans]:
    writes, spans = [], []
    for low, high in tokens.ranges:
        writes.append(Write(low - tokens.begin, high - low, segment, cell))
        spans.append(Span(segment, cell, low, high - low))
        cell += high - low
    return tuple(writes), tuple(spans)


def allocated_after(table: CellTable, placement: Placement) -> int:
    """Returns the number of cells in all owned segments after this plan."""
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
    """Plans to free all unused cells: copies each segment that has some to a new one without."""
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
    """The new place of a span, after `cells` of `source` were copied to `target`."""
    if span.segment != source:
        return span
    start = 0
    for low, high in cells:
        if low <= span.start < high:
            return Span(target, start + span.start - low, span.position, span.length)
        start += high - low
    raise AssertionError(f"{span} is not among the live cells")

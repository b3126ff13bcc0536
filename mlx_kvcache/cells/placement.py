"""Plans the cells of new tokens, and the compaction of segments, without changing the table.

A sequence's new tokens follow its last ones in the same segment if the cells there are free. Otherwise they
go to a new segment, with copies of the segments that only this sequence owns. Shared segments stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import CacheFullError, NotSupportedError
from .spans import Sequence, Span, Spans, clip, count, covers, join, laid_out, resumable, seen_from
from .stacks import Row, Stack, stacks_of
from .table import CellTable, Level
from .visibility import Causal, Rule

STEP = 256
"""Segments grow by this number of cells, a compromise between copies and unused memory."""
SHARE = 16
"""Long segments grow by one part in this number, so that few tokens cause a copy."""
SMALL_STEP = 64
"""Segments up to STEP cells and shared segments grow by this, so that many short branches stay cheap."""
DEAD = 128
"""A full segment with this number of dead cells is copied to a new one instead of growing."""


class Move(NamedTuple):
    """Copies the cells of `pieces`, in order, to a segment from `cell` on, with keys re-based by `offset`."""

    segment: int
    pieces: Spans
    cell: int = 0
    offset: int = 0


class Placed(NamedTuple):
    """The placement of one sequence's tokens in a forward pass.

    Attributes:
        rows: the batch indices of the tokens, by rising position.
        begin, end: their positions, [begin, end).
        writes: the cells that store those which are kept.
        reads: the cells that they may see, by rising position.
        fresh: `reads` stops at `begin`, and new tokens are read from the batch, because not all tokens that
            they see are stored.
    """

    sequence: int
    rows: tuple[int, ...]
    begin: int
    end: int
    writes: Spans
    reads: Spans
    fresh: bool


@dataclass(slots=True)
class Placement:
    """A plan: the changes of the table, and the work on arrays.

    Attributes:
        placed: the placement of each sequence's tokens in a forward pass.
        changes: new states of sequences to assign.
        undo: the states that take a forward pass back.
        capacity: the capacities of segments that are new, grow, or are moved to.
        moves: the cells to copy.
        packed: the segments that are new or moved to and are quantized.
        levels: the places of the segments of new stacks.
    """

    placed: list[Placed] = field(default_factory=list)
    changes: dict[int, Sequence | None] = field(default_factory=dict)
    undo: dict[int, Sequence | None] = field(default_factory=dict)
    capacity: dict[int, int] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    packed: set[int] = field(default_factory=set)
    levels: dict[int, Level] = field(default_factory=dict)

    def new_segment(self, table: CellTable, capacity: int, is_packed: bool) -> int:
        """Adds a new segment to the plan and returns its number."""
        segment = table.new_segment()
        self.capacity[segment] = capacity
        if is_packed:
            self.packed.add(segment)
        return segment

    def in_use(self) -> set[int]:
        """Returns the segments to keep until the forward pass is over, even without an owner."""
        held = [placed.reads for placed in self.placed] + [old.spans for old in self.undo.values() if old]
        return {span.segment for spans in held for span in spans}


def place(
    table: CellTable, rows: Mapping[int, tuple[int, ...]], rule: Rule, rewind: int, is_settled: bool = False
) -> Placement:
    """Plans a forward pass.

    Args:
        table: the table, which stays unchanged.
        rows: for each sequence, the batch indices of its next tokens.
        rule: the visibility rule.
        rewind: the number of newest tokens that can be dropped afterwards.
        is_settled: see `stacks_of`.

    Raises:
        NotSupportedError: a token would see a position that is not stored.
        CacheFullError: there is no room for the cells to keep and those that the tokens see meanwhile.
    """
    if len(rows) == 1 and (appended := append(table, rows, rule, rewind)):
        (changes, undo, [reads]), [(sequence, own)] = appended, rows.items()
        if len(table.owners(reads[-1].segment)) == 1:
            begin, end = table[sequence].end, table[sequence].end + len(own)
            write = Span(reads[-1].segment, reads[-1].stop - len(own), begin, len(own))
            return Placement([Placed(sequence, own, begin, end, (write,), reads, False)], changes, undo)
    blocks = [_block(table, sequence, own, rule, rewind) for sequence, own in rows.items()]
    new = sum(count(block.new) for block in blocks)
    live = table.live_after({block.sequence: Sequence(block.begin, block.during) for block in blocks})
    if live + new > table.room:
        raise CacheFullError(new, table.room - live, table.room)
    # Sequences that begin here also get a share of the free room.
    spare = max(0, table.room - table.allocated - new) // len(table.sequences.keys() | rows.keys())
    stacks = stacks_of(table, _stackable(table, blocks, rule), is_settled)
    placement = _placement(table, blocks, stacks, rule, spare)
    if placement.levels and allocated_after(table, placement) > table.room:
        # There is no room for padding.
        return _placement(table, blocks, [], rule, spare)
    return placement


def _placement(
    table: CellTable, blocks: list[_Block], stacks: list[Stack], rule: Rule, spare: int
) -> Placement:
    placement, left = Placement(), {block.sequence: block for block in blocks}
    groups: dict[int, tuple[int, ...]] = {block.sequence: (block.sequence,) for block in blocks}
    for stack in stacks:
        _place_stack(table, placement, stack, [left.pop(name) for name in stack.sequences], rule, spare)
        groups |= {**dict.fromkeys(stack.sequences, ()), stack.sequences[0]: stack.sequences}
    for block in left.values():
        _place_block(table, placement, block, rule, spare)
    # A stack stands where its first row is in the batch, so that most outputs need not be reordered.
    own = {placed.sequence: placed for placed in placement.placed}
    placement.placed = [own[name] for names in groups.values() for name in names]
    return placement


def capacity_for(required: int, spare: int, reserve: int = 0, is_shared: bool = False) -> int:
    """Returns the capacity of a segment for `required` cells, with at most `spare` unused ones.

    `reserve` unused cells are added before rounding up to full steps. A shared segment grows in small steps,
    because only one of its branches continues there.
    """
    wanted = required + reserve
    step = SMALL_STEP if is_shared or wanted <= STEP else max(STEP, wanted // SHARE // STEP * STEP)
    return required + min(reserve + -wanted % step, spare)


class Appended(NamedTuple):
    """A plan of `append`.

    Attributes:
        changes, undo: as of a `Placement`.
        reads: for each sequence the cells that its tokens see, the new ones last.
    """

    changes: dict[int, Sequence | None]
    undo: dict[int, Sequence | None]
    reads: list[Spans]


def append(table: CellTable, rows: Mapping[int, tuple[int, ...]], rule: Rule, rewind: int) -> Appended | None:
    """Plans the simplest case of `place`: each sequence goes on in the cells after its last ones.

    The caller knows that no other sequence has these cells. Decoding comes here for almost every token, so it
    calls and makes little. Returns None in other cases.
    """
    appended, sees_all, added = Appended({}, {}, []), isinstance(rule, Causal), 0
    for sequence, own in rows.items():
        old = table.sequences.get(sequence)
        if old is None or not old.spans:
            return None
        (begin, spans), n = old, len(own)
        segment, start, position, length = spans[-1]
        end, after = begin + n, length + n
        # The first positions to keep, and to see.
        low, first = (0, 0) if sees_all else (rule.lower(max(0, end - rewind)), rule.lower(begin))
        if (
            position + length != begin
            or low > begin
            or (rule.sinks and max(low, position) > 0)
            or start + after > table.capacity[segment]
            or (end > table.pack_after and segment not in table.packed)
        ):
            return None
        if len(spans) == 1:
            if position > max(0, first):
                return None
        else:
            held = 0
            for span in spans[:-1]:
                if span.position != held or span.segment == segment:
                    return None
                held += span.length
            if position != held or low > 0:
                return None
        run = (*spans[:-1], Span(segment, start, position, after))
        if rule.sinks:
            appended.reads.append(seen_from(rule, run, begin))
        else:
            appended.reads.append(run if first <= run[0].position else clip(run, first))
        appended.changes[sequence] = Sequence(end, run if low <= run[0].position else clip(run, low))
        appended.undo[sequence] = old
        added += n
    return appended if table.live + added <= table.room else None


class _Block(NamedTuple):
    """The next tokens of a sequence, at positions [begin, end).

    Attributes:
        rows: their batch indices.
        old: the spans of the sequence before.
        kept: the part of `old` to keep afterwards.
        during: the part of `old` to keep afterwards or that the new tokens see.
        new: the new tokens to keep afterwards, as spans without cells.
        is_whole: whether these are all new tokens.
    """

    sequence: int
    rows: tuple[int, ...]
    begin: int
    end: int
    old: Spans
    kept: Spans
    during: Spans
    new: Spans
    is_whole: bool


def _block(table: CellTable, sequence: int, rows: tuple[int, ...], rule: Rule, rewind: int) -> _Block:
    begin, old = table[sequence]
    end = begin + len(rows)
    if not resumable(rule, old, begin):
        raise NotSupportedError(
            f"sequence {sequence} cannot continue at position {begin}: a token there sees positions "
            f"from {max(0, rule.lower(begin))} on, and not all of these are stored"
        )
    back = max(0, end - rewind)
    kept, during = seen_from(rule, old, back), seen_from(rule, old, min(begin, back))
    new = seen_from(rule, (Span(-1, 0, begin, end - begin),), back)
    return _Block(sequence, rows, begin, end, old, kept, during, new, covers(new, begin, end))


def _place_block(table: CellTable, placement: Placement, block: _Block, rule: Rule, spare: int) -> None:
    """Adds the tokens of one sequence to the plan: after its last ones, or in a new segment."""
    sequence, rows, begin, end, old, kept, _, new, is_whole = block
    evicts = count(kept) < count(old)
    segment, cell, readable, undo = -1, 0, old, old
    if is_whole and _can_extend(table, placement, block):
        segment, cell = old[-1].segment, old[-1].stop
        required = cell + count(new)
        if required > table.capacity[segment]:
            is_shared = table.owners(segment) != {sequence}
            placement.capacity[segment] = capacity_for(required, spare, is_shared=is_shared)
    elif new:
        own = tuple(span for span in kept if table.owners(span.segment) == {sequence})
        cell = count(own)
        capacity = capacity_for(cell + count(new), spare, DEAD if evicts or not is_whole else 0)
        segment = placement.new_segment(table, capacity, table.packs(own, end))
        if own:
            placement.moves.append(Move(segment, own))
            kept = _in_order(tuple(span for span in kept if span not in own) + laid_out(segment, 0, own))
            converts = segment in placement.packed and any(s.segment not in table.packed for s in own)
            undo = old if evicts or converts else kept
        readable = kept

    writes = laid_out(segment, cell, new)
    fresh = not (is_whole and resumable(rule, readable, begin))
    reads = seen_from(rule, old if fresh else _in_order(readable + writes), begin)
    placement.placed.append(Placed(sequence, rows, begin, end, writes, reads, fresh))
    placement.changes[sequence] = Sequence(end, _in_order(kept + writes))
    placement.undo[sequence] = Sequence(begin, undo) if sequence in table.sequences else None


def _stackable(table: CellTable, blocks: list[_Block], rule: Rule) -> Iterator[Row]:
    """The rows that may be stacked: those with one token that go on where they have stopped."""
    if rule.sinks:
        return
    for sequence, rows, begin, end, _, _, during, new, is_whole in blocks:
        if not (len(rows) == 1 and during and new and is_whole and during[-1].end == begin):
            continue
        own = [span for span in during if table.owners(span.segment) == {sequence}]
        is_packed = table.packs(tuple(own), end)
        # What others share keeps its precision.
        if all((s.segment in table.packed) == is_packed for s in during if s not in own):
            yield Row(sequence, during, is_packed)


def _place_stack(
    table: CellTable, placement: Placement, stack: Stack, blocks: list[_Block], rule: Rule, spare: int
) -> None:
    """Adds the tokens of stacked rows to the plan: in their stack, in one that has grown, or in a new one."""
    segments, column = stack.segments, stack.column
    if segments and column == table.capacity[segments[0]]:
        is_whole = table.levels[segments[0]].stack == segments
        if is_whole and min(own[0].start for own in stack.owns) < DEAD:
            placement.capacity |= dict.fromkeys(segments, capacity_for(column + 1, spare))
        else:
            # Growing copies the stack anyway, so leave out what nobody uses.
            segments, column = (), max(map(count, stack.owns))
    is_moved = not segments
    if is_moved:
        evicts = any(count(block.kept) < count(block.old) for block in blocks)
        capacity = capacity_for(column + 1, spare, DEAD if evicts else 0)
        planned = sum(size for name, size in placement.capacity.items() if name not in table.capacity)
        if table.allocated + planned + len(blocks) * capacity > table.room:
            # Moving back and forth in the last free cells would copy all rows again and again.
            for block in blocks:
                _place_block(table, placement, block, rule, spare)
            return
        segments = tuple(placement.new_segment(table, capacity, stack.is_packed) for _ in blocks)
        placement.levels |= {name: Level(segments, height) for height, name in enumerate(segments)}
    for segment, block, prefix, own in zip(segments, blocks, stack.prefixes, stack.owns, strict=True):
        sequence, rows, begin, end, old, kept, during, _, _ = block
        undo = old
        if is_moved:
            start = column - count(own)
            placement.moves.append(Move(segment, own, start))
            during = prefix + laid_out(segment, start, own)
            converts = stack.is_packed and any(span.segment not in table.packed for span in own)
            undo = old if count(kept) < count(old) or converts else during
        writes = (Span(segment, column, begin, 1),)
        run = join(during + writes)
        first = kept[0].position if kept else begin
        placement.placed.append(
            Placed(sequence, rows, begin, end, writes, seen_from(rule, run, begin), False)
        )
        placement.changes[sequence] = Sequence(end, clip(run, first))
        placement.undo[sequence] = Sequence(begin, undo)


def _can_extend(table: CellTable, placement: Placement, block: _Block) -> bool:
    """Whether new cells can follow the last ones, in their segment as it is or grown."""
    if not block.old:
        return False
    last = block.old[-1]
    if block.end > table.pack_after and last.segment not in table.packed:
        return False
    claimed = any(write.segment == last.segment for placed in placement.placed for write in placed.writes)
    if claimed or last.end != block.begin or table.cells(last.segment)[-1][1] != last.stop:
        return False
    alone = {block.sequence}
    if last.stop + count(block.new) <= table.capacity[last.segment]:
        return True
    if last.segment in table.levels:
        # One row does not make its whole stack grow.
        return False
    if table.owners(last.segment) != alone:
        return True
    if any(s.segment != last.segment and table.owners(s.segment) == alone for s in block.kept):
        # Growing copies the segment anyway, so copy the spans in other segments with it.
        return False
    dead = last.stop - count(span for span in block.kept if span.segment == last.segment)
    tight = table.room - table.allocated < count(block.new)
    return dead < (1 if tight else DEAD)


def _in_order(spans: Spans) -> Spans:
    return join(tuple(sorted(spans, key=lambda span: span.position)))


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


def compact(table: CellTable, only: Collection[int] | None = None) -> Placement:
    """Plans to free all unused cells: copies each segment that has some to a new one without.

    With `only`, it copies these segments.
    """
    placement = Placement()
    for segment in table.owned() if only is None else only:
        cells = table.cells(segment)
        live = sum(high - low for low, high in cells)
        if live == table.capacity[segment] and only is None:
            continue
        target = placement.new_segment(table, live, segment in table.packed)
        placement.moves.append(Move(target, tuple(Span(segment, low, 0, high - low) for low, high in cells)))
        for owner in table.owners(segment):
            now = placement.changes.get(owner) or table[owner]
            spans = tuple(_relocated(span, segment, target, cells) for span in now.spans)
            placement.changes[owner] = Sequence(now.end, spans)
    return placement


def _relocated(span: Span, source: int, target: int, cells: Iterable[tuple[int, int]]) -> Span:
    """The new place of a span, after `cells` of `source` were copied to `target`."""
    if span.segment != source:
        return span
    before = sum(min(high, span.start) - low for low, high in cells if low < span.start)
    return span._replace(segment=target, start=before)

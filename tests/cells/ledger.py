"""Bookkeeping at work on arrays that are dicts: what lies in each cell, beside what should be held."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from mlx_kvcache.cells.edits import drop_tail, remove_range
from mlx_kvcache.cells.placement import Placed, Placement, allocated_after, compact, place
from mlx_kvcache.cells.spans import FOREVER, Sequence, Spans, clip
from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.cells.visibility import Rule, visible
from mlx_kvcache.errors import CacheFullError, NotSupportedError


class Token(NamedTuple):
    """What is stored: which token, and the position that its key knows."""

    name: int
    position: int


Held = dict[int, int]
"""Names by position."""


class Ledger:
    """A table, the cells' contents, and for each sequence its end and what is held of it."""

    def __init__(self, rule: Rule, rewind: int, room: int, pack_after: int = FOREVER) -> None:
        self.rule = rule
        self.rewind = rewind
        self.table = CellTable(room, pack_after)
        self.cells: dict[tuple[int, int], Token] = {}
        self.expected: dict[int, tuple[int, Held]] = {}
        self.names = 0

    def end(self, sequence: int) -> int:
        return self.expected.get(sequence, (0, {}))[0]

    def held(self, sequence: int) -> Held:
        return self.expected.get(sequence, (0, {}))[1]

    def tokens(self, spans: Spans) -> list[Token]:
        return [self.cells[span.segment, span.start + i] for span in spans for i in range(span.length)]

    def needed(self, first: int, held: Held) -> bool:
        """Whether all is held that a token at `first` or later sees of what is before."""
        seen = [p for p in range(first) if visible(self.rule, first, p)]
        return all(p in held for p in seen)

    def reachable(self, held: Held, first: int, end: int) -> Held:
        """What tokens from `first` on may see, up to the one at `end`."""
        queries = range(max(0, first), end + 1)
        return {p: n for p, n in held.items() if any(visible(self.rule, q, p) for q in queries if q >= p)}

    def forward(self, sizes: Mapping[int, int], is_undone: bool = False) -> str:
        """Sequences get longer by so many tokens. Returns what was refused, if it was."""
        table, begin, rows = self.table, 0, {}
        for sequence, n in sizes.items():
            rows[sequence] = tuple(range(begin, begin + n))
            begin += n
        before = dict(table.sequences)
        packed = {s for s in rows if table.packs(table[s].spans)}
        try:
            placement = place(table, rows, self.rule, self.rewind)
        except (NotSupportedError, CacheFullError) as error:
            assert dict(table.sequences) == before
            return type(error).__name__
        if placement.capacity and allocated_after(table, placement) > table.room:
            self.apply(compact(table))
            self.check()
            placement = place(table, rows, self.rule, self.rewind)
        assert allocated_after(table, placement) == _allocated(table, placement)
        if placement.capacity:
            # What a step evicts stays until it is over, so that it can be taken back.
            comes = sum(write.length for placed in placement.placed for write in placed.writes)
            assert allocated_after(table, placement) <= max(table.room, table.live + comes)
        self.apply(placement)
        old = dict(self.expected)
        new = {s: [self.names + i for i in rows[s]] for s in sizes}
        self.names += begin
        for placed in placement.placed:
            self.write(placed, new[placed.sequence], placed.sequence in packed)
        self.read(placement, old, new)
        for placed in placement.placed:
            whole = self.held(placed.sequence) | dict(enumerate(new[placed.sequence], placed.begin))
            kept = self.reachable(whole, placed.end - self.rewind, placed.end)
            self.expected[placed.sequence] = placed.end, kept
        if is_undone:
            table.assign(placement.undo)
            self.expected = old
        self.sweep(placement)
        return ""

    def write(self, placed: Placed, names: list[int], was_packed: bool) -> None:
        for segment, cell, position, size in placed.writes:
            # A branch of a packed sequence may begin a segment in float.
            if placed.end > self.table.pack_after or not was_packed:
                assert (segment in self.table.packed) == (placed.end > self.table.pack_after)
            assert cell + size <= self.table.capacity[segment]
            for i in range(size):
                token = Token(names[position - placed.begin + i], position + i)
                self.cells[segment, cell + i] = token

    def read(self, placement: Placement, old: dict[int, tuple[int, Held]], new: dict[int, list[int]]) -> None:
        """Each token finds all that it sees, once, at the right positions."""
        assert {placed.sequence for placed in placement.placed} == set(new)
        for placed in placement.placed:
            before = old.get(placed.sequence, (0, {}))[1]
            fresh = [Token(n, placed.begin + i) for i, n in enumerate(new[placed.sequence])]
            assert placed.end == placed.begin + len(fresh) and len(placed.rows) == len(fresh)
            found = self.tokens(placed.reads) + (fresh if placed.fresh else [])
            assert [token.position for token in found] == sorted({token.position for token in found})
            held = before | {token.position: token.name for token in fresh}
            for query in range(placed.begin, placed.end):
                seen = {t.position: t.name for t in found if visible(self.rule, query, t.position)}
                assert seen == {p: n for p, n in held.items() if visible(self.rule, query, p)}, placed

    def apply(self, placement: Placement) -> None:
        table = self.table
        for move in placement.moves:
            for cell, token in enumerate(self.tokens(move.pieces), move.cell):
                self.cells[move.segment, cell] = token._replace(position=token.position + move.offset)
        table.capacity.update(placement.capacity)
        table.packed.update(placement.packed)
        table.levels.update(placement.levels)
        table.assign(placement.changes)

    def sweep(self, placement: Placement) -> None:
        table = self.table
        orphans = [segment for segment in table.orphans if segment not in placement.in_use()]
        table.forget(orphans)
        self.cells = {place: token for place, token in self.cells.items() if place[0] not in orphans}

    def edit(self, placement: Placement) -> None:
        self.apply(placement)
        self.sweep(placement)

    def truncate(self, sequence: int, begin: int) -> None:
        if begin < self.end(sequence):
            self.edit(drop_tail(self.table, sequence, begin))
            left = {p: n for p, n in self.held(sequence).items() if p < begin}
            self.expect(sequence, begin, left)

    def remove(self, sequence: int, begin: int, end: int) -> str:
        """Take a range out of a sequence. Returns what was refused, if it was."""
        before, gap = dict(self.table.sequences), end - begin
        held = self.held(sequence)
        left = {p: n for p, n in held.items() if p < begin} | {
            p - gap: n for p, n in held.items() if p >= end
        }
        try:
            removal = remove_range(self.table, sequence, begin, end, self.rule)
        except (NotSupportedError, CacheFullError) as error:
            assert dict(self.table.sequences) == before
            return type(error).__name__
        assert self.needed(self.end(sequence) - gap, left)
        self.edit(removal)
        self.expect(sequence, self.end(sequence) - gap, left)
        return ""

    def copy(self, source: int, target: int, length: int) -> None:
        end = min(length, self.end(source))
        new = Sequence(end, clip(self.table[source].spans, 0, end)) if end else None
        self.edit(Placement(changes={target: new}))
        self.expect(target, end, {p: n for p, n in self.held(source).items() if p < end})

    def expect(self, sequence: int, end: int, held: Held) -> None:
        self.expected.pop(sequence, None)
        if end:
            self.expected[sequence] = end, held

    def check(self) -> None:
        """The table is sound, and holds what it should, where it says."""
        table = self.table
        table.check()
        assert set(table.sequences) == set(self.expected)
        for sequence, (end, held) in self.expected.items():
            assert table[sequence].end == end
            spans = table[sequence].spans
            assert [(t.position, t.name) for t in self.tokens(spans)] == sorted(held.items()), sequence
        assert table.live == len({cell for s in self.expected for cell in _places(table[s].spans)})


def _places(spans: Spans) -> list[tuple[int, int]]:
    return [(span.segment, span.start + i) for span in spans for i in range(span.length)]


def _allocated(table: CellTable, placement: Placement) -> int:
    """Cells of all segments that are owned when the changes have been made."""
    after = {**table.sequences, **placement.changes}
    owned = {span.segment for new in after.values() if new for span in new.spans}
    return sum((table.capacity | placement.capacity)[segment] for segment in owned)


def random_steps(ledger: Ledger, random: Random, steps: int, sequences: int = 3) -> None:
    """Forwards, removals, copies and rewinds, each checked."""
    for _ in range(steps):
        action = random.choices("fffffrrtc", k=1)[0]
        sequence = random.randrange(sequences)
        end = ledger.end(sequence)
        if action == "f":
            chosen = random.sample(range(sequences), random.choice((1, 1, 1, 2, sequences)))
            most = random.choice((1, 1, 3, 9))
            ledger.forward({s: random.randint(1, most) for s in chosen}, is_undone=random.random() < 0.2)
        elif action == "r" and end:
            begin = random.randrange(end)
            ledger.remove(sequence, begin, random.randint(begin, end))
        elif action == "t":
            ledger.truncate(sequence, random.randint(0, end))
        elif action == "c":
            target = (sequence + random.randint(1, sequences - 1)) % sequences
            ledger.copy(sequence, target, random.randint(0, end + 1))
        ledger.check()

"""Who owns which cell."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set

from .spans import EMPTY, FOREVER, Sequence, Spans, union

Changes = Mapping[int, Sequence | None]
"""New state of some sequences; None forgets one."""


class CellTable:
    """Sequences, and the cells of each segment that they hold.

    A segment is a row of cells that is stored together. It is `owned` by the sequences
    with spans in it; one that nobody owns is an orphan until it is swept. A cell is live
    if any sequence holds it, and counts once however many do.

    Args:
        room: how many cells may be live.
        pack_after: a sequence that is longer than this goes on in segments that are packed.
    """

    def __init__(self, room: int, pack_after: int = FOREVER) -> None:
        self.room = room
        self.pack_after = pack_after
        self.sequences: dict[int, Sequence] = {}
        self.capacity: dict[int, int] = {}
        self.packed: set[int] = set()
        """Segments that are stored in fewer bits."""
        self.live = 0
        self._owners: dict[int, set[int]] = {}
        self._live: dict[int, int] = {}
        self.orphans: set[int] = set()
        """Segments that nobody owns and that have not been swept."""
        self._segments = 0

    def __getitem__(self, sequence: int) -> Sequence:
        return self.sequences.get(sequence, EMPTY)

    @property
    def allocated(self) -> int:
        """Cells of all owned segments, the unused ones included."""
        return sum(self.capacity[segment] for segment in self._owners)

    def packs(self, spans: Spans, length: int = 0) -> bool:
        """Whether a new segment is packed, for these spans of a sequence of that length."""
        return length > self.pack_after or any(span.segment in self.packed for span in spans)

    def new_segment(self) -> int:
        """A name that no segment has had."""
        self._segments += 1
        return self._segments

    def owners(self, segment: int) -> Set[int]:
        return self._owners.get(segment, frozenset())

    def owned(self) -> tuple[int, ...]:
        """All segments with an owner."""
        return tuple(self._owners)

    def cells(self, segment: int, but: int | None = None) -> list[tuple[int, int]]:
        """The live cells of a segment as disjoint intervals; `but` is a sequence to leave out."""
        return union(self._intervals(segment, {} if but is None else {but: None}))

    def live_after(self, changes: Changes) -> int:
        """How many cells would be live."""
        total = self.live
        for segment in self._touched(changes):
            held = union(self._intervals(segment, changes))
            total += sum(high - low for low, high in held) - self._live.get(segment, 0)
        return total

    def assign(self, changes: Changes) -> None:
        """Make the changes, or none where an exception comes between. Their segments need a capacity."""
        before = {sequence: self.sequences.get(sequence) for sequence in changes}
        try:
            if not self._stretch(changes):
                self._replace(changes)
        except BaseException:
            self.restore(before)
            raise

    def restore(self, sequences: Changes, capacity: Mapping[int, int | None] | None = None) -> None:
        """Make these true again, after whatever happened to what follows from them; None forgets one."""
        for sequence, old in sequences.items():
            self.sequences.pop(sequence, None)
            if old is not None:
                self.sequences[sequence] = old
        for segment, cells in (capacity or {}).items():
            self.capacity.pop(segment, None)
            if cells is not None:
                self.capacity[segment] = cells
        self.packed &= self.capacity.keys()
        self._count()

    def _stretch(self, changes: Changes) -> bool:
        """Do what decoding does at every step: one sequence, alone in its segment, gets longer."""
        if len(changes) != 1:
            return False
        [(sequence, new)] = changes.items()
        old = self[sequence].spans
        if new is None or not len(old) == len(new.spans) == 1 or old[0].segment != new.spans[0].segment:
            return False
        segment, more = old[0].segment, new.spans[0].length - old[0].length
        if len(self._owners[segment]) > 1:
            return False
        self.sequences[sequence] = new
        self._live[segment] += more
        self.live += more
        return True

    def _replace(self, changes: Changes) -> None:
        touched = self._touched(changes)
        for sequence, new in changes.items():
            for span in self[sequence].spans:
                self._owners.get(span.segment, set()).discard(sequence)
            if new is None:
                self.sequences.pop(sequence, None)
                continue
            self.sequences[sequence] = new
            for span in new.spans:
                self._owners.setdefault(span.segment, set()).add(sequence)
        for segment in touched:
            self._recount(segment)

    def forget(self, orphans: Collection[int]) -> None:
        """Forget segments that nobody owns."""
        try:
            for segment in orphans:
                self.packed.discard(segment)
                self.capacity.pop(segment, None)
            self.orphans.difference_update(orphans)
        except BaseException:
            self.orphans.intersection_update(self.capacity)
            raise

    def check(self) -> None:
        """Assert the invariants.

        Each sequence's spans rise in position without overlap, end at or below its end and lie
        inside their segments; live cells are counted right and fit the room; each segment has
        an owner or is an orphan.
        """
        held: dict[int, list[tuple[int, int]]] = {}
        for sequence, (end, spans) in self.sequences.items():
            position = 0
            for span in spans:
                assert span.length > 0 and span.position >= position, (sequence, spans)
                assert span.start >= 0 and span.stop <= self.capacity[span.segment], (sequence, spans)
                assert sequence in self._owners[span.segment], (sequence, spans)
                held.setdefault(span.segment, []).append((span.start, span.stop))
                position = span.end
            assert position <= end, (sequence, end, spans)
        counts = {s: sum(b - a for a, b in union(cells)) for s, cells in held.items()}
        assert counts == self._live, (counts, self._live)
        assert self.live == sum(counts.values()) <= self.room, (self.live, counts, self.room)
        assert set(self._owners) == set(held) and not set(held) & self.orphans
        assert set(self.capacity) == set(held) | self.orphans
        assert self.packed <= set(self.capacity)

    def _intervals(self, segment: int, changes: Changes) -> Iterator[tuple[int, int]]:
        def of(spans: Spans) -> Iterator[tuple[int, int]]:
            return ((span.start, span.stop) for span in spans if span.segment == segment)

        for sequence in self._owners.get(segment, ()):
            if sequence not in changes:
                yield from of(self.sequences[sequence].spans)
        for new in changes.values():
            if new is not None:
                yield from of(new.spans)

    def _touched(self, changes: Changes) -> set[int]:
        """Segments whose live cells may change: of many forks, not those that all go on sharing."""
        return {
            span.segment
            for sequence, new in changes.items()
            for span in set(self[sequence].spans).symmetric_difference(new.spans if new else ())
        }

    def _count(self) -> None:
        """Find out anew who owns what."""
        self._owners.clear()
        for sequence, (_, spans) in self.sequences.items():
            for span in spans:
                self._owners.setdefault(span.segment, set()).add(sequence)
        self._live.clear()
        self.live = 0
        self.orphans.clear()
        self.orphans.update(self.capacity.keys() - self._owners.keys())
        for segment in self._owners:
            self._recount(segment)

    def _recount(self, segment: int) -> None:
        held = sum(high - low for low, high in union(self._intervals(segment, {})))
        self.live += held - self._live.pop(segment, 0)
        if held:
            self._live[segment] = held
            self.orphans.discard(segment)
        else:
            self._owners.pop(segment, None)
            self.orphans.add(segment)

"""The table of cells: the spans of each sequence, and the segments that hold them.

Plans elsewhere are computed from the table without changing it; `CellTable.assign` applies them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from typing import NamedTuple

from .spans import EMPTY, FOREVER, Sequence, Spans, union

Changes = Mapping[int, Sequence | None]
"""New states of some sequences. None deletes a sequence."""


class Level(NamedTuple):
    """The place of a segment in a stack: the stack's segments from the lowest up, and its height among them.

    The buffers of a stack are one array, so that one write or one product serves all its levels.
    """

    stack: tuple[int, ...]
    height: int


class CellTable:
    """Sequences, and the cells that they hold in each segment.

    A segment is a row of cells that is stored together. Its owners are the sequences with spans in it. A
    segment without owners is an orphan until `forget` removes it. A cell is live if at least one sequence
    holds it, and counts once even if several do.

    Args:
        room: the largest number of live cells.
        pack_after: a sequence longer than this continues in packed (quantized) segments.
    """

    def __init__(self, room: int, pack_after: int = FOREVER) -> None:
        self.room = room
        self.pack_after = pack_after
        self.sequences: dict[int, Sequence] = {}
        self.capacity: dict[int, int] = {}
        self.packed: set[int] = set()
        """Segments that are quantized."""
        self.levels: dict[int, Level] = {}
        """The places of the segments that are stacked."""
        self.live = 0
        self._owners: dict[int, set[int]] = {}
        self._live: dict[int, int] = {}
        self.orphans: set[int] = set()
        """Segments without an owner that are not forgotten yet."""
        self._segments = 0

    def __getitem__(self, sequence: int) -> Sequence:
        return self.sequences.get(sequence, EMPTY)

    @property
    def allocated(self) -> int:
        """The number of cells in all owned segments, including unused ones."""
        return sum(self.capacity[segment] for segment in self._owners)

    def packs(self, spans: Spans, length: int = 0) -> bool:
        """Whether a new segment for these spans of a sequence of this length is packed."""
        return length > self.pack_after or any(span.segment in self.packed for span in spans)

    def new_segment(self) -> int:
        """Returns a number that no segment has had."""
        self._segments += 1
        return self._segments

    def thin(self) -> set[int]:
        """The segments in stacks of which more than half is free. They keep all its memory."""
        used = [segment for segment in self.levels if segment in self._owners]
        return {
            s
            for s in used
            if 2 * sum(t in self._owners for t in self.levels[s].stack) < len(self.levels[s].stack)
        }

    def owners(self, segment: int) -> Set[int]:
        return self._owners.get(segment, frozenset())

    def owned(self) -> tuple[int, ...]:
        """The segments with an owner."""
        return tuple(self._owners)

    def cells(self, segment: int, but: int | None = None) -> list[tuple[int, int]]:
        """Returns the live cells of a segment as disjoint intervals, without those of sequence `but`."""
        return union(self._intervals(segment, {} if but is None else {but: None}))

    def live_after(self, changes: Changes) -> int:
        """Returns the number of live cells after these changes."""
        total = self.live
        for segment in self._touched(changes):
            held = union(self._intervals(segment, changes))
            total += sum(high - low for low, high in held) - self._live.get(segment, 0)
        return total

    def assign(self, changes: Changes, is_growth: bool = False) -> None:
        """Applies all changes, or none if an exception interrupts. Their segments need a capacity.

        Args:
            is_growth: the new cells follow those of their sequences, and no other sequence has them.
        """
        before = {sequence: self.sequences.get(sequence) for sequence in changes}
        try:
            if not self._extend(changes, is_growth):
                self._replace(changes)
        except BaseException:
            self.restore(before)
            raise

    def restore(self, sequences: Changes) -> None:
        """Restores earlier states of sequences, even after an interrupted `assign`."""
        for sequence, old in sequences.items():
            self.sequences.pop(sequence, None)
            if old is not None:
                self.sequences[sequence] = old
        self.recount()

    def recount(self) -> None:
        """Recomputes all else from `sequences` and `capacity`."""
        self.packed &= self.capacity.keys()
        for segment in self.levels.keys() - self.capacity.keys():
            del self.levels[segment]
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

    def _extend(self, changes: Changes, is_growth: bool) -> bool:
        """Applies the change of decoded tokens, without a recount: sequences grow in segments of their own.

        In segments that others share it needs `is_growth`, and all cells of before must stay.

        Returns False, and does nothing, in other cases.
        """
        grown = []
        for sequence, new in changes.items():
            old = self.sequences.get(sequence, EMPTY).spans
            if new is None or not old or len(old) != len(new.spans):
                return False
            last, now = old[-1], new.spans[-1]
            if last.segment != now.segment:
                return False
            if len(self._owners[now.segment]) > 1 and not (is_growth and last.start == now.start):
                return False
            if len(old) > 1:
                if last.start != now.start or old[:-1] != new.spans[:-1]:
                    return False
                for span in old[:-1]:
                    if span.segment == now.segment:
                        return False
            grown.append((now.segment, now.length - last.length))
        self.sequences.update(changes)  # type: ignore[arg-type]
        for segment, more in grown:
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
        """Removes segments without an owner."""
        try:
            for segment in orphans:
                self.packed.discard(segment)
                self.levels.pop(segment, None)
                self.capacity.pop(segment, None)
            self.orphans.difference_update(orphans)
        except BaseException:
            self.orphans.intersection_update(self.capacity)
            raise

    def check(self) -> None:
        """Asserts the invariants.

        The spans of each sequence rise in position without overlap, stop at or below its end, and lie
        inside their segments. The counts of live cells are right and fit the room. Each segment
        either has an owner or is an orphan.
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
        assert set(self.levels) <= set(self.capacity)
        for segment, (stack, level) in self.levels.items():
            assert stack[level] == segment, (segment, stack, level)
            alike = [s for s in stack if s in self.levels]
            assert len({(self.capacity[s], s in self.packed) for s in alike}) == 1, (alike, self.capacity)

    def _intervals(self, segment: int, changes: Changes) -> Iterator[tuple[int, int]]:
        held = [self.sequences[name] for name in self.owners(segment) if name not in changes]
        for _, spans in held + [new for new in changes.values() if new]:
            yield from ((span.start, span.stop) for span in spans if span.segment == segment)

    def _touched(self, changes: Changes) -> set[int]:
        """The segments with changed spans. Leaves out a prefix that many forks keep sharing."""
        return {
            span.segment
            for sequence, new in changes.items()
            for span in set(self[sequence].spans).symmetric_difference(new.spans if new else ())
        }

    def _recount(self, segment: int) -> None:
        held = sum(high - low for low, high in union(self._intervals(segment, {})))
        self.live += held - self._live.pop(segment, 0)
        if held:
            self._live[segment] = held
            self.orphans.discard(segment)
        else:
            self._owners.pop(segment, None)
            self.orphans.add(segment)

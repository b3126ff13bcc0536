"""The reference cache of the tests: a dict of cells for each sequence, with no arrays.

It applies the visibility rule token by token, so it is slow and simple. `tests/caches/test_machine.py`
compares the package's caches with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_kvcache import Batch, CacheFullError, NotSupportedError
from mlx_kvcache.cells.visibility import Rule, visible


@dataclass(eq=False)
class Cell:
    """One token's key and value. Sequences that share a token share this object."""

    key: int
    value: int


@dataclass
class Stream:
    end: int = 0
    held: dict[int, Cell] = field(default_factory=dict)


class Oracle:
    """Computes the correct results of a cache with this visibility rule.

    Args:
        rule: the visibility rule.
        rewind: the number of newest tokens that can always be removed.
        room: the number of cells.
        shifts: whether the cache has a shift hook.
    """

    def __init__(self, rule: Rule, rewind: int, room: int, shifts: bool) -> None:
        self.rule = rule
        self.rewind = rewind
        self.room = room
        self.shifts = shifts
        self.streams: dict[int, Stream] = {}

    def end(self, sequence: int) -> int:
        return self.streams[sequence].end if sequence in self.streams else 0

    def live(self) -> int:
        return len({id(cell) for stream in self.streams.values() for cell in stream.held.values()})

    def can_resume(self, sequence: int, position: int) -> bool:
        return position <= self.end(sequence) and self._resumable(sequence, position)

    def sees(self, query: int, key: int, later: bool = False) -> bool:
        return bool(visible(self.rule, query, key, later))

    def forward(self, batch: Batch, values: list[int], later: set[int]) -> list[set[tuple[int, int]]]:
        """Add a batch, and return the (key, value) pairs that each of its tokens sees."""
        newcomers: dict[int, dict[int, Cell]] = {}
        for position, sequence, value in zip(batch.positions, batch.sequences, values, strict=True):
            newcomers.setdefault(sequence, {})[position] = Cell(position, value)
        for sequence in newcomers:
            if not self._resumable(sequence, self.end(sequence)):
                raise NotSupportedError("a token would see something that is no longer held")
        during, after = {}, {}
        for sequence, new in newcomers.items():
            stream = self.streams.get(sequence, Stream())
            end = max(new) + 1
            back = max(0, end - self.rewind)
            every = stream.held | new
            after[sequence] = {p: cell for p, cell in every.items() if self._reachable(back, end, p)}
            seen = {p for p in stream.held if any(self.sees(q, p) for q in new)}
            during[sequence] = {p: c for p, c in every.items() if p in after[sequence] or p in seen}
        self._check_room(during)
        result = []
        for index, (position, sequence) in enumerate(zip(batch.positions, batch.sequences, strict=True)):
            everything = newcomers[sequence] | (
                self.streams[sequence].held if sequence in self.streams else {}
            )
            visible_cells = (c for p, c in everything.items() if self.sees(position, p, index in later))
            result.append({(cell.key, cell.value) for cell in visible_cells})
        for sequence, new in newcomers.items():
            self.streams[sequence] = Stream(max(new) + 1, after[sequence])
        return result

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        source = self.streams.get(src, Stream())
        end = min(length, source.end)
        held = {p: cell for p, cell in source.held.items() if p < end}
        self._set(dst, Stream(end, held))

    def restore(self, src: int, dst: int) -> None:
        """Replace `dst` by a copy of `src` in cells of its own."""
        source = self.streams.get(src, Stream())
        held = {p: Cell(cell.key, cell.value) for p, cell in source.held.items()}
        others = {id(c) for s, t in self.streams.items() if s != dst for c in t.held.values()}
        if len(others) + len(held) > self.room:
            raise CacheFullError(len(held), 0, self.room)
        self._set(dst, Stream(source.end, held))

    def remove(self, sequence: int, begin: int, end: int | None) -> None:
        stream = self.streams.get(sequence, Stream())
        stop = stream.end if end is None else min(end, stream.end)
        if begin >= stop:
            return
        gap = stop - begin
        held = {p: cell for p, cell in stream.held.items() if p < begin}
        movers = {p: cell for p, cell in stream.held.items() if p >= stop}
        after = Stream(stream.end - gap, dict(held))
        others = {id(c) for s, t in self.streams.items() if s != sequence for c in t.held.values()}
        shared = {p for p, cell in movers.items() if id(cell) in others}
        for p, cell in movers.items():
            after.held[p - gap] = Cell(cell.key - gap, cell.value)
        if end is not None:
            needed = [p for p in range(after.end) if self._reachable(after.end, after.end, p)]
            if any(p not in after.held for p in needed) or (movers and not self.shifts):
                raise NotSupportedError("cannot remove this range")
            distinct = len(others | {id(cell) for cell in held.values()}) + len(movers)
            if distinct > self.room:
                raise CacheFullError(len(shared), 0, self.room)
        self._set(sequence, after)

    def graft(self, source: int, begin: int, end: int, sequence: int) -> None:
        given, old = self.streams.get(source, Stream()), self.streams.get(sequence, Stream())
        end = min(end, given.end)
        if begin >= end:
            return
        offset = old.end - begin
        run = {p: cell for p, cell in given.held.items() if begin <= p < end}
        if offset:
            run = {p: Cell(cell.key + offset, cell.value) for p, cell in run.items()}
        after = Stream(end + offset, old.held | {p + offset: cell for p, cell in run.items()})
        needed = [p for p in range(after.end) if self._reachable(after.end, after.end, p)]
        if any(p not in after.held for p in needed) or (offset and run and not self.shifts):
            raise NotSupportedError("cannot append this range")
        held = [stream.held.values() for stream in self.streams.values()]
        if len({id(cell) for cells in [*held, run.values()] for cell in cells}) > self.room:
            raise CacheFullError(len(run), 0, self.room)
        self._set(sequence, after)

    def _set(self, sequence: int, stream: Stream) -> None:
        self.streams.pop(sequence, None)
        if stream.end:
            self.streams[sequence] = stream

    def _reachable(self, first: int, end: int, key: int) -> bool:
        """Whether any token at positions `first` to `end`, both included, sees `key`."""
        return key < end and any(self.sees(q, key) for q in range(max(first, key), end + 1))

    def _resumable(self, sequence: int, position: int) -> bool:
        held = self.streams[sequence].held if sequence in self.streams else {}
        return all(p in held for p in range(position) if self.sees(position, p))

    def _check_room(self, during: dict[int, dict[int, Cell]]) -> None:
        cells = {id(c) for s, t in self.streams.items() if s not in during for c in t.held.values()}
        cells |= {id(c) for held in during.values() for c in held.values()}
        if len(cells) > self.room:
            raise CacheFullError(len(cells), 0, self.room)

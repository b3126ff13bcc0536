"""Snapshots: copying one sequence's keys and values from a cache into another.

Saving and loading files and changing the quantization of a sequence use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import NamedTuple

import mlx.core as mx

from ..cells.placement import Placement, allocated_after, capacity_for, compact
from ..cells.spans import Sequence, Span, Spans, count, laid_out
from ..errors import CacheFullError
from ..storage.buffers import Form, Lanes, Staged, arrays_in, cells_in
from ..storage.codec import joined
from .plan import HoldsCells, Journal, Plan


class Run(NamedTuple):
    """Neighboring positions from `begin` on, and each layer's keys and values at them."""

    begin: int
    length: int
    layers: Mapping[int, Lanes]


class Snapshot(NamedTuple):
    """The contents of one sequence of a `PositionalCache`.

    Its arrays are views of buffers, so writing to a buffer copies it while the snapshot exists.

    Attributes:
        end: the length of the sequence in tokens.
        runs: the held tokens, by rising position.
        forms: the form of each layer's arrays.
    """

    end: int
    runs: tuple[Run, ...]
    forms: Mapping[int, Form]


def snapshot_of(cache: HoldsCells, sequence: int) -> Snapshot:
    """Return a snapshot of a sequence; that of an unknown sequence is empty."""
    end, spans = cache._table[sequence]
    forms = {layer: buffers.form for layer, buffers in cache._store.layers.items()}
    return Snapshot(end, tuple(_runs(cache, spans)), forms if spans else {})


def _runs(cache: HoldsCells, spans: Spans) -> Iterator[Run]:
    """Yield the runs of neighboring positions that are stored in the same way."""
    for own in _neighbors(spans, cache._table.packed):
        cells, is_packed = cells_in(tuple(own)), own[0].segment in cache._table.packed
        layers = {}
        for layer, buffers in cache._store.layers.items():
            # Cells that were never written are read as zeros in float.
            stored = (buffers.form.stored(lanes, is_packed) for lanes in buffers.lanes(cells))
            keys, values = zip(*stored, strict=True)
            layers[layer] = joined(keys), joined(values)
        yield Run(own[0].position, count(own), layers)


def _neighbors(spans: Spans, packed: Set[int]) -> list[list[Span]]:
    """Group spans whose positions are neighbors and whose segments are both packed or both not."""
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1][-1] if groups else None
        if last and last.end == span.position and (last.segment in packed) == (span.segment in packed):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


class RestorePlan(Plan):
    """Replaces a sequence by a snapshot, which is copied to a new segment.

    Raises:
        CacheFullError: there is no room.
        ValueError: a layer's number or size of heads differs from the cache's.
    """

    def __init__(self, cache: HoldsCells, sequence: int, snapshot: Snapshot) -> None:
        table = cache._table
        self._cache = cache
        segment = table.new_segment()
        source = tuple(Span(0, 0, run.begin, run.length) for run in snapshot.runs)
        new = Sequence(snapshot.end, laid_out(segment, 0, source))
        size = count(source)
        changes = {sequence: new if new.end else None}
        if table.live_after(changes) > table.room:
            raise CacheFullError(size, table.room - table.live_after({sequence: None}), table.room)
        self._placement = Placement(changes=dict(changes))
        self._forms = {layer: cache._store.accepted(layer, form) for layer, form in snapshot.forms.items()}
        self._staged: Staged = {}
        self._journal: Journal | None = None
        if not size:
            return
        is_packed = table.packs((), snapshot.end)
        capacity = capacity_for(size, max(0, table.room - table.allocated - size))
        self._placement.capacity[segment] = capacity
        self._placement.packed.update({segment} if is_packed else ())
        for layer, form in self._forms.items():
            parts = [run.layers[layer] for run in snapshot.runs]
            self._staged[layer] = {segment: form.pair(parts, capacity, is_packed)}

    def make(self) -> None:
        cache = self._cache
        self._journal = journal = Journal(cache)
        for layer, form in self._forms.items():
            journal.open(layer, form)
        cache._step = None
        if allocated_after(cache._table, self._placement) > cache._table.room:
            journal.apply(compact(cache._table), {})
        journal.apply(self._placement, self._staged)

    def unmake(self) -> None:
        if self._journal:
            self._journal.roll_back()

    def settle(self) -> None:
        self._cache._sweep()

    def arrays(self) -> Iterable[mx.array]:
        return arrays_in(self._staged)

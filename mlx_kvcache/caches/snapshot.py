"""Snapshots: copying one sequence's keys and values from a cache into another.

Saving and loading files and changing the quantization of a sequence use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..cells.placement import Placement, capacity_for
from ..cells.spans import Sequence, Span, Spans, clip, count, laid_out
from ..cells.table import CellTable
from ..errors import CacheFullError
from ..storage.buffers import Form, Lanes, Staged, Store
from ..storage.codec import index_of, joined


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


def part_of(snapshot: Snapshot, begin: int, end: int) -> tuple[Run, ...]:
    """Return the runs of a snapshot at positions [begin, end), as views."""
    runs = []
    for run in snapshot.runs:
        low, high = max(begin, run.begin), min(end, run.begin + run.length)
        if low < high:
            index = index_of(low - run.begin, high - run.begin)
            layers = {
                layer: (keys.at(index), values.at(index)) for layer, (keys, values) in run.layers.items()
            }
            runs.append(Run(low, high - low, layers))
    return tuple(runs)


def snapshot_of(table: CellTable, store: Store, sequence: int) -> Snapshot:
    """Return a snapshot of a sequence; that of an unknown sequence is empty."""
    end, spans = table[sequence]
    forms = {layer: buffers.form for layer, buffers in store.layers.items()}
    return Snapshot(end, tuple(_runs(table, store, spans)), forms if spans else {})


def _runs(table: CellTable, store: Store, spans: Spans) -> Iterator[Run]:
    """Yield the runs of neighboring positions that are stored in the same way.

    The newest tokens are a run of their own, in float, if all quantized layers hold them so, too.
    """
    border = _border(store, spans)
    older, newest = clip(spans, 0, border), clip(spans, border)
    groups: list[list[Span]] = []
    for span in older:
        last = groups[-1][-1] if groups else None
        if last and last.end == span.position and table.packs((last,)) == table.packs((span,)):
            groups[-1].append(span)
        else:
            groups.append([span])
    for own in groups:
        layers = {}
        for layer, buffers in store.layers.items():
            # Cells that were never written are read as zeros in float.
            stored = [buffers.form.stored(lanes, table.packs((own[0],))) for lanes in buffers.lanes(own)]
            keys, values = zip(*stored, strict=True)
            layers[layer] = joined(keys), joined(values)
        yield Run(own[0].position, count(own), layers)
    if newest:
        layers = {layer: buffers.newest(newest)[0] for layer, buffers in store.layers.items()}
        yield Run(border, count(newest), layers)


def _border(store: Store, spans: Spans) -> int:
    """The first position of the tokens that all quantized layers hold in float, too, or the end."""
    if not spans:
        return 0
    segment, start, position, length = spans[-1]
    borders, end = [], start + length
    for buffers in store.layers.values():
        if buffers.form.recent:
            pair = buffers.pairs.get(segment)
            border = pair.border(buffers.index(segment, start, end)) if pair else end
            borders.append(max(border, end - buffers.form.recent))
    return position - start + max(borders, default=end)


def restore(
    table: CellTable, store: Store, sequence: int, snapshot: Snapshot
) -> tuple[Placement, Staged, dict[int, Form]]:
    """Plan to replace a sequence by a snapshot, which is copied to a new segment.

    Returns:
        The change of the table, the new arrays, and the forms in which the layers store them.

    Raises:
        CacheFullError: there is no room.
        ValueError: a layer's number or size of heads differs from the cache's.
    """
    placement, staged = Placement(), Staged()
    size, spans = sum(run.length for run in snapshot.runs), Spans()
    is_packed = table.packs((), snapshot.end)
    if size:
        capacity = capacity_for(size, max(0, table.room - table.allocated - size), 1)
        segment = placement.new_segment(table, capacity, is_packed)
        spans = laid_out(segment, 0, tuple(Span(segment, 0, run.begin, run.length) for run in snapshot.runs))
    placement.changes[sequence] = Sequence(snapshot.end, spans) if snapshot.end else None
    if table.live_after(placement.changes) > table.room:
        raise CacheFullError(size, table.room - table.live_after({sequence: None}), table.room)
    forms = {layer: store.accepted(layer, form) for layer, form in snapshot.forms.items()}
    for layer, form in forms.items() if size else ():
        parts = [run.layers[layer] for run in snapshot.runs]
        staged[layer] = {segment: form.pair(parts, capacity, is_packed)}
    return placement, staged, forms

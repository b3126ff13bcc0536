"""What a change replaces, noted before it does, so that it can be put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arrays.pairs import AnyPair, Form
from ..arrays.store import Staged, cells_in
from ..cells.placement import Placement
from ..cells.spans import Sequence

if TYPE_CHECKING:
    from .positional import PositionalCache


class Journal:
    """Of one cache of K and V by position. Its size is that of the change, not of the cache."""

    __slots__ = ("_cache", "_capacity", "_opened", "_pairs", "_sequences", "_step")

    def __init__(self, cache: PositionalCache) -> None:
        self._cache = cache
        self._step = cache._step
        self._sequences: dict[int, Sequence | None] = {}
        self._capacity: dict[int, int | None] = {}
        self._pairs: dict[tuple[int, int], AnyPair | None] = {}
        self._opened: list[int] = []

    def open(self, layer: int, form: Form) -> None:
        """Begin a layer, if there is none."""
        if layer not in self._cache._store.layers:
            self._opened.append(layer)
            self._cache._store.open(layer, form)

    def apply(self, placement: Placement, staged: Staged) -> None:
        """Make what was planned true: arrays first, and then who owns which cell.

        Segments without an owner stay until they are swept, because they may have to come back.
        """
        table, store = self._cache._table, self._cache._store
        for move in placement.moves:
            is_packed = move.segment in placement.packed
            capacity = placement.capacity[move.segment]
            store.stage_move(staged, move.segment, cells_in(move.pieces), capacity, is_packed)
        self._note(placement, staged)
        if placement.capacity:
            table.capacity.update(placement.capacity)
            table.packed.update(placement.packed)
        if staged:
            store.adopt(staged)
        table.assign(placement.changes)

    def roll_back(self) -> None:
        """Put everything back that has been noted."""
        store = self._cache._store
        for (layer, segment), pair in self._pairs.items():
            if pair is None:
                store.layers[layer].pairs.pop(segment, None)
            else:
                store.layers[layer].pairs[segment] = pair
        for layer in self._opened:
            store.layers.pop(layer, None)
        self._cache._table.restore(self._sequences, self._capacity)
        self._cache._step = self._step

    def _note(self, placement: Placement, staged: Staged) -> None:
        table, layers = self._cache._table, self._cache._store.layers
        for sequence in placement.changes:
            self._sequences.setdefault(sequence, table.sequences.get(sequence))
        for segment in placement.capacity:
            self._capacity.setdefault(segment, table.capacity.get(segment))
        for layer, pairs in staged.items():
            for segment in pairs:
                self._pairs.setdefault((layer, segment), layers[layer].pairs.get(segment))

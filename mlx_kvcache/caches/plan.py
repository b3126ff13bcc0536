"""Changes that are computed whole before any of them is made.

What a change replaces, noted before it does, so that it can be put back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..cells.placement import Placement
from ..cells.spans import Sequence as Held
from ..cells.table import CellTable
from ..storage.buffers import AnyPair, Form, Staged, Store, cells_in


class Plan(ABC):
    """A change that has been computed whole, so that it cannot fail, but be interrupted.

    Whoever joins plans calls `make` of all, and then `settle` of all, or `unmake` where
    something came between.
    """

    made = 0
    """How often `again` has made the change, or anything that tells one number from another."""

    def commit(self) -> None:
        """Make the change, or nothing where an exception comes from outside, at any point."""
        try:
            self.make()
        except BaseException:
            self.unmake()
            raise
        self.settle()

    @abstractmethod
    def make(self) -> None:
        """Make the change."""

    @abstractmethod
    def unmake(self) -> None:
        """Put everything back, however far `make` came."""

    def settle(self) -> None:  # noqa: B027
        """Let go of what only `unmake` needs, if there is any. Changes nothing that anybody sees."""

    def undo(self) -> None:
        """Take a step that was made out again; nothing where it was not. Only plans of steps can."""
        raise NotImplementedError

    def arrays(self) -> Iterable[mx.array]:
        """New arrays of the change, which can be computed before it is made."""
        return ()

    @property
    def is_under_way(self) -> bool:
        """Whether this is a step that was made and is neither over nor taken out again."""
        return False

    def finish(self) -> None:  # noqa: B027
        """End a step that is under way: it can be read, and nothing more can be put.

        Raises:
            CacheError: a layer lacks keys and values; whoever calls this then calls `undo`.
        """

    def again(self) -> bool:
        """Commit as many tokens more, where that is as simple as before; else False, and nothing."""
        return False


class JointPlan(Plan):
    """Several plans as one."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    @property
    def made(self) -> int:  # type: ignore[override]
        return sum(plan.made for plan in self._plans)

    def make(self) -> None:
        for plan in self._plans:
            plan.make()

    def unmake(self) -> None:
        for plan in reversed(self._plans):
            plan.unmake()

    def settle(self) -> None:
        for plan in self._plans:
            plan.settle()

    def arrays(self) -> Iterator[mx.array]:
        for plan in self._plans:
            yield from plan.arrays()

    def undo(self) -> None:
        for plan in reversed(self._plans):
            plan.undo()

    @property
    def is_under_way(self) -> bool:
        return any(plan.is_under_way for plan in self._plans)

    def finish(self) -> None:
        for plan in self._plans:
            plan.finish()

    def again(self) -> bool:
        before = [plan.made for plan in self._plans]
        is_whole = False
        try:
            is_whole = bool(self._plans) and all(plan.again() for plan in self._plans)
        finally:
            if not is_whole:
                for plan, made in zip(self._plans, before, strict=True):
                    if plan.made != made:
                        plan.undo()
        return is_whole


class HoldsCells(Protocol):
    """What is asked of a cache of cells when it changes."""

    _table: CellTable
    _store: Store
    _step: Any

    def _sweep(self, but: Container[int] = ()) -> None: ...


class Journal:
    """Of one cache of K and V by position. Its size is that of the change, not of the cache."""

    __slots__ = ("_cache", "_capacity", "_opened", "_pairs", "_sequences", "_step")

    def __init__(self, cache: HoldsCells) -> None:
        self._cache = cache
        self._step = cache._step
        self._sequences: dict[int, Held | None] = {}
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

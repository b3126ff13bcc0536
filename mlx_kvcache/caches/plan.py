"""Plans: changes of a cache that are computed completely before any part of them is made.

A plan is made, and then either settled or unmade. `Journal` notes what a change of cells replaces, so that
an interrupted change can be rolled back.
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
    """A computed change of a cache. It cannot fail, but an exception such as ctrl-C can interrupt it.

    `commit` makes it. To make several plans together, call `make` of all and then `settle` of all; if
    anything interrupts that, call `unmake` of all in reverse order.
    """

    made = 0
    """Counts successful `again` calls, so that a caller can tell whether an interrupted one took effect."""

    def commit(self) -> None:
        """Make the change. An exception at any point leaves the cache unchanged."""
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
        """Roll back `make`, however far it came."""

    def settle(self) -> None:  # noqa: B027
        """Free whatever only `unmake` needs. Changes nothing visible."""

    def undo(self) -> None:
        """Remove the tokens of a forward pass again, if it was made and the cache has not changed since.

        Only plans of forward passes implement this.
        """
        raise NotImplementedError

    def arrays(self) -> Iterable[mx.array]:
        """Return the change's new arrays, which can be evaluated before it is made."""
        return ()

    @property
    def is_under_way(self) -> bool:
        """Whether this is a forward pass that was made and is neither finished nor undone."""
        return False

    def finish(self) -> None:  # noqa: B027
        """End a forward pass under way: `get` still works, `put` raises.

        Raises:
            CacheError: a layer lacks keys and values. The caller must then call `undo`.
        """

    def again(self) -> bool:
        """Extend the last forward pass by the same number of tokens, if nothing changed in between.

        Returns False, and does nothing, if that is not possible.
        """
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
    """The parts of a cache of cells that a plan changes."""

    _table: CellTable
    _store: Store
    _step: Any

    def _sweep(self, but: Container[int] = ()) -> None: ...


class Journal:
    """Notes what a change of a cache of cells replaces, so that it can be rolled back.

    Its size is proportional to the change, not to the cache.
    """

    __slots__ = ("_cache", "_capacity", "_opened", "_pairs", "_sequences", "_step")

    def __init__(self, cache: HoldsCells) -> None:
        self._cache = cache
        self._step = cache._step
        self._sequences: dict[int, Held | None] = {}
        self._capacity: dict[int, int | None] = {}
        self._pairs: dict[tuple[int, int], AnyPair | None] = {}
        self._opened: list[int] = []

    def open(self, layer: int, form: Form) -> None:
        """Open a layer unless it is open."""
        if layer not in self._cache._store.layers:
            self._opened.append(layer)
            self._cache._store.open(layer, form)

    def apply(self, placement: Placement, staged: Staged) -> None:
        """Make a planned placement: first the arrays, then the owners of cells.

        Segments without an owner stay until they are swept, because a rollback may need them.
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
        """Restore everything that was noted."""
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

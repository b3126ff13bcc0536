"""Kinds that hold one immutable record for each sequence, rather than cells."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import mlx.core as mx

from ..batch import Batch
from ..quantisation import Quantisation
from .base import PlanningCache
from .plan import Plan


class Stream(Protocol):
    """What is known of a sequence."""

    @property
    def end(self) -> int: ...


S = TypeVar("S", bound=Stream)


class StreamCache(PlanningCache, Generic[S]):
    """Sequences as a dict of records; a change is a dict of new ones."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, S] = {}
        self._batch: Batch | None = None

    @abstractmethod
    def _begin_step(self, batch: Batch | None, reserve: bool) -> None:
        """A batch begins, or an edit ends the last one (None)."""

    def _open(self, dtype: mx.Dtype | None, room: int, quantisation: Quantisation | None) -> None:
        self._streams = {}

    def _close(self) -> None:
        self._streams = {}
        self._batch = None
        self._begin_step(None, reserve=False)

    def _plan_reserve(self, batch: Batch) -> Plan:
        return StreamPlan(self, {}, batch, reserve=True)

    def _snapshot(self, sequence: int) -> S | None:
        return self._streams.get(sequence)

    def _plan_restore(self, sequence: int, snapshot: S | None) -> Plan:
        return StreamPlan(self, {sequence: snapshot})

    def _end(self, sequence: int) -> int:
        stream = self._streams.get(sequence)
        return stream.end if stream else 0


class StreamPlan(Plan, Generic[S]):
    """New records of some sequences (None forgets one), by a batch or between batches."""

    def __init__(
        self,
        cache: StreamCache[S],
        changes: Mapping[int, S | None],
        batch: Batch | None = None,
        reserve: bool = False,
    ) -> None:
        self._cache = cache
        self._changes = changes
        self._batch = batch
        self._reserve = reserve
        self._before = {sequence: cache._streams.get(sequence) for sequence in changes}

    def commit(self) -> None:
        if self._batch is None and not self._changes:
            return
        self._cache._batch = self._batch
        self._cache._begin_step(self._batch, self._reserve)
        self._assign(self._changes)

    def undo(self) -> None:
        if self._cache._batch is self._batch:
            self._assign(self._before)
            self._cache._batch = None

    def _assign(self, streams: Mapping[int, S | None]) -> None:
        for sequence, stream in streams.items():
            self._cache._streams.pop(sequence, None)
            if stream is not None:
                self._cache._streams[sequence] = stream

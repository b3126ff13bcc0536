"""Kinds that hold one immutable record for each sequence, rather than cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx

from ..batch import Batch
from ..quantisation import Quantisation
from .base import PlanningCache
from .complete import over
from .plan import Plan


class Stream(Protocol):
    """What is known of a sequence."""

    @property
    def end(self) -> int: ...


S = TypeVar("S", bound=Stream)


class Pass(NamedTuple):
    """A forward pass under way.

    Attributes:
        begins: for each sequence of the batch, where it ended before.
        scratch: after `start_forward(reserve=True)`, what takes the place of what is stored, by layer.
    """

    batch: Batch
    begins: Mapping[int, int]
    scratch: dict[int, Any] | None


class StreamCache(PlanningCache, Generic[S]):
    """Sequences as a dict of records; a change is a dict of new ones."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[int, S] = {}
        self._pass: Pass | None = None
        self._finished: Pass | None = None
        """The last pass whose `forward` is over."""

    def _open(self, dtype: mx.Dtype | None, room: int, quantisation: Quantisation | None) -> None:
        self._streams = {}

    def _close(self) -> None:
        self._streams = {}
        self._pass = self._finished = None

    def _plan_reserve(self, batch: Batch) -> Plan:
        return StreamPlan(self, {}, batch, reserve=True)

    def _snapshot(self, sequence: int) -> S | None:
        return self._streams.get(sequence)

    def _plan_restore(self, sequence: int, snapshot: S | None) -> Plan:
        return StreamPlan(self, {sequence: snapshot})

    def _end(self, sequence: int) -> int:
        stream = self._streams.get(sequence)
        return stream.end if stream else 0

    def _under_way(self) -> Pass:
        if self._pass is None:
            raise self._no_batch()
        return self._pass

    def _check_unfinished(self) -> None:
        """Raise CacheError where the `forward` of the last pass is over."""
        if self._pass is not None and self._pass is self._finished:
            raise over(len(self._pass.batch))


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
        self._before = {sequence: cache._streams.get(sequence) for sequence in changes}
        self._last = cache._pass
        self._pass: Pass | None = None
        if batch is not None:
            begins = {sequence: cache._end(sequence) for sequence in batch.rows}
            self._pass = Pass(batch, begins, {} if reserve else None)

    def make(self) -> None:
        if self._pass is not None or self._changes:
            self._cache._pass = self._pass
            self._assign(self._changes)

    def unmake(self) -> None:
        self._assign(self._before)
        self._cache._pass = self._last

    @property
    def is_under_way(self) -> bool:
        cache = self._cache
        return self._pass is not None and cache._pass is self._pass and cache._finished is not self._pass

    def finish(self) -> None:
        if self.is_under_way:
            self._cache._finished = self._pass

    def undo(self) -> None:
        if self._pass is not None and self._cache._pass is self._pass:
            self._assign(self._before)
            self._cache._pass = None

    def _assign(self, streams: Mapping[int, S | None]) -> None:
        for sequence, stream in streams.items():
            self._cache._streams.pop(sequence, None)
            if stream is not None:
                self._cache._streams[sequence] = stream

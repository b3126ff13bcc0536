"""Collects statistics for the screen: what the caches hold and how much time they have saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Holding, holdings
from mlx_kvcache.sessions import Session, SessionPool

from .events import Seen
from .tree import Cost

EVERY = 0.1
"""The minimum time between two reports during a reply, in seconds."""

MEASURED = 16
"""The minimum number of tokens in a prefill for which its speed counts."""


class Watch:
    """Maps the caches' sequences to conversations, and sums up the statistics of replies."""

    def __init__(self, pool: SessionPool, capacity: int | None, clock: Callable[[], float]) -> None:
        self.totals = Cost()
        self._pool = pool
        self._capacity = capacity
        self._clock = clock
        self._owners: dict[int, str] = {}
        self._cache: Any = None
        self._gap: int | None = None
        self._most = 0
        self._next = 0.0
        self._read = (0, 0.0)

    def follow(self, conversation: str, session: Session, gap: int | None) -> None:
        """Make a session the current one. `gap` is the position at which messages are missing, or None."""
        self._cache, self._gap = session.cache, gap
        self._owners[session.cache.sequence] = conversation

    def forget(self) -> None:
        """Set no current session."""
        self._cache = None

    def move(self, gap: int | None) -> None:
        self._gap = gap

    def is_due(self) -> bool:
        """Whether it is time for the next report."""
        return self._clock() >= self._next

    def saved(self, reused: int, read: int, seconds: float) -> float:
        """The estimated seconds to prefill `reused` tokens; `read` tokens took `seconds` now."""
        tokens, taken = self._measured(read, seconds)
        return reused * taken / tokens if tokens else 0.0

    def add(self, cost: Cost) -> None:
        """Count a finished reply."""
        self.totals += cost
        self._read = self._measured(cost.prefilled, cost.first_token)

    def seen(self) -> Seen:
        self._next = self._clock() + EVERY
        nbytes = self._pool.nbytes
        self._most = max(self._most, nbytes)
        held: tuple[Holding, ...] = ()
        current, cached = None, 0
        try:
            if self._cache is not None:
                current, cached = self._cache.sequence, self._cache.position
        except CacheError:
            # The cache has been evicted.
            self._cache = current = None
        cells = self._pool.cells
        if cells is not None:
            held = holdings(cells)
            living = {sequence for holding in held for sequence in holding.runs}
            self._owners = {s: name for s, name in self._owners.items() if s in living or s == current}
        return Seen(
            held,
            dict(self._owners),
            current,
            cached,
            self._capacity,
            nbytes,
            self._most,
            self._gap if self._cache is not None else None,
            self._moved(cached),
            self.totals,
        )

    def _measured(self, read: int, seconds: float) -> tuple[int, float]:
        """The prefilled tokens whose speed counts and their seconds, with those of a reply."""
        if read < MEASURED and self._read[0]:
            return self._read
        return self._read[0] + read, self._read[1] + seconds

    def _moved(self, cached: int) -> tuple[int, int]:
        """The range of tokens whose keys were re-based on removal: those before the gap, or after it."""
        if self._gap is None or self._cache is None:
            return 0, 0
        return (0, self._gap) if self._cache.pool.scheme.ahead else (self._gap, cached)

"""Conversations by their tokens: what has been computed for one serves all that begin alike."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, Protocol

from .errors import CacheError, NotSupportedError
from .prefixes import PrefixTree

CANDIDATES = 32
"""Stored sequences that are asked how far they can go back, at most."""


class Branch(Protocol):
    """A conversation's cache, as `mlx_kvcache.plugin.PromptCache` is one."""

    @property
    def position(self) -> int: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def pool(self) -> Any: ...
    def resume_point(self, position: int) -> int: ...
    def rewind_to(self, position: int) -> None: ...
    def remove(self, begin: int, end: int | None = None) -> None: ...
    def fork(self) -> Any: ...
    def close(self) -> None: ...


@dataclass
class Counts:
    """What has happened in a pool. `rejected` is by reason."""

    hits: int = 0
    misses: int = 0
    reused: int = 0
    """Tokens that did not have to be computed again."""
    evicted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class _Stored:
    tokens: tuple[int, ...]
    cache: Any
    salt: Hashable
    is_pinned: bool
    used: int


class Session:
    """A conversation that is under way.

    Attributes:
        cache: its prompt cache, to give to the model.
        tokens: what is in the cache, or will be when `rest` has been computed.
        reused: how many of them were there already.
        rest: those that are left to compute, at least one.
    """

    def __init__(
        self, pool: SessionPool, cache: Any, tokens: Sequence[int], reused: int, salt: Hashable
    ) -> None:
        self.cache = cache
        self.tokens = list(tokens)
        self.reused = reused
        self.rest = self.tokens[reused:]
        self._pool = pool
        self._salt = salt
        self._is_open = True

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens that have been or will be computed behind the others, such as a reply's."""
        self.tokens += tokens

    def shift(self, keep: int = 0, room: int = 1) -> list[int]:
        """Make room for more tokens where the cache has a capacity: drop the older half after `keep`.

        Returns:
            Tokens to compute again: none, or, where the model's tokens cannot be moved, all
            that stay and that the cache could not keep.

        Raises:
            ValueError: a negative number, or more room than there can be.
            CacheError: not all of `tokens` has been computed.
        """
        position, capacity = self.cache.position, self.cache.capacity
        if keep < 0 or room < 0 or (capacity is not None and keep + room > capacity):
            raise ValueError(
                f"keep={keep} and room={room} must be 0 or more and fit a capacity of {capacity}"
            )
        if position < len(self.tokens):
            raise CacheError(f"only {position} of {len(self.tokens)} tokens have been computed")
        if capacity is None or position + room <= capacity:
            return []
        begin = min(keep, position)
        end = begin + max((position - begin) // 2, position + room - capacity)
        left = self.tokens[:begin] + self.tokens[end:]
        try:
            self.cache.remove(begin, end)
        except NotSupportedError:
            point = self.cache.resume_point(begin)
            self.cache.rewind_to(point)
            self.tokens = left[:point]
            return left[point:]
        self.tokens = left
        return []

    def close(self, is_pinned: bool = False) -> None:
        """Give the cache back, for others that begin alike. A second close does nothing."""
        if self._is_open:
            self._is_open = False
            self._pool.store(self.tokens[: self.cache.position], self.cache, self._salt, is_pinned)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SessionPool:
    """Prompt caches by their tokens, the least recently used given up first.

    May be used from several threads. The model's calls are kept apart by the caches' own lock.

    Args:
        make: makes an empty prompt cache; all must be of one model and made alike.
        max_bytes: the most bytes that the caches' pool may hold, open sessions included; what
            they share counts once. Only stored caches are given up for it.
        max_stored: the most stored caches.

    Raises:
        ValueError: a negative bound.
    """

    def __init__(
        self, make: Callable[[], Any], max_bytes: int | None = None, max_stored: int | None = None
    ) -> None:
        for name, bound in (("max_bytes", max_bytes), ("max_stored", max_stored)):
            if bound is not None and bound < 0:
                raise ValueError(f"{name} must be 0 or more, got {bound}")
        self.counts = Counts()
        self._make = make
        self._max_bytes = max_bytes
        self._max_stored = max_stored
        self._trees: dict[Hashable, PrefixTree[_Stored]] = {}
        self._stored: list[_Stored] = []
        self._clock = 0
        self._lock = threading.RLock()
        self._cells: Any = None

    def __len__(self) -> int:
        """How many caches are stored."""
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches' pool, open sessions included."""
        return self._cells.nbytes if self._cells is not None else 0

    def open(self, tokens: Sequence[int], salt: Hashable = None) -> Session:
        """Begin or go on with a conversation.

        Args:
            tokens: all of it so far.
            salt: keeps apart what must not be shared, such as tenants, or images behind
                equal tokens.

        Raises:
            ValueError: no tokens.
        """
        tokens = list(tokens)
        if not tokens:
            raise ValueError("a session needs at least 1 token")
        with self._lock:
            reused, found = self._nearest(tokens, salt)
            if found is None:
                self.counts.misses += 1
                cache = self._make()
            else:
                self.counts.hits += 1
                self.counts.reused += reused
                self._touch(found)
                cache = found.cache.fork()
                cache.rewind_to(reused)
            self._cells = cache.pool
            return Session(self, cache, tokens, reused, salt)

    def store(
        self, tokens: Sequence[int], cache: Branch, salt: Hashable = None, is_pinned: bool = False
    ) -> bool:
        """Keep a cache for others that begin alike; it belongs to the pool from here on.

        A pinned one is never given up, such as a system prompt's.

        Returns:
            Whether it is kept; `counts.rejected` says why not.

        Raises:
            ValueError: the tokens are not what is in the cache.
        """
        if len(tokens) != cache.position:
            raise ValueError(f"{len(tokens)} tokens for a cache that holds {cache.position}")
        with self._lock:
            self._cells = cache.pool
            if not tokens:
                return self._reject("empty", cache)
            entry = _Stored(tuple(tokens), cache, salt, is_pinned, 0)
            tree = self._trees.setdefault(salt, PrefixTree())
            for common, shorter in list(islice(tree.matches(tokens[:-1]), CANDIDATES)):
                is_prefix = common == len(shorter.tokens)
                if is_prefix and not shorter.is_pinned and cache.resume_point(common) == common:
                    self._remove(shorter)
            before = tree.put(entry.tokens, entry)
            if before is not None:
                entry.is_pinned |= before.is_pinned
                self._stored.remove(before)
                before.cache.close()
            self._stored.append(entry)
            self._touch(entry)
            self._evict()
            if entry in self._stored:
                return True
            self.counts.rejected["larger than the budget"] += 1
            return False

    def clear(self) -> None:
        """Give up all stored caches, pinned ones too."""
        with self._lock:
            for entry in list(self._stored):
                self._remove(entry)

    def _nearest(self, tokens: Sequence[int], salt: Hashable) -> tuple[int, _Stored | None]:
        """The stored cache that saves the most tokens, and how many. One is always left to compute."""
        tree = self._trees.get(salt)
        best: tuple[int, _Stored | None] = (0, None)
        for common, entry in islice(tree.matches(tokens), CANDIDATES) if tree else ():
            most = min(common, len(tokens) - 1)
            if most <= best[0]:
                break
            point = entry.cache.resume_point(most)
            if point > best[0]:
                best = point, entry
        return best

    def _evict(self) -> None:
        """Give up the least recently used until all bounds hold, or only pinned ones are left."""
        while self._exceeds():
            entry = min((e for e in self._stored if not e.is_pinned), key=lambda e: e.used, default=None)
            if entry is None:
                return
            self._remove(entry)
            self.counts.evicted += 1

    def _exceeds(self) -> bool:
        if self._max_stored is not None and len(self._stored) > self._max_stored:
            return True
        return self._max_bytes is not None and self.nbytes > self._max_bytes

    def _remove(self, entry: _Stored) -> None:
        self._trees[entry.salt].pop(entry.tokens)
        self._stored.remove(entry)
        entry.cache.close()

    def _touch(self, entry: _Stored) -> None:
        self._clock += 1
        entry.used = self._clock

    def _reject(self, reason: str, cache: Branch) -> bool:
        self.counts.rejected[reason] += 1
        cache.close()
        return False

"""Conversations by their tokens: what has been computed for one serves all that begin alike."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

from .arguments import class_of, size_of, token_ids, whole
from .errors import CacheError
from .persist.tier import DiskTier
from .prefixes import PrefixTree
from .session import Branch, Session

__all__ = ["Counts", "Session", "SessionPool"]

CANDIDATES = 32
"""Stored sequences that are asked how far they can go back, at most."""


@dataclass
class Counts:
    """What has happened in a pool. `rejected` is by reason."""

    hits: int = 0
    misses: int = 0
    reused: int = 0
    """Tokens that did not have to be computed again."""
    evicted: int = 0
    from_disk: int = 0
    """Hits that came out of a file."""
    to_disk: int = 0
    """Caches that were given to a file."""
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class _Stored:
    tokens: tuple[int, ...]
    cache: Any
    salt: Hashable
    is_pinned: bool
    used: int


class SessionPool:
    """Prompt caches by their tokens, the least recently used given up first.

    May be used from several threads. The model's calls are kept apart by the caches' own lock.

    Args:
        make: makes an empty prompt cache; all must be of one model and made alike.
        max_bytes: the most bytes that the caches' pool may hold, open sessions included; what
            they share counts once. Only stored caches are given up for it.
        max_stored: the most stored caches.
        disk: where caches go that are given up for a bound, and come back from.

    Raises:
        ValueError: a negative bound.
        TypeError: `make` is no function, or `disk` no tier.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        max_bytes: int | None = None,
        max_stored: int | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        whole(**{n: b for n, b in (("max_bytes", max_bytes), ("max_stored", max_stored)) if b is not None})
        if not callable(make):
            raise TypeError(
                f"make must be a function that makes an empty prompt cache, got {class_of(make)}; "
                "such as lambda: make_prompt_cache(model)"
            )
        if disk is not None and not isinstance(disk, DiskTier):
            raise TypeError(
                f"disk must be a DiskTier, got {class_of(disk)}; see make_session_pool(folder=...)"
            )
        self.counts = Counts()
        self._make = make
        self._max_bytes = max_bytes
        self._max_stored = max_stored
        self._disk = disk
        self._trees: dict[Hashable, PrefixTree[_Stored]] = {}
        self._stored: list[_Stored] = []
        self._clock = 0
        self._lock = threading.RLock()
        self._cells: Any = None

    def __len__(self) -> int:
        """How many caches are stored."""
        return len(self._stored)

    def __repr__(self) -> str:
        return f"SessionPool({len(self)} stored, {size_of(self.nbytes)})"

    @property
    def cells(self) -> Any:
        """The pool of cells that the caches share; None before there is a cache."""
        return self._cells

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
            TypeError: tokens that are no sequence of whole numbers, such as a text.
        """
        tokens = token_ids(tokens)
        if not tokens:
            raise ValueError("a session needs at least 1 token")
        with self._lock:
            reused, found = self._nearest(tokens, salt)
            reused, found = self._from_disk(tokens, salt, reused, found)
            if found is None:
                self.counts.misses += 1
                cache = self._make()
            else:
                self.counts.hits += 1
                self.counts.reused += reused
                self._touch(found)
                cache = found.cache.fork()
                cache.rewind_to(reused)
                self._evict()
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
            ValueError: the tokens are not what is in the cache, or it is of another model or made with
                other options than the pool's own.
            TypeError: tokens that are no sequence of whole numbers, or no prompt cache.
        """
        tokens = token_ids(tokens)
        if not hasattr(cache, "position"):
            raise TypeError(f"cache must be a prompt cache, got {class_of(cache)}")
        if len(tokens) != cache.position:
            raise ValueError(f"{len(tokens)} tokens for a cache that holds {cache.position}")
        with self._lock:
            if not self._takes(cache):
                raise ValueError(
                    "the cache is of another pool: of another model, or made with other options than here"
                )
            if not tokens:
                return self._reject("empty", cache)
            entry = self._put(_Stored(tuple(tokens), cache, salt, is_pinned, 0))
            for common, shorter in list(islice(self._trees[salt].matches(tokens[:-1]), CANDIDATES)):
                is_prefix = common == len(shorter.tokens) < len(tokens)
                if is_prefix and not shorter.is_pinned and cache.resume_point(common) == common:
                    self._remove(shorter)
            self._evict()
            if entry in self._stored:
                return True
            self.counts.rejected["larger than the budget"] += 1
            return False

    def _takes(self, cache: Branch) -> bool:
        """Whether a cache is of the model that this pool is for, and made as its caches are."""
        with self._lock:
            if self._cells is None:
                made = self._make()
                self._cells = made.pool
                made.close()
            return cache.pool is self._cells

    def _reject(self, reason: str, cache: Branch) -> bool:
        """Close a cache that cannot be kept, and count why. Returns False."""
        with self._lock:
            self.counts.rejected[reason] += 1
            cache.close()
            return False

    def flush(self) -> None:
        """Have all stored caches written, and wait until they are. Does nothing without a disk."""
        with self._lock:
            for entry in self._stored:
                self._to_disk(entry)
        if self._disk:
            self._disk.folder.flush()

    def close(self) -> None:
        """Have all stored caches written where there is a disk, and give them up."""
        if self._disk and self._disk.folder.is_open:
            self.flush()
            self._disk.close()
        self._disk = None
        self.clear()

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def clear(self) -> None:
        """Give up all stored caches, pinned ones too. What is on disk stays there."""
        with self._lock:
            for entry in list(self._stored):
                self._remove(entry)

    def _nearest(self, tokens: Sequence[int], salt: Hashable) -> tuple[int, _Stored | None]:
        """The stored cache that saves the most tokens, and how many. One is always left to compute."""
        tree = self._trees.get(salt)
        best: tuple[int, _Stored | None] = (0, None)
        closed = []
        for common, entry in islice(tree.matches(tokens), CANDIDATES) if tree else ():
            most = min(common, len(tokens) - 1)
            if most <= best[0]:
                break
            try:
                point = entry.cache.resume_point(most)
            except CacheError:
                closed.append(entry)
                continue
            if point > best[0]:
                best = point, entry
        for entry in closed:
            # By whoever kept it after it was stored.
            self.counts.rejected["closed"] += 1
            self._remove(entry)
        return best

    def _from_disk(
        self, tokens: Sequence[int], salt: Hashable, reused: int, found: _Stored | None
    ) -> tuple[int, _Stored | None]:
        """What a file saves, where that is more than what is stored in memory does."""
        if self._disk is None:
            return reused, found
        try:
            kept = self._disk.nearest(tokens, salt, reused)
        except CacheError as error:
            # Whatever is wrong with the disk, a conversation can go on without it.
            self.counts.rejected[f"disk: {error}"] += 1
            return reused, found
        if kept is None:
            return reused, found
        self.counts.from_disk += 1
        return kept.point, self._put(_Stored(kept.tokens, kept.cache, salt, False, 0))

    def _to_disk(self, entry: _Stored) -> None:
        """Have a cache written, if it is not yet."""
        if self._disk is None:
            return
        try:
            self.counts.to_disk += self._disk.put(entry.tokens, entry.salt, entry.cache)
        except CacheError as error:
            self.counts.rejected[f"disk: {error}"] += 1

    def _put(self, entry: _Stored) -> _Stored:
        """Store a cache in the place of what was stored for the same tokens."""
        self._touch(entry)
        try:
            before = self._trees.setdefault(entry.salt, PrefixTree()).put(entry.tokens, entry)
            entry.is_pinned |= before is not None and before.is_pinned
            self._stored = [*(other for other in self._stored if other is not before), entry]
        except BaseException:
            self._replant()
            raise
        if before is not None and before.cache is not entry.cache:
            before.cache.close()
        return entry

    def _evict(self) -> None:
        """Give up the least recently used until all bounds hold, or only pinned ones are left."""
        while self._exceeds():
            entry = min((e for e in self._stored if not e.is_pinned), key=lambda e: e.used, default=None)
            if entry is None:
                return
            self._to_disk(entry)
            self._remove(entry)
            self.counts.evicted += 1

    def _exceeds(self) -> bool:
        if self._max_stored is not None and len(self._stored) > self._max_stored:
            return True
        return self._max_bytes is not None and self.nbytes > self._max_bytes

    def _remove(self, entry: _Stored) -> None:
        try:
            tree = self._trees[entry.salt]
            tree.pop(entry.tokens)
            if not tree:
                del self._trees[entry.salt]
            self._stored.remove(entry)
        except BaseException:
            self._replant()
            raise
        if not any(other.cache is entry.cache for other in self._stored):
            entry.cache.close()

    def _replant(self) -> None:
        """Grow the trees anew, after something came between them and the list of what is stored."""
        self._trees = {}
        for entry in self._stored:
            self._trees.setdefault(entry.salt, PrefixTree()).put(entry.tokens, entry)

    def _touch(self, entry: _Stored) -> None:
        self._clock += 1
        entry.used = self._clock

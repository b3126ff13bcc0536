"""Conversations by their tokens: what has been computed for one serves all that begin alike."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

from ..arguments import class_of, size_of, token_ids, whole
from ..errors import CacheError
from ..persist.disk_cache import DiskTier
from ..radix_tree import PrefixTree
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
    disk_error: str = ""
    """What went wrong with the disk when that was last counted as `rejected["disk"]`."""


@dataclass(eq=False)
class _Stored:
    tokens: tuple[int, ...]
    cache: Any
    salt: Hashable
    is_pinned: bool
    used: int


class SessionPool:
    """Prompt caches by their tokens, the least recently used given up first.

    May be used from several threads. The model's calls are kept apart by the caches' own lock, which may
    be held while anything here is called: nothing of a cache is asked while this pool's own lock is held.

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
        reused, cache = self._forked(tokens, salt)
        with self._lock:
            if cache is None:
                self.counts.misses += 1
            else:
                self.counts.hits += 1
                self.counts.reused += reused
        if cache is None:
            cache = self._make()
        self._cells = cache.pool
        self._evict()
        return Session(self, cache, tokens, reused, salt)

    def _forked(self, tokens: Sequence[int], salt: Hashable) -> tuple[int, Any]:
        """A fork of the cache that saves the most tokens, cut to these, or None."""
        while True:
            reused, found = self._nearest(tokens, salt)
            reused, found = self._from_disk(tokens, salt, reused, found)
            if found is None:
                return 0, None
            try:
                cache = found.cache.fork()
                cache.rewind_to(reused)
            except CacheError:
                # Another thread has given it up meanwhile.
                self._forget(found, "closed")
                continue
            with self._lock:
                self._touch(found)
            return reused, cache

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
        if not self._takes(cache):
            raise ValueError(
                "the cache is of another pool: of another model, or made with other options than here"
            )
        if not tokens:
            return self._reject("empty", cache)
        entry = self._put(_Stored(tuple(tokens), cache, salt, is_pinned, 0))
        for shorter in self._shorter(entry):
            if cache.resume_point(len(shorter.tokens)) == len(shorter.tokens):
                self._remove(shorter)
        self._evict()
        with self._lock:
            if entry in self._stored:
                return True
            self.counts.rejected["larger than the budget"] += 1
            return False

    def _shorter(self, entry: _Stored) -> list[_Stored]:
        """Stored caches of shorter prefixes of its tokens that may go."""
        with self._lock:
            tree = self._trees.get(entry.salt)
            matches = list(islice(tree.matches(entry.tokens[:-1]), CANDIDATES)) if tree else []
            return [
                other
                for common, other in matches
                if common == len(other.tokens) < len(entry.tokens) and not other.is_pinned
            ]

    def _takes(self, cache: Branch) -> bool:
        """Whether a cache is of the model that this pool is for, and made as its caches are."""
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
        for entry in list(self._stored):
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
        for entry in list(self._stored):
            self._remove(entry)

    def _nearest(self, tokens: Sequence[int], salt: Hashable) -> tuple[int, _Stored | None]:
        """The stored cache that saves the most tokens, and how many. One is always left to compute."""
        with self._lock:
            tree = self._trees.get(salt)
            matches = list(islice(tree.matches(tokens), CANDIDATES)) if tree else []
        best: tuple[int, _Stored | None] = (0, None)
        for common, entry in matches:
            most = min(common, len(tokens) - 1)
            if most <= best[0]:
                break
            try:
                point = entry.cache.resume_point(most)
            except CacheError:
                # By whoever kept it after it was stored, or its model is gone.
                self._forget(entry, "closed")
                continue
            if point > best[0]:
                best = point, entry
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
            self._count_failure(error)
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
            self._count_failure(error)

    def _count_failure(self, error: CacheError) -> None:
        """Count an error of the disk, and keep the newest: a key for each would be a key for each file."""
        self.counts.rejected["disk"] += 1
        self.counts.disk_error = str(error)

    def _put(self, entry: _Stored) -> _Stored:
        """Store a cache in the place of what was stored for the same tokens."""
        with self._lock:
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
            with self._lock:
                unpinned = [entry for entry in self._stored if not entry.is_pinned]
                entry = min(unpinned, key=lambda e: e.used, default=None)
            if entry is None:
                return
            self._to_disk(entry)
            if self._remove(entry):
                self.counts.evicted += 1

    def _exceeds(self) -> bool:
        if self._max_stored is not None and len(self._stored) > self._max_stored:
            return True
        return self._max_bytes is not None and self.nbytes > self._max_bytes

    def _remove(self, entry: _Stored) -> bool:
        """Give up a stored cache. Returns False where another thread has."""
        with self._lock:
            if entry not in self._stored:
                return False
            try:
                tree = self._trees[entry.salt]
                tree.pop(entry.tokens)
                if not tree:
                    del self._trees[entry.salt]
                self._stored.remove(entry)
            except BaseException:
                self._replant()
                raise
            is_last = not any(other.cache is entry.cache for other in self._stored)
        if is_last:
            entry.cache.close()
        return True

    def _forget(self, entry: _Stored, reason: str) -> None:
        """Give up a stored cache that cannot be used, and count why."""
        if self._remove(entry):
            self.counts.rejected[reason] += 1

    def _replant(self) -> None:
        """Grow the trees anew, after something came between them and the list of what is stored."""
        self._trees = {}
        for entry in self._stored:
            self._trees.setdefault(entry.salt, PrefixTree()).put(entry.tokens, entry)

    def _touch(self, entry: _Stored) -> None:
        self._clock += 1
        entry.used = self._clock

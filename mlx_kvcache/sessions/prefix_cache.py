"""A pool of prompt caches that finds the longest stored prefix of a conversation.

Stored caches are in a radix tree for each salt. `open` forks the cache that saves the most tokens, and
`store` keeps a cache for later conversations. The least recently used caches are evicted, to disk if there
is a `DiskTier`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

from ..arguments import class_of, share, size_of, token_ids, whole
from ..errors import CacheError
from ..persist.disk_cache import DiskTier, Kept
from ..radix_tree import PrefixTree, Texts, shared_length
from .session import SALTS, Branch, Departure, Evicted, Reason, Session, departure
from .splicing import Spliced, Splicing, best_splice, spliced_salt

__all__ = ["Counts", "Departure", "Session", "SessionPool"]

CANDIDATES = 32
"""The most stored caches that a lookup asks for their resume points."""

WORTH = 32
"""The fewest tokens that a checkpoint must save. It can take as many bytes as thousands of tokens' keys."""


@dataclass
class Counts:
    """Statistics of a pool.

    Attributes:
        hits, misses: sessions that reused tokens, and that reused none.
        reused: tokens that sessions did not have to compute again.
        evicted: caches that were evicted from memory.
        from_disk, to_disk: caches that were loaded from files, and queued to be written to files.
        rejected: caches that could not be stored or used, by reason, and failures of the disk as "disk".
        disk_error: the message of the newest failure that is counted as `rejected["disk"]`.
        departures: sessions that could not reuse all of a stored conversation, by `Departure.reason`.
        spliced: sessions that kept tokens after a change of the prompt.
    """

    hits: int = 0
    misses: int = 0
    reused: int = 0
    evicted: int = 0
    from_disk: int = 0
    to_disk: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    disk_error: str = ""
    departures: Counter[Reason] = field(default_factory=Counter)
    spliced: int = 0


@dataclass(eq=False)
class _Stored:
    tokens: tuple[int, ...]
    cache: Any
    salt: Hashable
    is_pinned: bool = False


class _Nearest(NamedTuple):
    """The cache that saves the most tokens, their number, and the closest stored conversation.

    Of the closest one, the tokens and how many of them are shared: () and 0 if none shares any.
    """

    point: int = 0
    found: _Stored | None = None
    closest: tuple[int, ...] = ()
    shared: int = 0


def branches_off(shared: int, reused: int, length: int) -> bool:
    """Return whether a prompt should leave a checkpoint where it branches off from a stored one.

    The next prompt that branches off there can then reuse everything before. Marconi (arXiv 2411.19379) and
    SGLang keep recurrent states at such points, too.

    Args:
        shared: the number of tokens that the two have in common.
        reused: the number of tokens that could be reused, because a layer has no state in between.
        length: the number of tokens of the prompt.
    """
    return shared < length and shared - reused >= WORTH


class Markable(Protocol):
    """A cache that keeps checkpoints at marked positions."""

    def mark(self, position: int) -> bool: ...


def mark_turns(cache: Markable, shared: int, reused: int, length: int) -> None:
    """Mark where a prompt goes on from a stored one and where it branches off; see `branches_off`.

    The next edit may go back to where it goes on.
    """
    if reused:
        cache.mark(reused)
    if branches_off(shared, reused, length):
        cache.mark(shared)


class SessionPool:
    """Stores prompt caches by their tokens, and evicts the least recently used.

    Thread-safe.

    Args:
        make: makes an empty prompt cache. All caches must be of one model and have the same options.
        max_bytes: the limit for all caches in bytes, open sessions included; shared cells count once. Only
            stored caches are evicted, so open sessions and pinned caches may exceed it.
        max_stored: the most stored caches.
        disk: stores evicted caches, and returns them later.
        tokenizer: if given, its `decode` makes the text in which `Session.departure` shows tokens, and
            `retokenize` can be used.

    Raises:
        ValueError: a limit is negative.
        TypeError: `make` is not callable, or `disk` is not a `DiskTier`.
    """

    # Calls of the model take the caches' own lock, and may call this pool while they hold it. To prevent a
    # deadlock, the pool calls no method of a cache while it holds its own lock.

    def __init__(
        self,
        make: Callable[[], Any],
        max_bytes: int | None = None,
        max_stored: int | None = None,
        disk: DiskTier | None = None,
        tokenizer: Any = None,
    ) -> None:
        whole(**{n: b for n, b in (("max_bytes", max_bytes), ("max_stored", max_stored)) if b is not None})
        if not callable(make):
            raise TypeError(
                f"make must be a function that returns an empty prompt cache, got {class_of(make)}; "
                "use for example lambda: make_prompt_cache(model)"
            )
        if disk is not None and not isinstance(disk, DiskTier):
            raise TypeError(
                f"disk must be a DiskTier, got {class_of(disk)}; use make_session_pool(folder=...)"
            )
        self.counts = Counts()
        self._make = make
        self._max_bytes = max_bytes
        self._max_stored = max_stored
        self._disk = disk
        self._tokenizer = tokenizer
        self._texts = Texts(tokenizer) if hasattr(tokenizer, "convert_ids_to_tokens") else None
        self._trees: dict[Hashable, PrefixTree[_Stored]] = {}
        # The least recently used first. Replaced whole, because others iterate without the lock.
        self._stored: list[_Stored] = []
        self._evicted = Evicted()
        self._lock = threading.RLock()
        self._cells: Any = None

    def __len__(self) -> int:
        """The number of stored caches."""
        return len(self._stored)

    def __repr__(self) -> str:
        return f"SessionPool({len(self)} stored, {size_of(self.nbytes)})"

    @property
    def cells(self) -> Any:
        """The pool of cells that the caches share, or None before the first cache is made."""
        return self._cells

    @property
    def nbytes(self) -> int:
        """The size of all caches in bytes, open sessions included."""
        return self._cells.nbytes if self._cells is not None else 0

    def open(
        self,
        tokens: Sequence[int],
        salt: Hashable = None,
        store: bool = True,
        splice: int = 0,
        recompute: float = 0.0,
    ) -> Session:
        """Open a session for a conversation, and reuse the longest stored prefix.

        With `splice`, also reuse what comes after a change of the prompt: every run of so many tokens that
        the closest stored conversation has in the same order. This is done where it saves at least `splice`
        tokens. The logits then differ slightly from those of a fresh computation (see `PromptCache.splice`),
        and the cache is stored apart: sessions that are opened without `splice` do not reuse it.

        Args:
            tokens: all token IDs of the conversation so far.
            salt: separates conversations that must not share a cache, such as those of different tenants,
                or of different images with the same tokens.
            store: whether closing the session stores its cache. False is for branches that are thrown away.
            splice: the least length of a run to reuse after a change; 0 for none.
            recompute: how much of each such run to compute again, from its first token on: 0.0 to 1.0.

        Returns:
            A session. Compute its `rest` with its `cache`, then close it. Its `departure` tells why not more
            was reused.

        Raises:
            ValueError: there are no tokens, `splice` is negative, or `recompute` is not between 0.0 and 1.0.
            TypeError: `tokens` is not a sequence of whole numbers.
        """
        tokens, (splice,) = token_ids(tokens), whole(splice=splice)
        if not tokens:
            raise ValueError("cannot open a session for 0 tokens: at least 1 token is needed")
        share(recompute=recompute)
        self._renew()
        nearest, cache = self._forked(tokens, salt)
        reused = nearest.point
        mark_turns(cache, nearest.shared, reused, len(tokens))
        departs = self._departure(tokens, salt, nearest)
        spliced = self._spliced(tokens, salt, reused, Splicing(splice, recompute)) if splice else None
        if spliced:
            cache.close()
            cache, reused, salt = spliced.cache, spliced.plan.kept, spliced_salt(salt)
        with self._lock:
            self.counts.spliced += spliced is not None
            self.counts.hits += reused > 0
            self.counts.misses += reused == 0
            self.counts.reused += reused
            self.counts.departures += Counter([departs.reason] if departs else [])
        self._cells = cache.pool
        self._evict()
        rest = spliced.plan.rest if spliced else tokens[reused:]
        return Session(self, cache, tokens, reused, salt, store, departs, rest)

    def _spliced(
        self, tokens: Sequence[int], salt: Hashable, reused: int, splicing: Splicing
    ) -> Spliced[_Stored] | None:
        """Return the best splice, if it saves at least `min_run` more tokens than `reused`."""
        if len(tokens) - 1 < reused + splicing.min_run:
            return None
        salts = salt, spliced_salt(salt)
        kept = self._from_disk(tokens, salts[1], reused)
        if kept:
            self._put(_Stored(kept.tokens, kept.cache, salts[1]))
        closest = [entry for own in salts for _, entry in self._matches(tokens, own)[:1]]
        newest = [entry for entry in reversed(self._stored) if entry.salt in salts]
        found, refusal = best_splice(
            dict.fromkeys([*closest, *newest]), tokens, splicing, reused + splicing.min_run - 1
        )
        if refusal:
            with self._lock:
                self.counts.rejected["tokens cannot be moved"] += 1
        if found:
            self._use(found.stored)
        return found

    def _forked(self, tokens: Sequence[int], salt: Hashable) -> tuple[_Nearest, Any]:
        """Return what was found, and a fork of the cache that saves the most tokens, or an empty cache."""
        while True:
            nearest = self._nearest(tokens, salt)
            kept = self._from_disk(tokens, salt, nearest.point)
            if kept:
                found = self._put(_Stored(kept.tokens, kept.cache, salt))
                shared = shared_length(kept.tokens, tuple(tokens))
                if shared >= nearest.shared:
                    nearest = nearest._replace(closest=kept.tokens, shared=shared)
                nearest = nearest._replace(point=kept.point, found=found)
            if nearest.found is None:
                return nearest, self._make()
            try:
                cache = nearest.found.cache.fork()
                cache.rewind_to(nearest.point)
            except CacheError:
                # Another thread has evicted the cache.
                self._forget(nearest.found)
                continue
            self._use(nearest.found)
            return nearest, cache

    def _renew(self) -> None:
        """Called before a stored cache is used. A subclass may drop those that have become invalid."""

    def _use(self, entry: _Stored) -> None:
        """Mark a stored cache as the most recently used."""
        with self._lock:
            if entry in self._stored:
                self._stored = [*self._without(entry), entry]

    def _departure(self, tokens: Sequence[int], salt: Hashable, nearest: _Nearest) -> Departure | None:
        """Return why the nearest stored cache does not save more. Searches nothing if it saves all it can."""

        def other_salts() -> list[int]:
            with self._lock:
                # What is spliced has a salt of its own, which nobody gave.
                ours = {salt, spliced_salt(salt)}
                trees = list(islice((tree for own, tree in self._trees.items() if own not in ours), SALTS))
                return [common for tree in trees for common, _ in islice(tree.matches(tokens), 1)]

        is_empty = not nearest.closest and salt not in self._trees
        return departure(
            tokens,
            nearest.point,
            None if is_empty else nearest.closest,
            lambda: self._evicted.of(salt),
            other_salts,
            getattr(self._tokenizer, "decode", None),
        )

    def retokenize(self, tokens: Sequence[int], salt: Hashable = None) -> list[int]:
        """Return tokens of the same text that reuse more: those that are stored, as far as the text agrees.

        The tokens that a model generates are often not the ones that the tokenizer makes of their text. When
        a chat template renders the history again, its tokens therefore depart from the stored ones although
        its text does not. Call this before `open`.

        Args:
            tokens: all token IDs of the conversation so far, as the tokenizer makes them.
            salt: see `open`.

        Returns:
            The tokens of a stored conversation up to a border between tokens of both, and after it the
            given ones. The given ones if no stored conversation has more of the text than they do. On disk,
            only the few that share the most first tokens are compared.

        Raises:
            ValueError: the pool has no tokenizer with `decode` and `convert_ids_to_tokens`.
            TypeError: `tokens` is not a sequence of whole numbers.
        """
        tokens = token_ids(tokens)
        if self._texts is None:
            raise ValueError(
                f"retokenize needs a tokenizer with decode and convert_ids_to_tokens, the pool has "
                f"{class_of(self._tokenizer)}; pass tokenizer=... to the pool"
            )
        with self._lock:
            found = self._texts.retokenized(tokens, self._trees.get(salt, PrefixTree()))
        files = self._closest_on_disk(found, salt)
        if not files:
            return found
        # What memory holds is among them, so that no file is preferred that has less of the text.
        closest = PrefixTree[bool]()
        for own in (*files, *(entry.tokens for _, entry in self._matches(found, salt)[:1])):
            closest.put(own, True)
        return self._texts.retokenized(found, closest)

    def _closest_on_disk(self, tokens: Sequence[int], salt: Hashable) -> list[tuple[int, ...]]:
        """Return the tokens of the files that share the most first tokens."""
        try:
            return self._disk.closest(tokens, salt) if self._disk else []
        except CacheError as error:
            self._count_failure(error)
            return []

    def store(
        self, tokens: Sequence[int], cache: Branch, salt: Hashable = None, is_pinned: bool = False
    ) -> bool:
        """Store a cache for later conversations. The pool owns the cache from then on.

        Removes stored caches of shorter prefixes that this cache can also serve.

        Args:
            tokens: the token IDs in the cache.
            cache: the prompt cache.
            salt: see `open`.
            is_pinned: never evict the cache, such as that of a system prompt.

        Returns:
            Whether the cache is stored. If not, it is closed and `counts.rejected` has the reason.

        Raises:
            ValueError: the number of tokens is not the cache's position, or the cache is of another model
                or has other options than the pool's caches.
            TypeError: `tokens` is not a sequence of whole numbers, or `cache` is not a prompt cache.
        """
        tokens = token_ids(tokens)
        if not hasattr(cache, "position"):
            raise TypeError(f"cache must be a prompt cache, got {class_of(cache)}")
        if len(tokens) != cache.position:
            raise ValueError(f"got {len(tokens)} tokens for a cache that holds {cache.position}")
        if not self._takes(cache):
            raise ValueError(
                "the cache is of another pool: it has another model or other options than this pool"
            )
        if not tokens:
            return self._reject("empty", cache)
        cache.end_splice()
        entry = self._put(_Stored(tuple(tokens), cache, salt, is_pinned))
        for common, other in self._matches(tokens[:-1], salt):
            is_prefix = common == len(other.tokens)
            if is_prefix and not other.is_pinned and cache.resume_point(common) == common:
                self._remove(other)
        self._evict()
        with self._lock:
            if entry in self._stored:
                return True
            self.counts.rejected["larger than the budget"] += 1
            return False

    def _matches(self, tokens: Sequence[int], salt: Hashable) -> list[tuple[int, _Stored]]:
        """Return stored caches with the number of leading tokens that they share, the longest first."""
        with self._lock:
            tree = self._trees.get(salt)
            return list(islice(tree.matches(tokens), CANDIDATES)) if tree else []

    def _takes(self, cache: Branch) -> bool:
        """Return whether a cache has the same model and options as this pool's caches."""
        if self._cells is None:
            made = self._make()
            self._cells = made.pool
            made.close()
        return cache.pool is self._cells

    def _reject(self, reason: str, cache: Branch) -> bool:
        """Close a cache that cannot be stored, and count the reason. Returns False."""
        with self._lock:
            self.counts.rejected[reason] += 1
        cache.close()
        return False

    def on_disk(self, tokens: Sequence[int], salt: Hashable = None) -> int:
        """Return how many leading tokens of a conversation a file holds. Loads nothing; 0 without a disk.

        Raises TypeError if `tokens` is not a sequence of whole numbers, and CacheFileError if the folder
        cannot be read.
        """
        tokens = token_ids(tokens)
        found = self._disk.folder.matches(tokens, salt) if self._disk else ()
        return max((common for common, _ in found), default=0)

    def flush(self) -> None:
        """Write all stored caches to disk, and wait for it. Does nothing without a disk."""
        for entry in self._stored:
            self._to_disk(entry)
        if self._disk:
            self._disk.folder.flush()

    def close(self) -> None:
        """Write all stored caches to disk, if there is one, and close them."""
        if self._disk and self._disk.folder.is_open:
            self.flush()
            self._disk.close()
        self._disk = None
        self.clear()

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def clear(self) -> None:
        """Close all stored caches, including pinned ones. Files on disk stay."""
        for entry in self._stored:
            self._remove(entry)
        self._evicted = Evicted()

    def _nearest(self, tokens: Sequence[int], salt: Hashable) -> _Nearest:
        """Return the longest prefix to resume from. At least one token is always left to compute."""
        best = _Nearest()
        for common, entry in self._matches(tokens, salt):
            most = min(common, len(tokens) - 1)
            if common > best.shared:
                best = best._replace(closest=entry.tokens, shared=common)
            if most <= best.point:
                break
            try:
                point = entry.cache.resume_point(most)
            except CacheError:
                # The caller closed the cache after storing it, or its model no longer exists.
                self._forget(entry)
                continue
            if point > best.point:
                best = best._replace(point=point, found=entry)
        return best

    def _from_disk(self, tokens: Sequence[int], salt: Hashable, reused: int) -> Kept | None:
        """Load the cache on disk that saves the most tokens, if they are more than `reused`."""
        try:
            kept = self._disk.nearest(tokens, salt, reused) if self._disk else None
        except CacheError as error:
            # The conversation can go on without the disk.
            self._count_failure(error)
            return None
        self.counts.from_disk += kept is not None
        return kept

    def _to_disk(self, entry: _Stored) -> None:
        """Queue a cache to be written to disk, unless a file for its tokens exists."""
        try:
            if self._disk:
                self.counts.to_disk += self._disk.put(entry.tokens, entry.salt, entry.cache)
        except CacheError as error:
            self._count_failure(error)

    def _count_failure(self, error: CacheError) -> None:
        # All failures have one key, since messages contain paths.
        self.counts.rejected["disk"] += 1
        self.counts.disk_error = str(error)

    def _put(self, entry: _Stored) -> _Stored:
        """Store a cache. It replaces the one that was stored for the same tokens."""
        with self._lock:
            try:
                before = self._trees.setdefault(entry.salt, PrefixTree()).put(entry.tokens, entry)
                entry.is_pinned |= before is not None and before.is_pinned
                self._stored = [*self._without(before), entry]
            except BaseException:
                self._rebuild_trees()
                raise
        if before is not None and before.cache is not entry.cache:
            before.cache.close()
        return entry

    def _evict(self) -> None:
        """Evict the least recently used caches until the limits hold or only pinned ones are left."""
        while self._exceeds():
            with self._lock:
                entry = next((entry for entry in self._stored if not entry.is_pinned), None)
            if entry is None:
                return
            self._to_disk(entry)
            if self._remove(entry):
                self.counts.evicted += 1
                self._evicted.add(entry.tokens, entry.salt)

    def _exceeds(self) -> bool:
        if self._max_stored is not None and len(self._stored) > self._max_stored:
            return True
        return self._max_bytes is not None and self.nbytes > self._max_bytes

    def _remove(self, entry: _Stored) -> bool:
        """Remove and close a stored cache. Returns False if another thread already has."""
        with self._lock:
            if entry not in self._stored:
                return False
            try:
                tree = self._trees[entry.salt]
                tree.pop(entry.tokens)
                if not tree:
                    del self._trees[entry.salt]
                self._stored = self._without(entry)
            except BaseException:
                self._rebuild_trees()
                raise
            is_last = not any(other.cache is entry.cache for other in self._stored)
        if is_last:
            entry.cache.close()
        return True

    def _without(self, entry: _Stored | None) -> list[_Stored]:
        return [other for other in self._stored if other is not entry]

    def _forget(self, entry: _Stored) -> None:
        """Remove a stored cache that has been closed."""
        if self._remove(entry):
            self.counts.rejected["closed"] += 1

    def _rebuild_trees(self) -> None:
        """Rebuild the trees from the list of stored caches, after an interrupted change."""
        self._trees = {}
        for entry in self._stored:
            self._trees.setdefault(entry.salt, PrefixTree()).put(entry.tokens, entry)

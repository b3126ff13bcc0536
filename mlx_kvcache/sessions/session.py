"""A session: an open conversation with its tokens and its prompt cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from ..arguments import token_ids, whole
from ..caches.interface import Recurrent
from ..errors import CacheError, NotSupportedError


class Branch(Protocol):
    """The interface of a prompt cache. `mlx_kvcache.plugin.PromptCache` implements it."""

    @property
    def position(self) -> int: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def pool(self) -> Any: ...
    @property
    def gaps(self) -> int: ...
    def resume_point(self, position: int) -> int: ...
    def rewind_to(self, position: int) -> None: ...
    def mark(self, position: int) -> bool: ...
    def remove(self, begin: int, end: int | None = None, recurrent: Recurrent = "refuse") -> None: ...
    def fork(self) -> Any: ...
    def close(self) -> None: ...


class Keeper(Protocol):
    """The interface of a pool that takes a session's cache when the session is closed."""

    def _takes(self, cache: Any) -> bool: ...
    def _reject(self, reason: str, cache: Any) -> bool: ...
    def store(
        self, tokens: Sequence[int], cache: Any, salt: Hashable = None, is_pinned: bool = False
    ) -> bool: ...


class Session:
    """An open conversation. `SessionPool.open` makes it.

    Attributes:
        cache: the prompt cache, to pass to the model.
        tokens: the token IDs of the conversation, in the cache or still to be computed.
        reused: the number of leading tokens that were reused from the pool.
        rest: the tokens that remained to be computed when the session was opened, at least one.
        salt: the salt with which the cache is stored on close.
    """

    def __init__(self, pool: Keeper, cache: Any, tokens: Sequence[int], reused: int, salt: Hashable) -> None:
        self.cache = cache
        self.tokens = list(tokens)
        self.reused = reused
        self.rest = self.tokens[reused:]
        self._pool = pool
        self.salt = salt
        self._gaps = cache.gaps
        self._is_open = True

    def __repr__(self) -> str:
        if not self._is_open:
            return "Session(closed)"
        left = max(0, len(self.tokens) - self.cache.position)
        return f"Session({len(self.tokens)} tokens, {self.reused} reused, {left} to compute)"

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens, such as those of a reply. Raises TypeError unless they are whole numbers."""
        self.tokens += token_ids(tokens)

    def remove(self, begin: int, end: int, salt: Hashable, recurrent: Recurrent = "refuse") -> None:
        """Remove tokens [begin, end) from the conversation and the cache. Later tokens move down.

        Args:
            begin, end: the first position to remove, and the one after the last.
            recurrent: what happens to recurrent states: "refuse", "keep" or "replay"; see `Cache.remove`.
            salt: the session's new salt. The keys and values after the gap still depend on the removed
                tokens, so conversations without them must not reuse the cache.

        Raises:
            ValueError: not 0 <= begin <= end <= the cache's position.
            NotSupportedError: the cache cannot remove these tokens. Nothing has changed.
        """
        begin, end = whole(None, begin=begin, end=end)
        hash(salt)
        if not 0 <= begin <= end <= self.cache.position:
            raise ValueError(f"cannot remove [{begin}, {end}): the cache holds {self.cache.position} tokens")
        self._edit(lambda: self.cache.remove(begin, end, recurrent), begin, end, salt)

    def shift(self, keep: int = 0, room: int = 1, salt: Hashable = None) -> list[int]:
        """Make room for `room` tokens, if the cache is full: drop the older half after the first `keep`.

        Does nothing if the cache has no capacity, or has the room. Drops more than half if needed. Recurrent
        states go on knowing what is dropped.

        Args:
            keep: the number of leading tokens to keep.
            room: the number of tokens to make room for.
            salt: the session's new salt, see `remove`. None makes a unique one.

        Returns:
            The tokens to compute again, usually none. If the cache cannot remove tokens from the middle, it
            is rewound, and these are the remaining tokens that it lost.

        Raises:
            ValueError: a number is negative, or `keep` and `room` exceed the capacity.
            CacheError: some of `tokens` have not been computed.
        """
        keep, room = whole(None, keep=keep, room=room)
        position, capacity = self.cache.position, self.cache.capacity
        if keep < 0 or room < 0 or (capacity is not None and keep + room > capacity):
            raise ValueError(
                f"keep={keep} and room={room} must be at least 0 and fit the capacity, {capacity}"
            )
        if position < len(self.tokens):
            computed = f"only {position} of {len(self.tokens)} tokens have been computed"
            raise CacheError(f"cannot shift: {computed}; compute the others first")
        if capacity is None or position + room <= capacity:
            return []
        begin = min(keep, position)
        end = begin + max((position - begin) // 2, position + room - capacity)
        salt = object() if salt is None else salt
        try:
            self._edit(lambda: self.cache.remove(begin, end, "keep"), begin, end, salt)
        except NotSupportedError:
            point, tokens = self.cache.resume_point(begin), self.tokens
            self._edit(lambda: self.cache.rewind_to(point), point, len(tokens), self.salt)
            return tokens[point:begin] + tokens[end:]
        return []

    def _edit(self, edit: Callable[[], None], begin: int, end: int, salt: Hashable) -> None:
        """Edit the cache, and remove tokens [begin, end) here. If the edit fails, neither changes."""
        position, before = self.cache.position, (self.tokens, self.reused, self.salt)
        try:
            self.tokens, self.salt = self.tokens[:begin] + self.tokens[end:], salt
            self.reused -= max(0, min(end, self.reused) - begin)
            gaps = self.cache.gaps
            edit()
            self._gaps += self.cache.gaps - gaps
        except BaseException:
            if self.cache.position == position:
                self.tokens, self.reused, self.salt = before
            raise

    def close(self, is_pinned: bool = False) -> None:
        """Return the cache to the pool, for later conversations. Closing again does nothing.

        Tokens in the cache beyond `tokens`, such as an end token that was not passed to `extend`, are
        dropped first. The cache is closed instead of stored if `overflow="shift"` or others removed tokens,
        or if it left the pool, such as by mlx-lm's `kv_bits`.

        Args:
            is_pinned: never evict the cache.
        """
        if not self._is_open:
            return
        if self.cache.gaps != self._gaps:
            self._pool._reject("tokens have been taken out", self.cache)
        elif not self._pool._takes(self.cache):
            self._pool._reject("of another pool", self.cache)
        else:
            if self.cache.position > len(self.tokens):
                self.cache.rewind_to(self.cache.resume_point(len(self.tokens)))
            self._pool.store(self.tokens[: self.cache.position], self.cache, self.salt, is_pinned)
        self._is_open = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

"""A conversation under way, and the cache that it goes on with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, Protocol

from ..arguments import token_ids, whole
from ..errors import CacheError, NotSupportedError


class Branch(Protocol):
    """A conversation's cache, as `mlx_kvcache.plugin.PromptCache` is one."""

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
    def remove(self, begin: int, end: int | None = None) -> None: ...
    def fork(self) -> Any: ...
    def close(self) -> None: ...


class Keeper(Protocol):
    """Who takes a session's cache when it is over."""

    def _takes(self, cache: Any) -> bool: ...

    def _reject(self, reason: str, cache: Any) -> bool: ...

    def store(
        self, tokens: Sequence[int], cache: Any, salt: Hashable = None, is_pinned: bool = False
    ) -> bool: ...


class Session:
    """A conversation that is under way.

    Attributes:
        cache: its prompt cache, to give to the model.
        tokens: what is in the cache, or will be when `rest` has been computed.
        reused: how many of them were there already.
        rest: those that are left to compute, at least one.
        salt: under which the cache is stored at the end.
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
        """Note tokens that have been or will be computed behind the others, such as a reply's.

        Raises:
            TypeError: no sequence of whole numbers.
        """
        self.tokens += token_ids(tokens)

    def remove(self, begin: int, end: int, salt: Hashable) -> None:
        """Take out [begin, end) of what has been computed; later tokens move down.

        Args:
            salt: keeps the cache apart from here on: tokens after the gap were computed with
                knowledge of what is gone, which another conversation of these tokens has not.

        Raises:
            ValueError: not 0 <= begin <= end <= the cache's position.
            NotSupportedError: the cache cannot; nothing has changed.
        """
        begin, end = whole(None, begin=begin, end=end)
        hash(salt)
        if not 0 <= begin <= end <= self.cache.position:
            raise ValueError(f"cannot remove [{begin}, {end}) of {self.cache.position} tokens")
        self._remove(begin, end, salt)

    def shift(self, keep: int = 0, room: int = 1, salt: Hashable = None) -> list[int]:
        """Make room for more tokens where the cache has a capacity: drop the older half after `keep`.

        Args:
            salt: as of `remove`; None is one that nobody else has.

        Returns:
            Tokens to compute again: none, or, where the model's tokens cannot be moved, all
            that stay and that the cache could not keep.

        Raises:
            ValueError: a negative number, or more room than there can be.
            CacheError: not all of `tokens` has been computed.
        """
        keep, room = whole(None, keep=keep, room=room)
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
            self._remove(begin, end, object() if salt is None else salt)
        except NotSupportedError:
            point = self.cache.resume_point(begin)
            reused = min(self.reused, point)
            self._edit(lambda: self.cache.rewind_to(point), left[:point], reused, self.salt)
            return left[point:]
        return []

    def _remove(self, begin: int, end: int, salt: Hashable) -> None:
        reused = self.reused - max(0, min(end, self.reused) - begin)
        left = self.tokens[:begin] + self.tokens[end:]
        self._edit(lambda: self.cache.remove(begin, end), left, reused, salt)

    def _edit(self, edit: Callable[[], None], tokens: list[int], reused: int, salt: Hashable) -> None:
        """Take tokens out of the cache, and note what is left, or neither."""
        position, before = self.cache.position, (self.tokens, self.reused, self.salt)
        try:
            self.tokens, self.reused, self.salt = tokens, reused, salt
            gaps = self.cache.gaps
            edit()
            self._gaps += self.cache.gaps - gaps
        except BaseException:
            if self.cache.position == position:
                self.tokens, self.reused, self.salt = before
            raise

    def close(self, is_pinned: bool = False) -> None:
        """Give the cache back, for others that begin alike. A second close does nothing.

        What was computed beyond `tokens`, such as an end token that nobody noted, is dropped first. A
        cache that tokens have been taken out of otherwise than by the session's own methods, such as by
        `overflow="shift"`, is given up: what is in it is not what `tokens` says. So is one that has left the
        pool, such as by mlx-lm's `kv_bits`.
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""A session: an open conversation with its tokens and its prompt cache.

Its `Departure` tells why it could not reuse more: where its prompt departs from the closest stored one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..arguments import token_ids, whole
from ..caches.interface import Recurrent
from ..errors import CacheError, NotSupportedError
from ..radix_tree import shared_length

Reason = Literal["first prompt", "departs", "cannot go back", "evicted", "other salt"]

Decode = Callable[[list[int]], str]
"""Turns tokens into text, like a tokenizer's `decode`."""

AROUND = 8
"""The number of tokens that a `Departure` shows on each side."""

CLEARLY = 32
"""How many more tokens an evicted conversation, or one with another salt, must share to be the reason."""

EVICTED = 16
"""The number of evicted conversations that are remembered by their tokens."""

SALTS = 64
"""The most salts in which a conversation that would have served is looked for."""


@dataclass(frozen=True)
class Departure:
    """Why a prompt could not reuse more, and where it departs from the closest stored conversation.

    `str` tells it in a sentence.

    Attributes:
        reason: "first prompt": nothing with the prompt's salt is stored. "departs": the closest conversation
            has other tokens from `position` on. "cannot go back": a layer with a window or a recurrent
            state cannot resume where the tokens depart, only earlier. "evicted": a conversation that shared
            more was evicted. "other salt": one that shares more is stored with another salt.
        position: the number of leading tokens that the prompt shares with the closest conversation.
        reused: the number of tokens that were reused.
        lost: the number of tokens that the closest conversation could have saved in addition, if the prompt
            had gone on as it does.
        before: the last tokens before `position`, at most 8.
        stored: the next tokens of the closest conversation, at most 8; none if it has another salt.
        prompt: the next tokens of the prompt, at most 8.
        decode: makes text of tokens in `str`; None shows their IDs.
    """

    reason: Reason
    position: int
    reused: int
    lost: int
    before: tuple[int, ...]
    stored: tuple[int, ...]
    prompt: tuple[int, ...]
    decode: Decode | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        if self.reason == "first prompt":
            return "no conversation is stored"
        if self.reason == "other salt":
            return f"{self.position} leading tokens of the prompt are stored with another salt only"
        closest = "an evicted conversation" if self.reason == "evicted" else "the closest stored conversation"
        if not self.position:
            text = f"no stored conversation begins as the prompt does, with {self._text(self.prompt)}"
        elif not self.stored:
            text = f"the prompt shares {self.position} tokens with {closest}, which ends there"
        elif not self.prompt:
            text = f"the whole prompt is in {closest}"
        else:
            before, stored, prompt = map(self._text, (self.before, self.stored, self.prompt))
            text = f"the prompt departs from {closest} at token {self.position}: "
            text += f"it has {prompt} instead of {stored} after {before}"
        if self.reused < self.position and self.reason != "evicted":
            text += f"; the cache can go back only to token {self.reused}"
        return f"{text}; {self.lost} more tokens would have been reused" if self.lost > 0 else text

    def _text(self, tokens: Sequence[int]) -> str:
        try:
            return repr(self.decode(list(tokens))) if self.decode else str(list(tokens))
        except Exception:  # noqa: BLE001  # numbers that stand for pictures are not tokens of the tokenizer
            return str(list(tokens))


class Evicted:
    """Remembers the newest evicted conversations by their tokens, without their caches."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Hashable, array[int]]] = deque(maxlen=EVICTED)

    def add(self, tokens: Sequence[int], salt: Hashable = None) -> None:
        try:
            self._kept.append((salt, array("q", tokens)))
        except OverflowError:
            # Numbers that stand for pictures may be longer than 64 bits.
            return

    def of(self, salt: Hashable) -> Iterator[tuple[int, ...]]:
        """Return the tokens of those with a salt."""
        return (tuple(tokens) for own, tokens in list(self._kept) if own == salt)


def departure(
    tokens: Sequence[int],
    reused: int,
    closest: Sequence[int] | None,
    evicted: Callable[[], Iterable[tuple[int, ...]]] = list,
    other_salts: Callable[[], Iterable[int]] = list,
    decode: Decode | None = None,
) -> Departure | None:
    """Return why a prompt could not reuse more. None if it goes on from the whole closest conversation.

    Args:
        tokens: the prompt.
        reused: the number of its tokens that are reused.
        closest: the tokens of the stored conversation that shares the longest prefix; () if none shares a
            token, and None if none is stored.
        evicted, other_salts: called only if the prompt departs. They return the tokens of evicted
            conversations, and the numbers of leading tokens that conversations with other salts share.
        decode: makes the text of `str`.
    """
    at_most = len(tokens) - 1
    if not at_most or (closest and reused >= min(at_most, len(closest))):
        return None
    reason: Reason = "first prompt" if closest is None else "departs"
    prompt, nearest = tuple(tokens), tuple(closest or ())
    shared = shared_length(nearest, prompt)
    for gone in evicted():
        common = shared_length(gone, prompt)
        if common >= shared + CLEARLY:
            reason, shared, nearest = "evicted", common, gone
    common = max(other_salts(), default=0)
    if common >= shared + CLEARLY:
        reason, shared, nearest = "other salt", common, prompt[:common]
    lost = min(at_most, len(nearest)) - reused
    if reason == "departs" and 2 * (min(shared, at_most) - reused) > lost:
        # More is lost before the position than after it.
        reason = "cannot go back"
    return Departure(
        reason,
        shared,
        reused,
        lost,
        prompt[max(0, shared - AROUND) : shared],
        nearest[shared : shared + AROUND],
        prompt[shared : shared + AROUND],
        decode,
    )


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
    def splice(self, before: Sequence[int], after: Sequence[int], min_run: int, recompute: float) -> Any: ...
    def end_splice(self) -> None: ...
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
        reused: the number of tokens that were reused from the pool. They are the first ones, unless the
            session was opened with `splice`.
        rest: the tokens that remained to be computed when the session was opened, in order, at least one.
        salt: the salt with which the cache is stored on close.
        store: whether `close` stores the cache. It may be changed until then.
        departure: why not more tokens were reused; None if the conversation goes on from a whole stored one.
    """

    def __init__(
        self,
        pool: Keeper,
        cache: Any,
        tokens: Sequence[int],
        reused: int,
        salt: Hashable,
        store: bool = True,
        departure: Departure | None = None,
        rest: Sequence[int] | None = None,
    ) -> None:
        self.cache = cache
        self.tokens = list(tokens)
        self.reused = reused
        self.rest = self.tokens[reused:] if rest is None else list(rest)
        self._pool = pool
        self.salt = salt
        self.store = store
        self.departure = departure
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

        Everything that was computed is stored, also if the conversation ended early: of a prompt that was
        read in part, this part. With `store` False, the cache is closed instead.

        Tokens in the cache beyond `tokens`, such as an end token that was not passed to `extend`, are
        dropped first. The cache is closed instead of stored if `overflow="shift"` or others removed tokens,
        or if it left the pool, such as by mlx-lm's `kv_bits`.

        Args:
            is_pinned: never evict the cache.
        """
        if not self._is_open:
            return
        if not self.store:
            self.cache.close()
        elif self.cache.gaps != self._gaps:
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

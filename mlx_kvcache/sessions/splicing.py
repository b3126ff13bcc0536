"""Finds the stored conversation of which most can be kept for a prompt that changed before its end."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ..errors import CacheError

TRIED = 4
"""The most stored conversations that a prompt is compared with token by token."""

_MARK = "mlx_kvcache: spliced"


class Splicing(NamedTuple):
    """How `SessionPool.open` splices: see `PromptCache.splice`."""

    min_run: int
    recompute: float


class Stored(Protocol):
    """A stored conversation."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def cache(self) -> Any: ...


S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class Spliced(Generic[S]):
    """A fork of a stored cache that goes on to a prompt.

    Attributes:
        stored: the conversation whose cache it is.
        cache: the fork.
        plan: what is kept, and what is to be computed; see `PromptCache.splice`.
    """

    stored: S
    cache: Any
    plan: Any


def spliced_salt(salt: Hashable) -> Hashable:
    """Return the salt with which spliced caches are stored.

    Their keys and values were computed in other contexts, so they must not be served as exact ones.
    """
    return (_MARK, salt)


def best_splice(
    stored: Iterable[S], tokens: Sequence[int], splicing: Splicing, more_than: int
) -> tuple[Spliced[S] | None, str]:
    """Return the splice that keeps most of a prompt, if it keeps more than some number of tokens.

    After it, why tokens after a change could not be kept: "" if they could.

    Args:
        stored: the conversations to try, the likeliest first. At most `TRIED` are.
    """
    best: Spliced[S] | None = None
    refusal = ""
    for entry in islice(stored, TRIED):
        try:
            cache = entry.cache.fork()
        except CacheError:
            # Another thread has evicted it, or its model no longer exists.
            continue
        try:
            plan = cache.splice(entry.tokens, tokens, *splicing)
        except CacheError:
            # The prompt is longer than the capacity, which the model's call will tell.
            cache.close()
            continue
        refusal = refusal or plan.refusal or ""
        if plan.kept > more_than:
            if best:
                best.cache.close()
            best, more_than = Spliced(entry, cache, plan), plan.kept
        else:
            cache.close()
    return best, refusal

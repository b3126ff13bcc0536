"""mlx-lm's store of prompt caches, for caches that know exactly where they can go on.

`LRUPromptCache` asks a cache whether it can be trimmed, but not by how much. A window cannot be
trimmed by any number, and a recurrence by some. So a stored cache is used up to the newest
position that it can go on from, and shorter prefixes are kept where a longer cache cannot go
back to them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from .observe import Observable
from .rows import Rows

LRUPromptCache = mlx_lm_cache.LRUPromptCache
original_fetch = LRUPromptCache.fetch_nearest_cache
original_insert = LRUPromptCache.insert_cache


def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    """Stands in for `LRUPromptCache.fetch_nearest_cache`: a fork of what serves the longest prefix.

    At least one token is always left to compute, without which there is nothing to sample from.
    """
    if len(tokens) < 2:
        return None, tokens
    found = self._trie.search(model, tokens[:-1])
    prefixes = {
        tuple(prefix): common
        for prefix, common in (
            (found.exact, len(tokens) - 1),
            (found.shorter, len(tokens) - 1),
            (found.longer, found.common_prefix),
        )
        if prefix
    }
    all_stored = {prefix: self._trie.get(found.model, list(prefix)).prompt_cache for prefix in prefixes}
    stored = {prefix: cache for prefix, cache in all_stored.items() if is_ours(cache)}
    if not stored:
        fetched: tuple[list[Any] | None, list[int]] = original_fetch(self, model, tokens)
        return fetched
    points = {prefix: resume_point(cache, prefixes[prefix]) for prefix, cache in stored.items()}
    best = max(points, key=points.__getitem__)
    if not points[best]:
        return None, tokens
    fork = copy.deepcopy(stored[best])
    # A cache may hold fewer tokens than it is stored under, where the last was never fed.
    behind = {id(rows): rows.positions[0] - points[best] for rows in _rows(fork)}
    for entry in fork:
        entry.trim(behind[id(entry.rows)] if isinstance(entry, Observable) else max(behind.values()))
    return fork, tokens[points[best] :]


def insert_cache(
    self: Any, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
) -> None:
    """Stands in for `LRUPromptCache.insert_cache`: drops those shorter prefixes that this cache serves.

    A cache that has shifted is not kept: it is not that of these tokens.
    """
    if any(rows.conversation.gaps for rows in _rows(prompt_cache)):
        return
    trie = self._trie
    if is_ours(prompt_cache):
        self._trie = _KeepingTrie(trie, prompt_cache)
    try:
        original_insert(self, model, tokens, prompt_cache, cache_type=cache_type)
    finally:
        self._trie = trie


class _KeepingTrie:
    """A trie that gives up only those prefixes that a longer cache can go back to."""

    def __init__(self, trie: Any, cache: Sequence[Any]) -> None:
        self._trie = trie
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trie, name)

    def pop_prefixes(self, model: Any, tokens: list[int]) -> list[tuple[int, Any]]:
        served = []
        for length, entry in self._trie.pop_prefixes(model, tokens):
            if resume_point(self._cache, length) == length:
                served.append((length, entry))
            else:
                self._trie.add(model, tokens[:length], entry)
        return served


def is_ours(cache: Sequence[Any]) -> bool:
    """Whether a list has layers of this package; those of a draft model may be others."""
    return any(isinstance(entry, Observable) for entry in cache)


def resume_point(cache: Sequence[Any], position: int) -> int:
    """The newest position <= `position` that every cache of a list, some of them ours, can go on from."""
    all_rows = _rows(cache)
    point = min(position, *(rows.positions[0] for rows in all_rows))
    while (lower := min(rows.resume_point(point) for rows in all_rows)) < point:
        point = lower
    theirs = (entry for entry in cache if not isinstance(entry, Observable))
    is_end = all(point == rows.positions[0] for rows in all_rows)
    return point if is_end or all(entry.is_trimmable() for entry in theirs) else 0


def _rows(cache: Sequence[Any]) -> list[Rows]:
    """What the layers of this package in a list belong to; two where a draft model's are ours, too."""
    found = {id(entry.rows): entry.rows for entry in cache if isinstance(entry, Observable)}
    return list(found.values())  # type: ignore[arg-type]

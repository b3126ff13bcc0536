"""Patches mlx-lm's `LRUPromptCache` so that it reuses as much of a stored cache as can be resumed.

`LRUPromptCache` asks whether a cache can be trimmed, but not by how much. A sliding window can be trimmed
only so far, and a recurrent layer further back only to checkpoints. With these functions,

- a lookup resumes a fork of a stored cache at the newest position that all its layers support, and marks
  where the prompt branches off, so that recurrent layers leave a checkpoint there;
- storing a cache keeps those shorter prefixes that the new cache cannot roll back to;
- a prompt that could not reuse all of a stored one is logged with the place where the two depart.

Caches of other packages are stored and found as in mlx-lm.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from ...errors import CacheError
from ...radix_tree import PrefixTree, Texts
from ...sessions.prefix_cache import branches_off, mark_turns
from ...sessions.session import Evicted, Reason, departure
from ..forward.batch_rows import Rows
from ..hosts.observe import Observable
from . import mlx_lm_splice

LRUPromptCache = mlx_lm_cache.LRUPromptCache
original_fetch = LRUPromptCache.fetch_nearest_cache
original_insert = LRUPromptCache.insert_cache

CANDIDATES = 32
"""The maximum number of stored caches that a lookup compares."""

_loaded: weakref.WeakKeyDictionary[Any, list[weakref.ref[Any]]] = weakref.WeakKeyDictionary()
"""The models that are loaded now, by store. Stores of unknown models have no entry."""


_texts: weakref.WeakKeyDictionary[Any, Texts] = weakref.WeakKeyDictionary()
"""The texts of tokens, by tokenizer."""

_tokenizers: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The tokenizer of the prompts that each store has last been asked for."""


def note_models(store: Any, models: Iterable[Any]) -> None:
    """Set the models that a store serves. Caches of other models are dropped at the next access."""
    _loaded[store] = [weakref.ref(model) for model in models]


def retokenized(store: Any, model: Any, tokens: list[int], tokenizer: Any) -> list[int]:
    """Return tokens of the same text that reuse more; see `SessionPool.retokenize`.

    Also notes the tokenizer, so that `fetch_nearest_cache` logs text.
    """
    _tokenizers[store] = weakref.ref(tokenizer)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokens
    texts = _texts.get(tokenizer)
    if texts is None:
        texts = _texts[tokenizer] = Texts(tokenizer)
    for key in mlx_lm_splice.keys_of(model) if mlx_lm_splice.splicing else (model,):
        tokens = texts.retokenized(tokens, _indexed(store).tree(key))
    return tokens


def fetch_nearest_cache(self: Any, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    """Replaces `LRUPromptCache.fetch_nearest_cache`: forks the cache that serves the longest prefix.

    At least one token is left to compute, because sampling needs its logits. Where prompts are spliced, the
    cache may have joined runs from a stored one instead; see `mlx_lm_splice`.
    """
    index = _indexed(self)
    matches = list(islice(index.matches(model, tokens), CANDIDATES))
    ours = [(common, entry.prompt_cache) for common, (_, entry) in matches if is_ours(entry.prompt_cache)]
    fetched: tuple[list[Any] | None, list[int]]
    if ours:
        try:
            fetched = _forked(ours, tokens)
        except CacheError as error:
            logging.warning("a stored prompt cache cannot be used, the prompt is computed again: %s", error)
            return None, tokens
    else:
        fetched = original_fetch(self, model, tokens)
    reused = len(tokens) - len(fetched[1])
    _log_departure(self, index, model, tokens, reused, matches)
    if mlx_lm_splice.splicing:
        candidates = _candidates(self, index, model, tokens)
        fetched = mlx_lm_splice.fetch_spliced(candidates, tokens, reused) or fetched
    return fetched


def _log_departure(
    store: Any, index: Index, model: Any, tokens: list[int], reused: int, matches: list[tuple[int, Any]]
) -> None:
    """Log where a prompt departs from the closest stored one, if it could not reuse all of it."""
    closest = matches[0][1][0] if matches else ()
    tokenizer = _tokenizers.get(store, lambda: None)()
    found = departure(
        tokens,
        reused,
        closest if index.tree(model) else None,
        lambda: index.evicted.of(model),
        decode=getattr(tokenizer, "decode", None),
    )
    if found:
        index.departures[found.reason] += 1
        n = index.departures[found.reason]
        logging.info(
            "Reused %s of %s tokens: %s (%s, %s so far)", reused, len(tokens), found, found.reason, n
        )


def _candidates(store: Any, index: Index, model: Any, tokens: list[int]) -> list[mlx_lm_splice.Stored]:
    """Return stored conversations of this package that a prompt may be spliced from.

    First those with the longest common prefix, then the newest.
    """
    keys = mlx_lm_splice.keys_of(model)
    closest = [(key, found[0]) for key in keys for _, found in islice(index.matches(key, tokens), 1)]
    newest = [own for lru in store._lru._lrus.values() for own in reversed(lru) if own[0] in keys]
    found: dict[int, mlx_lm_splice.Stored] = {}
    for key, held in [*closest, *newest]:
        entries = index.get(key, held).prompt_cache
        all_rows = rows_of(entries)
        if len(all_rows) == 1 and all(isinstance(entry, Observable) for entry in entries):
            found.setdefault(id(entries), mlx_lm_splice.stored(held, all_rows[0]))
    return list(found.values())


def _forked(ours: list[tuple[int, list[Any]]], tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
    best: tuple[int, list[Any]] = (0, ours[0][1])
    for common, cache in ours:
        most = min(common, len(tokens) - 1)
        if most <= best[0]:
            break
        best = max(best, (resume_point(cache, most), cache), key=lambda pair: pair[0])
    point, found = best
    shared = ours[0][0]
    is_recurrent = any(rows.pool.layout.is_recurrent for rows in rows_of(found))
    if not point and not (is_recurrent and branches_off(shared, point, len(tokens))):
        return None, tokens
    fork = copy.deepcopy(found)
    # The cache may hold fewer tokens than its key: the last token generated was never fed.
    behind = {id(rows): rows.positions[0] - point for rows in rows_of(fork)}
    for entry in fork:
        entry.trim(behind[id(entry.rows)] if isinstance(entry, Observable) else max(behind.values()))
    for rows in rows_of(fork):
        rows.conversation.text = None
        mark_turns(rows, shared, point, len(tokens))
    return fork, tokens[point:]


def insert_cache(
    self: Any, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
) -> None:
    """Replaces `LRUPromptCache.insert_cache`: drops only the prefixes that the new cache can serve.

    Skips a cache that has shifted (it no longer holds these tokens) and one that raises an error.
    """
    if not is_ours(prompt_cache):
        original_insert(self, model, tokens, prompt_cache, cache_type=cache_type)
        return
    index = _indexed(self)
    try:
        if any(rows.conversation.gaps for rows in rows_of(prompt_cache)):
            return
        for rows in rows_of(prompt_cache):
            model, tokens = mlx_lm_splice.recorded(rows.conversation, model, tokens)
            rows.conversation.waiting = ()
        for length, entry in index.prefixes(model, tokens):
            if is_ours(entry.prompt_cache) and resume_point(prompt_cache, length) == length:
                _remove(self, model, tokens[:length])
        index.keeps_prefixes = True
        original_insert(self, model, tokens, prompt_cache, cache_type=cache_type)
    except CacheError as error:
        logging.warning("a prompt cache is not stored: %s", error)
    finally:
        index.keeps_prefixes = False


def insert_partial(store: Any, model: Any, tokens: Sequence[int], prompt_cache: list[Any]) -> None:
    """Store what was computed of a request that ended early.

    After an error, the cache may hold more tokens than given, or fewer. Does nothing if a stored cache serves
    as much, so that short tries do not evict others.
    """
    if not is_ours(prompt_cache):
        return
    own = model
    for rows in rows_of(prompt_cache):
        own, tokens = mlx_lm_splice.recorded(rows.conversation, model, tokens)
    point = resume_point(prompt_cache, len(tokens))
    key = list(tokens[:point])
    matches = islice(_indexed(store).matches(own, key), CANDIDATES)
    ours = (entry.prompt_cache for common, (_, entry) in matches if common == point)
    if not point or any(is_ours(cache) and resume_point(cache, point) == point for cache in ours):
        return
    # A draft model may have read more or less than the model.
    behind = {id(rows): rows.positions[0] - point for rows in rows_of(prompt_cache)}
    for entry in prompt_cache:
        entry.trim(behind[id(entry.rows)] if isinstance(entry, Observable) else max(behind.values()))
    store.insert_cache(model, key, prompt_cache)


class Index:
    """Replaces mlx-lm's `PromptTrie`, whose search takes time quadratic in the prompt's length.

    Attributes:
        departures: prompts that could not reuse all of a stored one, by `Departure.reason`.
        evicted: the prompts that mlx-lm has evicted.
    """

    def __init__(self) -> None:
        self.departures: Counter[Reason] = Counter()
        self.evicted = Evicted()
        # Whether `pop_prefixes` removes nothing.
        self.keeps_prefixes = False
        self._trees: dict[Any, PrefixTree[tuple[list[int], Any]]] = {}

    def add(self, model: Any, tokens: list[int], value: Any) -> Any:
        before = self._trees.setdefault(model, PrefixTree()).put(tokens, (tokens, value))
        return before and before[1]

    def get(self, model: Any, tokens: list[int]) -> Any:
        return self._trees[model].get(tokens)[1]

    def tree(self, model: Any) -> PrefixTree[tuple[list[int], Any]]:
        """Return the tree of a model. It is empty, and is not kept, if nothing is stored."""
        return self._trees.get(model) or PrefixTree()

    def pop(self, model: Any, tokens: list[int]) -> Any:
        """Remove a prompt that mlx-lm evicts."""
        self.evicted.add(tokens, model)
        return self.remove(model, tokens)

    def remove(self, model: Any, tokens: list[int]) -> Any:
        _, value = self._trees[model].pop(tokens)
        if not self._trees[model]:
            del self._trees[model]
        return value

    def matches(self, model: Any, tokens: list[int]) -> Iterator[tuple[int, tuple[list[int], Any]]]:
        """Yield (length of the shared prefix, (tokens, value)); see `PrefixTree.matches`."""
        return self.tree(model).matches(tokens)

    def prefixes(self, model: Any, tokens: list[int]) -> list[tuple[int, Any]]:
        """Return the length and the value of each stored proper prefix of these tokens."""
        matches = self.matches(model, tokens)
        return [(n, value) for n, (stored, value) in matches if n == len(stored) < len(tokens)]

    def pop_prefixes(self, model: Any, tokens: list[int]) -> list[tuple[int, Any]]:
        prefixes = [] if self.keeps_prefixes else self.prefixes(model, tokens)
        return [(length, self.remove(model, tokens[:length])) for length, _ in prefixes]

    def search(self, model: Any, tokens: list[int]) -> Any:
        """Search as `PromptTrie.search` does. It ignores prefixes of one token."""
        found = [(common, stored) for common, (stored, _) in self.matches(model, tokens)]
        lengths = {len(stored) for common, stored in found if common == len(stored)}
        if len(tokens) in lengths:
            return mlx_lm_cache.PromptTrieResult(model, tokens, None, None, 0)
        common = max((common for common, _ in found), default=0)
        shorter = max((length for length in lengths if length > 1), default=0)
        longer = min((stored for c, stored in found if c == common), key=len, default=None)
        return mlx_lm_cache.PromptTrieResult(
            model, None, tokens[:shorter] or None, longer if common else None, common
        )


def is_ours(cache: Sequence[Any]) -> bool:
    """Whether any layer in the list is of this package. A draft model's layers may be mlx-lm's."""
    return any(isinstance(entry, Observable) for entry in cache)


def resume_point(cache: Sequence[Any], position: int) -> int:
    """The newest position <= `position` that every layer of a list can resume from. One must be ours."""
    all_rows = rows_of(cache)
    point = min(position, *(rows.positions[0] for rows in all_rows))
    while (lower := min(rows.resume_point(point) for rows in all_rows)) < point:
        point = lower
    theirs = (entry for entry in cache if not isinstance(entry, Observable))
    is_end = all(point == rows.positions[0] for rows in all_rows)
    return point if is_end or all(entry.is_trimmable() for entry in theirs) else 0


def rows_of(cache: Sequence[Any]) -> list[Rows]:
    """The `Rows` of this package's layers in a list: two if a draft model's layers are among them."""
    found = {id(entry.rows): entry.rows for entry in cache if isinstance(entry, Observable)}
    return list(found.values())  # type: ignore[arg-type]


def _indexed(store: Any) -> Index:
    """The store's `Index`, which replaces mlx-lm's trie on first use.

    Drops caches that are closed or whose model is no longer loaded, or was loaded again as a new object.
    """
    stored = [key for lru in store._lru._lrus.values() for key in lru]
    if not isinstance(store._trie, Index):
        index = Index()
        for model, tokens in stored:
            index.add(model, tokens, store._trie.get(model, tokens))
        store._trie = index
    loaded = _loaded.get(store)
    live = None if loaded is None else [model() for model in loaded]
    for model, tokens in stored:
        cache = store._trie.get(model, tokens).prompt_cache
        if any(_is_stale(rows, live) for rows in rows_of(cache)):
            _remove(store, model, tokens)
    trie: Index = store._trie
    return trie


def _is_stale(rows: Rows, live: list[Any] | None) -> bool:
    model = rows.pool.model
    if model is None or (live is not None and all(model is not other for other in live)):
        return True
    try:
        rows.check_open()
    except CacheError:
        return True
    return False


def _remove(store: Any, model: Any, tokens: list[int]) -> None:
    entry = store._trie.remove(model, tokens)
    store._n_bytes -= entry.nbytes
    store._n_bytes_by_type[entry.cache_type] -= entry.nbytes
    store._lru.remove(model, tokens)

"""Trying a model on its caches before anybody relies on them.

A graph of a few tokens is built and not evaluated, so that it costs no more than Python's time:
whatever a model asks of a cache that it does not get shows here, and not in the middle of a text.
"""

from __future__ import annotations

import threading
import weakref

import mlx.core as mx

from ..errors import NotSupportedError
from .conversation import Conversation
from .layers import entries_of
from .pool import Pool
from .rows import Rows

_used: dict[int, frozenset[int]] = {}
"""For each model that passed, by id: the leaves that it writes."""
_lock = threading.RLock()


def try_out(pool: Pool) -> None:
    """Find out which leaves the model writes. Raises NotSupportedError if it cannot run on these caches."""
    key = id(pool.model)
    with _lock:
        if key not in _used:
            _used[key] = _written(pool)
            weakref.finalize(pool.model, _used.pop, key, None)
    pool.used = _used[key]


def _written(pool: Pool) -> frozenset[int]:
    rows = Rows(pool, [Conversation(pool, None, "error", 0)], is_batch=False)
    cache, module = entries_of(rows), type(pool.model).__module__
    written: set[int] = set()
    for n in (2, 1):
        try:
            pool.model(mx.zeros((1, n), mx.int32), cache=cache)
        except Exception as error:
            raise NotSupportedError(f"{module} does not run on these caches: {error!r}") from error
        written |= rows.written_last
    return frozenset(written)

"""What a pool has stored, kept for a moment so that a forward leaves nothing behind.

A forward that is taken back frees its cells, but what was to be written there stays in the arrays'
graphs. Of ranks that came to different points of a model, these graphs hold different collectives,
and whoever evaluates an array later would wait for what the others never send.
"""

from __future__ import annotations

import mlx.core as mx

from ..arrays.pairs import AnyPair
from ..arrays.store import Buffers
from ..caches.recurrent import RecurrentCache
from .pool import Pool


def arrays_of(pool: Pool) -> list[mx.array]:
    """All that the model's last calls have written: keys, values, and the newest state of each recurrence."""
    states = [
        array
        for cache in pool.caches
        if isinstance(cache, RecurrentCache)
        for stream in cache._streams.values()
        for arrays in stream.states.get(stream.end, {}).values()
        for array in arrays
        if array is not None
    ]
    return pool.buffers + states


Kept = dict[int, tuple[Buffers, dict[int, AnyPair]]]
"""By leaf: its buffers, and copies of their pairs by segment."""


def keep(pool: Pool) -> Kept:
    """All arrays as they are. Let go of it before anything is evaluated, or MLX copies what it changes."""
    return {
        leaf: (buffers, {segment: pair.copy() for segment, pair in buffers.pairs.items()})
        for _, cache in pool.positional()
        for leaf, buffers in cache._store.layers.items()
    }


def put_back(pool: Pool, kept: Kept) -> None:
    """Make all arrays what they were."""
    for _, cache in pool.positional():
        for leaf, buffers in cache._store.layers.items():
            buffers.pairs.clear()
            if leaf in kept and kept[leaf][0] is buffers:
                buffers.pairs.update(kept[leaf][1])

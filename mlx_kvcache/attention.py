"""Put, get and attention in one call."""

from __future__ import annotations

import mlx.core as mx

from .attend.part import Attending
from .caches.base import KeyValueCache, Layer
from .caches.wrapper import WrapperCache
from .errors import NotSupportedError


def attention(
    queries: mx.array,
    keys: mx.array | None,
    values: mx.array | None,
    cache: KeyValueCache | WrapperCache | Layer,
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Store this layer's K and V and attend to its history, one product per sequence.

    Args:
        queries: (1, n_heads, n, head_dim) in batch order; n_heads is a multiple of n_kv_heads.
        keys, values: (1, n_kv_heads, n, head_dim), as for `Cache.put`; both None attend to
            what has been put before, as layers that share K/V and cross-attention do.
        cache: a cache on its current layer, or the handle `cache.layer(i)`.
        scale: of the scores.
        sinks: (n_heads,) learned attention sinks, or None.

    Returns:
        (1, n_heads, n, value_dim), in the queries' dtype.

    Raises:
        ValueError, CacheError: as `Cache.put` and `Cache.get`; keys without values, or the reverse; queries
            of another number of tokens or another head_dim, whose heads are no multiple of the K/V heads, or
            of no float type; sinks of another number. Nothing is stored then.
        NotSupportedError: a kind that holds no keys and values.
    """
    if (keys is None) != (values is None):
        given, lacking = ("values", "keys") if keys is None else ("keys", "values")
        raise ValueError(f"{given} without {lacking}: give both, or None for both")
    if not isinstance(cache, Layer):
        owner = cache.key_value_cache if isinstance(cache, WrapperCache) else cache
        if not isinstance(owner, KeyValueCache):
            raise NotSupportedError(f"attention to a {type(owner).__name__}, which holds no keys and values")
        cache = Layer(owner, owner._layer)
    return cache.cache._attend(cache.index, Attending(queries, keys, values, scale, sinks))

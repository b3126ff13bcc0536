"""Attention over a cache: `put`, `get` and scaled dot-product attention in one call."""

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
    """Stores this layer's K and V, and attends to its history.

    Each sequence attends to its own keys, without padding; a long prefix that sequences share is read once.

    Args:
        queries: (1, n_heads, n, head_dim) in batch order; n_heads is a multiple of n_kv_heads.
        keys, values: (1, n_kv_heads, n, head_dim), as for `Cache.put`. Pass None for both to attend to
            K and V that were put before, as in cross-attention and in layers that share K/V.
        cache: a cache, which uses its current layer, or a handle from `cache.layer(i)`.
        scale: the factor of the scores.
        sinks: (n_heads,) learned attention sinks, or None.

    Returns:
        (1, n_heads, n, value_dim), in the dtype of the queries.

    Raises:
        ValueError: as `Cache.put`; only one of keys and values; or queries or sinks of the wrong shape or
            dtype. Nothing is stored then.
        CacheError: as `Cache.put` and `Cache.get`.
        NotSupportedError: the cache does not store keys and values.
    """
    if (keys is None) != (values is None):
        given, lacking = ("values", "keys") if keys is None else ("keys", "values")
        raise ValueError(f"got {given} without {lacking}: pass both, or None for both")
    if not isinstance(cache, Layer):
        owner = cache.key_value_cache if isinstance(cache, WrapperCache) else cache
        if not isinstance(owner, KeyValueCache):
            raise NotSupportedError(
                f"cannot attend to a {type(owner).__name__}, which stores no keys and values"
            )
        cache = Layer(owner, owner._layer)
    return cache.cache._attend(cache.index, Attending(queries, keys, values, scale, sinks))

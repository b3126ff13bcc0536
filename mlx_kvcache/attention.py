"""Put, get and attention in one call."""

from __future__ import annotations

import mlx.core as mx

from .caches.base import Layer, PlanningCache


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: PlanningCache | Layer,
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Store this layer's K and V and attend to its history, one product per sequence.

    Args:
        queries: (1, n_heads, n, head_dim) in batch order.
        keys, values: (1, n_kv_heads, n, head_dim), as for `Cache.put`.
        cache: a cache on its current layer, or the handle `cache.layer(i)`.
        scale: of the scores.
        sinks: (n_heads,) learned attention sinks, or None.

    Returns:
        (1, n_heads, n, value_dim).

    Raises:
        ValueError, CacheError: as `Cache.put`.

    """
    layer = cache if isinstance(cache, Layer) else cache.layer(cache._layer)
    return layer._attend(queries, keys, values, scale, sinks)

"""Kinds whose layers store keys and values."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import mlx.core as mx

from .base import PlanningCache, checked_layer
from .interface import History


class Attending(NamedTuple):
    """The arguments of `mlx_kvcache.attention`, but for the cache."""

    queries: mx.array
    keys: mx.array | None
    values: mx.array | None
    scale: float
    sinks: mx.array | None


def check_queries(given: Attending, n: int, layer: int, heads: int, dim: int) -> None:
    """Raise ValueError unless the queries are n tokens' that fit keys with so many heads and features."""
    shape, sinks = given.queries.shape, given.sinks
    if len(shape) != 4 or shape[0] != 1 or shape[2] != n:
        raise ValueError(f"queries are {shape}, expected (1, n_heads, {n}, head_dim)")
    if shape[3] != dim:
        raise ValueError(
            f"queries are {shape}: {shape[3]} features a head, the keys of layer {layer} have {dim}"
        )
    if not shape[1] or shape[1] % heads:
        raise ValueError(
            f"queries are {shape}: {shape[1]} heads are not a multiple of layer {layer}'s {heads} K/V heads"
        )
    if not mx.issubdtype(given.queries.dtype, mx.floating):
        raise ValueError(f"queries are {given.queries.dtype}, expected floats")
    if sinks is not None and sinks.shape != (shape[1],):
        raise ValueError(f"sinks are {sinks.shape}, expected ({shape[1]},): one for each query head")


class Layer:
    """One model layer of a cache: `put` and `get` without the mode that `set_layer` sets."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: KeyValueCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def put(self, keys: mx.array, values: mx.array) -> None:
        """As `KeyValueCache.put`, for this layer."""
        self.cache._put(self.index, keys, values)

    def get(self) -> History:
        """As `KeyValueCache.get`, for this layer."""
        return self.cache._get(self.index)


class KeyValueCache(PlanningCache):
    """`put` and `get` of keys and values, on the current layer or by a handle."""

    @abstractmethod
    def _put(self, layer: int, keys: mx.array, values: mx.array) -> None: ...
    @abstractmethod
    def _get(self, layer: int) -> History: ...
    @abstractmethod
    def _attend(self, layer: int, given: Attending) -> mx.array: ...

    def layer(self, layer: int) -> Layer:
        """A handle on one model layer. Raises ValueError below 0."""
        return Layer(self, checked_layer(layer))

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Store the batch's keys and values, each (1, n_kv_heads, n, head_dim), in batch order.

        Raises:
            ValueError: a shape that does not fit the batch or the layer, or no float type.
            CacheError: no batch has been started, or its `forward` is over.
        """
        self._put(self._layer, keys, values)

    def get(self) -> History:
        """History for this layer, the batch included: keys, values and mask.

        Keys and values are (1, n_kv_heads, S, head_dim). The mask is None (all n tokens see
        all of S), "causal" (as `mx.fast.scaled_dot_product_attention` means it), or (n, S).

        Raises:
            CacheError: before this layer's `put`.
        """
        return self._get(self._layer)

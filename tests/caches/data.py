"""Position-coded K and V, and forwards with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, CacheConfig, CausalCache
from mlx_kvcache.caches.base import KeyValueCache
from mlx_kvcache.caches.interface import History
from tests.kinds import add_offsets


def coded(
    positions: Iterable[int], heads: int = 1, dims: tuple[int, int] = (2, 3)
) -> tuple[mx.array, mx.array]:
    """Keys that are their position, values that are its negative: (1, heads, n, dim)."""
    column = mx.array(list(positions), mx.float32)[None, None, :, None]
    shapes = [(1, heads, column.shape[2], dim) for dim in dims]
    return mx.broadcast_to(column, shapes[0]), mx.broadcast_to(-column, shapes[1])


def fed(cache: KeyValueCache, positions: Iterable[int], sequence: int = 0, layer: int = 0) -> History:
    """One forward of one sequence; returns what `get` does."""
    batch = Batch(positions, [sequence] * len(list(positions)))
    with cache.forward(batch):
        cache.set_layer(layer)
        cache.put(*coded(batch.positions))
        return cache.get()


def column(array: mx.array) -> list[float]:
    """The first feature of the first head."""
    numbers: list[float] = array[0, 0, :, 0].tolist()  # type: ignore[assignment]
    return numbers


def causal(shift: Any = add_offsets, room: int = 32, config: CacheConfig | None = None) -> CausalCache:
    made = CausalCache(shift)
    if config:
        made.set_config(config)
    made.init(mx.float32, capacity=room, max_batch=room)
    return made


def refused(cache: Any, call: Callable[[], object], error: type[Exception], message: str) -> None:
    """The call raises, says so, and changes nothing."""
    table = cache._table
    before = dict(table.sequences), table.live, dict(table.capacity), cache.nbytes
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    assert (dict(table.sequences), table.live, dict(table.capacity), cache.nbytes) == before
    cache.check()

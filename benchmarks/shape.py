"""Caches and arrays of SmolLM2's shape: attention without the rest of a model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.setting import DIM, HEADS, KV_HEADS, LAYERS
from mlx_kvcache.plugin.ragged import attend

SCALE = DIM**-0.5


def arrays(n: int, seed: int = 0, rows: int = 1) -> tuple[mx.array, mx.array, mx.array]:
    """Queries (rows, 9, n, 64), and keys and values with 3 heads."""
    each = mx.random.split(mx.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    made = [mx.random.normal((rows, h, n, DIM), key=key) for h, key in zip(heads, each, strict=True)]
    mx.eval(made)
    return made[0], made[1], made[2]


def fill(cache: Any, length: int, seed: int = 0, step: int | None = None) -> Any:
    """Write random keys and values into every layer, without attention."""
    _, keys, values = arrays(length, seed)
    for start in range(0, length, step or length):
        stop = min(length, start + (step or length))
        cache[0].make_mask(stop - start, return_array=False, window_size=None)
        for layer in cache:
            layer.update_and_fetch(keys[:, :, start:stop], values[:, :, start:stop])
        evaluate(cache)
    return cache


def evaluate(cache: Any) -> None:
    """Compute all that has been written."""
    mx.eval([array for layer in cache for array in (layer.keys, layer.values)])


def contiguous(length: int, seed: int = 0, layers: int = LAYERS) -> list[KVCache]:
    """mlx-lm's own cache, filled."""
    filled: list[KVCache] = fill([KVCache() for _ in range(layers)], length, seed)
    return filled


def attention(cache: Any, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Update every layer and attend, as a model does; of a batch, the rows' histories as they are."""
    rows = getattr(cache[0], "rows", None) if queries.shape[0] > 1 else None
    n, outputs = queries.shape[2], []
    if rows:
        rows.begin(n, is_called=True)
    mask = cache[0].make_mask(n, return_array=False, window_size=getattr(cache[0], "max_size", None))
    for layer in cache:
        history = layer.update_and_fetch(keys, values)
        outputs.append(attend(queries, history[0], history[1], layer, SCALE, mask))
    if rows:
        rows.finish()
    mx.eval(outputs)
    return outputs[-1]


class Prepared:
    """Keys and values that are there already: what attention costs without a cache."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values
        self.offset = keys.shape[2] - 1

    def make_mask(self, *given: Any, **more: Any) -> None:
        """One token sees all."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        # A model is to compute what it would have stored.
        history = mx.depends([self.keys, self.values], [keys, values])
        return history[0], history[1]


def prepared(length: int, layers: int = LAYERS) -> list[Prepared]:
    """A history of `length` tokens for each layer, each in arrays of its own."""
    cache = []
    for seed in range(layers):
        _, keys, values = arrays(length, seed)
        cache.append(Prepared(keys, values))
    return cache

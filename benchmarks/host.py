"""Measures the cache's overhead on the host: updates without attention."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.measure import speed, timed
from benchmarks.rows import Row
from benchmarks.setting import DIM, KV_HEADS, LAYERS, Setting
from benchmarks.shape import fill
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.storage.codec import index_of
from tests.plugin.tiny import tiny_llama


def run(setting: Setting) -> Iterator[Row]:
    """Microseconds per layer and step for the mask and updates: graph built, and evaluated."""
    model, token = tiny_llama(num_hidden_layers=LAYERS), mx.ones((1, KV_HEADS, 1, DIM))
    mx.eval(token)
    rounds = setting.of(100, 60)
    for context in setting.of((256, 4096, 16384), (1024,)):
        ours = fill(make_prompt_cache(model), context)
        theirs = fill([KVCache() for _ in range(LAYERS)], context)
        for what, evaluated in (("graph built", False), ("built and evaluated", True)):
            yield speed(
                f"host.{'evaluated' if evaluated else 'built'}.{context}",
                f"update of a layer at {context:,}, {what}",
                "us",
                lambda: _step(ours, token, evaluated),  # noqa: B023
                "KVCache",
                lambda: _step(theirs, token, evaluated),  # noqa: B023
                rounds,
                LAYERS,
            )
        bare = Bare(context)
        yield speed(
            f"host.operations.{context}",
            f"its four operations at {context:,} and no cache, built and evaluated",
            "us",
            lambda: timed(lambda: bare.step(token)),  # noqa: B023
            "KVCache",
            lambda: _step(theirs, token, evaluated=True),  # noqa: B023
            rounds,
            LAYERS,
        )


class Bare:
    """The minimum of MLX operations for a cache: two assignments and two slices for each layer."""

    def __init__(self, length: int) -> None:
        shape = 1, KV_HEADS, length + 256, DIM
        self._layers = [(mx.zeros(shape), mx.zeros(shape)) for _ in range(LAYERS)]
        self._length = length
        mx.eval(self._layers)

    def step(self, token: mx.array) -> None:
        new, seen = index_of(self._length, self._length + 1), index_of(0, self._length + 1)
        self._length += 1
        histories = []
        for keys, values in self._layers:
            keys[new], values[new] = token, token
            histories.append((keys[seen], values[seen]))
        mx.eval(histories)


def _step(cache: Any, token: mx.array, evaluated: bool) -> float:
    start = time.perf_counter()
    cache[0].make_mask(1, return_array=False, window_size=None)
    histories = [layer.update_and_fetch(token, token) for layer in cache]
    built = time.perf_counter()
    mx.eval(histories)
    return (time.perf_counter() if evaluated else built) - start

"""What the cache costs where nothing is multiplied."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.measure import speed
from benchmarks.rows import Row
from benchmarks.setting import DIM, KV_HEADS, LAYERS, Setting
from benchmarks.shape import fill
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama


def run(setting: Setting) -> Iterator[Row]:
    """Microseconds per layer and step of the mask and updates: the graph built, and evaluated."""
    model, token = tiny_llama(num_hidden_layers=LAYERS), mx.ones((1, KV_HEADS, 1, DIM))
    mx.eval(token)
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
                # So many steps stay below the next growth of either.
                setting.of(100, 60),
                LAYERS,
            )


def _step(cache: Any, token: mx.array, evaluated: bool) -> float:
    start = time.perf_counter()
    cache[0].make_mask(1, return_array=False, window_size=None)
    histories = [layer.update_and_fetch(token, token) for layer in cache]
    built = time.perf_counter()
    mx.eval(histories)
    return (time.perf_counter() if evaluated else built) - start

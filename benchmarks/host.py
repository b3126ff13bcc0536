"""Python time of the cache, nothing evaluated."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.measure import paired
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama

LAYERS = 30
CONTEXTS = (256, 1024, 4096, 16384, 32768)


def run() -> Iterator[str]:
    """Microseconds per layer and step of update_and_fetch and the mask, against KVCache's."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    token = mx.zeros((1, 3, 1, 64))
    mx.eval(token)
    for context in CONTEXTS:
        ours = _filled(make_prompt_cache(model), context)
        theirs = _filled([KVCache() for _ in range(LAYERS)], context)
        # 200 steps stay below the next growth of either.
        result = paired(lambda: _step(ours, token), lambda: _step(theirs, token), 200, f"{context}")  # noqa: B023
        micro = 1e6 / LAYERS
        yield (
            f"{context:6} tokens: ours {result.ours * micro:5.1f} us, "
            f"KVCache {result.theirs * micro:5.1f} us, ratio {result}"
        )


def _filled(cache, context: int):
    kv = mx.zeros((1, 3, context, 64))
    cache[0].make_mask(context, return_array=False, window_size=None)
    for layer in cache:
        layer.update_and_fetch(kv, kv)
    mx.eval([layer.state for layer in cache])
    return cache


def _step(cache, token: mx.array) -> float:
    start = time.perf_counter()
    cache[0].make_mask(1, return_array=False, window_size=None)
    for layer in cache:
        layer.update_and_fetch(token, token)
    seconds = time.perf_counter() - start
    mx.eval([layer.state for layer in cache])
    return seconds

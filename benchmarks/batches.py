"""Decoding several sequences at once with SmolLM2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from benchmarks.measure import paired, timed
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.ragged import attend
from tests.plugin.running import difference

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
ROUNDS = 20
LENGTHS = {
    "8 of 512": [512] * 8,
    "8 of 64": [64] * 8,
    "one of 2048, seven of 64": [2048] + [64] * 7,
}


def run() -> Iterator[str]:
    """A decode step of 8 sequences, of equal and of unequal lengths, against BatchKVCache."""
    model, _ = smollm2.load(mx.float32)
    for name, lengths in LENGTHS.items():
        ours, theirs = _batch(model, lengths), _their_batch(lengths)
        yield _compared(f"{name}, SmolLM2", lambda cache: _step(model, cache), ours, theirs)
        yield _compared(f"{name}, cache and attention only", attention, ours, theirs)


def _compared(name: str, step: Callable[[Any], mx.array], ours: Any, theirs: Any) -> str:
    assert difference(step(ours), step(theirs)) <= 1e-3
    result = paired(lambda: timed(lambda: step(ours)), lambda: timed(lambda: step(theirs)), ROUNDS, name)
    return (
        f"{name}: {1e3 * result.ours:.1f} ms, BatchKVCache {1e3 * result.theirs:.1f} ms, "
        f"speed {1 / result.ratio:.2f} of theirs (time {result})"
    )


def _step(model: Any, cache: Any) -> mx.array:
    logits: mx.array = model(mx.array([[5]] * 8), cache=cache)
    mx.eval(logits)
    return logits


def attention(cache: Any) -> mx.array:
    """The caches' part of a step, with the same queries and keys in every layer."""
    rows = 1 if isinstance(cache[0].offset, int) else cache[0].offset.shape[0]
    queries, keys = (_arrays(9, heads, 1, rows) for heads in (HEADS, KV_HEADS))
    rows_here = getattr(cache[0], "rows", None)
    if rows_here:
        rows_here.begin(1, is_called=True)
    mask, outputs = cache[0].make_mask(1, return_array=False, window_size=None), []
    for layer in cache:
        history = layer.update_and_fetch(keys, keys)
        outputs.append(attend(queries, history[0], history[1], layer, DIM**-0.5, mask))
    if rows_here:
        rows_here.finish()
    mx.eval(outputs)
    return outputs[-1]


def _arrays(seed: int, heads: int, n: int, rows: int = 1) -> mx.array:
    return mx.random.normal((rows, heads, n, DIM), key=mx.random.key(seed))


def fill(cache, length: int, seed: int) -> None:
    keys = _arrays(seed, KV_HEADS, length)
    for layer in cache:
        layer.make_mask(length, return_array=False, window_size=None)
        break
    for layer in cache:
        layer.update_and_fetch(keys, keys)
    mx.eval([layer.state for layer in cache])


def merged(caches):
    return [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]


def _batch(model, lengths):
    caches = [make_prompt_cache(model) for _ in lengths]
    for seed, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        fill(cache, length, seed)
    return merged(caches)


def _their_batch(lengths):
    caches = [contiguous(length, seed) for seed, length in enumerate(lengths)]
    merged = [BatchKVCache.merge([cache[i] for cache in caches]) for i in range(LAYERS)]
    mx.eval([layer.state for layer in merged])
    return merged


def contiguous(length: int, seed: int = 0):
    cache = [KVCache() for _ in range(LAYERS)]
    fill(cache, length, seed)
    return cache

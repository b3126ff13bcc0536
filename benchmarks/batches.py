"""Decoding several sequences at once: cache and attention of a model of SmolLM2's shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache, KVCache

from benchmarks.measure import paired, timed
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.ragged import attend
from tests.plugin.running import difference
from tests.plugin.tiny import tiny_llama

LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
ROUNDS = 20
LENGTHS = {
    "8 of 512": [512] * 8,
    "8 of 64": [64] * 8,
    "one of 2048, seven of 64": [2048] + [64] * 7,
}
PREFIX, OWN = 2048, 64


def run() -> Iterator[str]:
    """A decode step of 8 sequences, unequal ones and ones with a shared prefix, against BatchKVCache."""
    model = tiny_llama(
        num_hidden_layers=LAYERS,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    for name, lengths in LENGTHS.items():
        yield _compared(name, _batch(model, lengths), _their_batch(lengths))
    shared = _shared(model)
    pool = shared[0].rows.pool
    alone = sum(array.nbytes for array in pool.buffers)
    one = LAYERS * KV_HEADS * DIM * 4 * 2 * (PREFIX + OWN)
    yield f"8 on a prefix of {PREFIX}, {OWN} own: K and V {alone / 1e6:.1f} MB, {alone / one:.2f} of one's"
    unshared = [_contiguous(PREFIX + OWN) for _ in range(8)]
    ours = lambda: _ours(shared)  # noqa: E731
    result = paired(lambda: timed(ours), lambda: timed(lambda: _each(unshared)), ROUNDS, "prefix")
    yield f"  a step: {1e3 * result.ours:.1f} ms, eight KVCaches {1e3 * result.theirs:.1f} ms, ratio {result}"
    yield _compared("  the same beside one padded batch", shared, _their_batch([PREFIX + OWN] * 8))


def _compared(name: str, ours: Any, theirs: Any) -> str:
    assert difference(_ours(ours)[-1], _theirs(theirs)[-1]) <= 1e-5
    result = paired(lambda: timed(lambda: _ours(ours)), lambda: timed(lambda: _theirs(theirs)), ROUNDS, name)
    return (
        f"{name}: {1e3 * result.ours:.1f} ms, BatchKVCache {1e3 * result.theirs:.1f} ms, "
        f"speed {1 / result.ratio:.2f} of theirs (time {result})"
    )


def _arrays(seed: int, heads: int, n: int, rows: int = 1) -> mx.array:
    return mx.random.normal((rows, heads, n, DIM), key=mx.random.key(seed))


def _fill(cache, length: int, seed: int) -> None:
    keys = _arrays(seed, KV_HEADS, length)
    for layer in cache:
        layer.make_mask(length, return_array=False, window_size=None)
        break
    for layer in cache:
        layer.update_and_fetch(keys, keys)
    mx.eval([layer.state for layer in cache])


def _merged(caches):
    return [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]


def _batch(model, lengths):
    caches = [make_prompt_cache(model) for _ in lengths]
    for seed, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        _fill(cache, length, seed)
    return _merged(caches)


def _their_batch(lengths):
    caches = [_contiguous(length, seed) for seed, length in enumerate(lengths)]
    merged = [BatchKVCache.merge([cache[i] for cache in caches]) for i in range(LAYERS)]
    mx.eval([layer.state for layer in merged])
    return merged


def _contiguous(length: int, seed: int = 0):
    cache = [KVCache() for _ in range(LAYERS)]
    _fill(cache, length, seed)
    return cache


def _shared(model):
    origin = make_prompt_cache(model)
    _fill(origin, PREFIX, 0)
    forks = [origin.fork() for _ in range(8)]
    origin.close()
    for fork in forks:
        _fill(fork, OWN, 0)
    return _merged(forks)


def _ours(cache) -> list[mx.array]:
    rows = cache[0].rows
    queries, keys = (_arrays(9, heads, 1, len(rows.conversations)) for heads in (HEADS, KV_HEADS))
    rows.begin(1)
    assert rows.forward.is_ragged
    mask, outputs = cache[0].make_mask(1), []
    for layer in cache:
        history = layer.update_and_fetch(keys, keys)
        outputs.append(attend(queries, history[0], history[1], layer, DIM**-0.5, mask))
    mx.eval(outputs)
    return outputs


def _theirs(cache) -> list[mx.array]:
    rows = cache[0].offset.shape[0]
    queries, keys = (_arrays(9, heads, 1, rows) for heads in (HEADS, KV_HEADS))
    mask, outputs = cache[0].make_mask(1), []
    for layer in cache:
        held = layer.update_and_fetch(keys, keys)
        outputs.append(scaled_dot_product_attention(queries, *held, cache=layer, scale=DIM**-0.5, mask=mask))
    mx.eval(outputs)
    return outputs


def _each(caches) -> None:
    queries, keys = _arrays(9, HEADS, 1), _arrays(9, KV_HEADS, 1)
    outputs = []
    for cache in caches:
        for layer in cache:
            held = layer.update_and_fetch(keys, keys)
            outputs.append(
                scaled_dot_product_attention(queries, *held, cache=layer, scale=DIM**-0.5, mask=None)
            )
    mx.eval(outputs)

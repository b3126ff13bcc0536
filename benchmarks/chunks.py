"""Measures chunked attention, as in Llama 4."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache

from benchmarks.measure import check_equal, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import LAYERS, Setting
from benchmarks.shape import SCALE, arrays, evaluate
from mlx_kvcache import Batch, ChunkedAttentionCache, attention

CHUNK, BLOCK, STEPS = 512, 256, 4
PREFILL = 4 * CHUNK
SDPA = mx.fast.scaled_dot_product_attention


def run(setting: Setting) -> Iterator[Row]:
    """Chunks of 512: decoding and storage, against ChunkedKVCache."""
    ours, theirs = _ours(), [ChunkedKVCache(CHUNK) for _ in range(LAYERS)]
    for start in range(0, PREFILL, BLOCK):
        block = arrays(BLOCK, start)
        _step(ours, *block)
        _store(theirs, *block)
    # Decoding is measured in the middle of a chunk, where tokens see half a chunk.
    token = arrays(1, 99)
    for _ in range(CHUNK // 2):
        check_equal(_step(ours, *token), _their_step(theirs, *token))
    yield held(
        "chunks.bytes",
        f"K and V after {PREFILL + CHUNK // 2:,} in chunks of {CHUNK}",
        ours.nbytes,
        "ChunkedKVCache",
        sum(layer.nbytes for layer in theirs),
    )
    yield speed(
        "chunks.decode",
        f"a token in chunks of {CHUNK}",
        "ms",
        lambda: timed(lambda: [_step(ours, *token) for _ in range(STEPS)]),
        "ChunkedKVCache",
        lambda: timed(lambda: [_their_step(theirs, *token) for _ in range(STEPS)]),
        setting.of(20, 6),
        STEPS,
    )


def _ours() -> ChunkedAttentionCache:
    cache = ChunkedAttentionCache(CHUNK)
    cache.init(mx.float32, capacity=1 << 20, max_batch=BLOCK)
    return cache


def _step(cache: ChunkedAttentionCache, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    with cache.forward(Batch.run(0, cache.end(0), q.shape[2])):
        outputs = [attention(q, k, v, cache.layer(i), scale=SCALE) for i in range(LAYERS)]
    mx.eval(outputs)
    return outputs[-1]


def _store(cache: list[ChunkedKVCache], q: mx.array, k: mx.array, v: mx.array) -> None:
    for layer in cache:
        layer.maybe_trim_front()
        layer.update_and_fetch(k, v)
    evaluate(cache)


def _their_step(cache: list[ChunkedKVCache], q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend as mlx-lm's llama4 does; its mask hides past chunks."""
    outputs = []
    for layer in cache:
        layer.maybe_trim_front()
        start, end = layer.start_position, layer.offset + 1
        keys, values = layer.update_and_fetch(k, v)
        positions = mx.arange(start, end)
        mask = (positions // CHUNK == (end - 1) // CHUNK)[None]
        outputs.append(SDPA(q, keys, values, scale=SCALE, mask=mask))
    mx.eval(outputs)
    return outputs[-1]

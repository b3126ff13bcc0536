"""Measures sliding windows, including attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import RotatingKVCache

from benchmarks.measure import check_equal, once, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import LAYERS, Setting
from benchmarks.shape import SCALE, arrays, attention
from mlx_kvcache import Batch, SlidingWindowCache
from mlx_kvcache import attention as attend
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama

WINDOW, BLOCK, REWIND, STEPS = 512, 512, 64, 32
SDPA = mx.fast.scaled_dot_product_attention


def run(setting: Setting) -> Iterator[Row]:
    """A window of 512: decoding, prefill, storage and rewinding, against RotatingKVCache."""
    prefill = setting.of(4096, 1024)
    blocks = [arrays(BLOCK, start) for start in range(0, prefill, BLOCK)]
    ours, theirs = _ours(), _theirs()
    check_equal(_fill(ours, blocks), _fill(theirs, blocks))
    token = arrays(1, 99)
    check_equal(_step(ours, *token), _step(theirs, *token))
    yield held(
        "window.bytes",
        f"K and V after prefill of {prefill:,}",
        ours.nbytes,
        "RotatingKVCache",
        sum(layer.nbytes for layer in theirs),
    )
    rounds = setting.of(20, 6)
    yield _decoding("window.decode", f"a token in a window of {WINDOW}", ours, theirs, token, rounds)
    plugged = _plugged()
    for block in blocks:
        attention(plugged, *block)
    yield _decoding("window.plugin", "the same through the plug-in", plugged, theirs, token, rounds)
    prefilling = speed(
        "window.prefill",
        f"prefill of {prefill:,} by {BLOCK} in a window of {WINDOW}",
        "ms",
        lambda: timed(lambda: _fill(_ours(), blocks)),
        "RotatingKVCache",
        lambda: timed(lambda: _fill(_theirs(), blocks)),
        setting.of(2, 1),
    )
    yield prefilling
    assert prefilling.theirs is not None
    yield _rewinding(blocks, prefilling.theirs / 1e3)


def _decoding(key: str, work: str, ours: Any, theirs: Any, token: Any, rounds: int) -> Row:
    def decode(cache: Any) -> float:
        return timed(lambda: [_step(cache, *token) for _ in range(STEPS)])

    return speed(
        key, work, "ms", lambda: decode(ours), "RotatingKVCache", lambda: decode(theirs), rounds, STEPS
    )


def _rewinding(blocks: list[Any], prefill_seconds: float) -> Row:
    """Compare a rewind with RotatingKVCache, which must prefill again once its window has moved."""
    cache, prefill = _ours(), BLOCK * len(blocks)
    _fill(cache, blocks)
    token, found = arrays(1, 7), []

    def rewind() -> None:
        cache.remove(0, prefill - REWIND)
        found.append(_step(cache, *token))

    seconds = timed(rewind)
    seen = WINDOW - 1
    keys, values = (
        mx.concatenate([block[slot] for block in blocks], axis=2)[:, :, : prefill - REWIND][:, :, -seen:]
        for slot in (1, 2)
    )
    q, k, v = token
    mask = create_causal_mask(1, seen)
    keys, values = mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
    check_equal(found[0], SDPA(q, keys, values, scale=SCALE, mask=mask))
    return once(
        "window.rewind",
        f"rewinding {REWIND} after the window has slid, and a token",
        "ms",
        seconds,
        f"prefill of {prefill:,} again",
        prefill_seconds,
    )


def _ours() -> SlidingWindowCache:
    cache = SlidingWindowCache(WINDOW, rewind=REWIND)
    cache.init(mx.float32, capacity=1 << 20, max_batch=BLOCK)
    return cache


def _theirs() -> list[RotatingKVCache]:
    return [RotatingKVCache(WINDOW) for _ in range(LAYERS)]


def _plugged() -> Any:
    model = tiny_llama(num_hidden_layers=LAYERS)
    model.make_cache = _theirs
    return make_prompt_cache(model, rewind=REWIND)


def _fill(cache: Any, blocks: list[Any]) -> mx.array:
    return [_step(cache, *block) for block in blocks][-1]


def _step(cache: Any, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    if not isinstance(cache, SlidingWindowCache):
        return attention(cache, q, k, v)
    with cache.forward(Batch.run(0, cache.end(0), q.shape[2])):
        outputs = [attend(q, k, v, cache.layer(i), scale=SCALE) for i in range(LAYERS)]
    mx.eval(outputs)
    return outputs[-1]

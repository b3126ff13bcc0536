"""A window of 512 against mlx-lm's RotatingKVCache(512), SmolLM2's shape, attention included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import RotatingKVCache

from benchmarks.measure import paired
from mlx_kvcache import Batch, SlidingWindowCache, attention

LAYERS, WINDOW, PREFILL, BLOCK, STEPS, REWIND = 30, 512, 4096, 512, 64, 64
SCALE = 64**-0.5
SDPA = mx.fast.scaled_dot_product_attention


def ours() -> SlidingWindowCache:
    cache = SlidingWindowCache(WINDOW, rewind=REWIND)
    cache.init(mx.float32, capacity=1 << 20, max_batch=BLOCK)
    return cache


def theirs() -> list[RotatingKVCache]:
    return [RotatingKVCache(WINDOW) for _ in range(LAYERS)]


def inputs(n: int, seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    made = [mx.random.normal((1, h, n, 64), key=k) for h, k in zip((9, 3, 3), keys, strict=True)]
    mx.eval(made)
    return made[0], made[1], made[2]


def our_step(cache: SlidingWindowCache, q, k, v) -> mx.array:
    outputs = []
    with cache.forward(Batch.run(0, cache.end(0), q.shape[2])):
        for i in range(LAYERS):
            outputs.append(attention(q, k, v, cache.layer(i), scale=SCALE))  # noqa: PERF401
    mx.eval(outputs)
    return outputs[-1]


def their_step(caches: list[RotatingKVCache], q, k, v) -> mx.array:
    outputs, n = [], q.shape[2]
    mask = caches[0].make_mask(n, window_size=WINDOW)
    for cache in caches:
        keys, values = cache.update_and_fetch(k, v)
        outputs.append(SDPA(q, keys, values, scale=SCALE, mask=mask))
    mx.eval(outputs)
    return outputs[-1]


def fill(step, cache) -> Any:
    for start in range(0, PREFILL, BLOCK):
        step(cache, *inputs(BLOCK, start))
    return cache


def run() -> Iterator[str]:
    """A window of 512: decoding, prefill, storage and rewinding, against RotatingKVCache."""
    mine, peer = fill(our_step, ours()), fill(their_step, theirs())
    stored = mine._table.allocated, peer[0].keys.shape[2]
    token = inputs(1, 99)
    worst = mx.abs(our_step(mine, *token) - their_step(peer, *token)).max().item()
    yield f"largest difference of one token after {PREFILL}: {worst:.1e}"
    yield f"cells in a layer after it: {stored[0]}, at most {WINDOW + REWIND + 512}; theirs {stored[1]}"

    def decode(step, cache) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            step(cache, *token)
        return (time.perf_counter() - start) / STEPS

    result = paired(lambda: decode(our_step, mine), lambda: decode(their_step, peer), 20, "decoding")
    yield f"decoding: {result.ours * 1e3:.2f} ms a token, theirs {result.theirs * 1e3:.2f} ms, ratio {result}"

    def prefill(step, make) -> float:
        cache = make()
        blocks = [inputs(BLOCK, start) for start in range(0, PREFILL, BLOCK)]
        start = time.perf_counter()
        for block in blocks:
            step(cache, *block)
        return time.perf_counter() - start

    result = paired(lambda: prefill(our_step, ours), lambda: prefill(their_step, theirs), 5, "prefill")
    yield f"prefill of {PREFILL} by {BLOCK}: {result.ours:.2f} s, theirs {result.theirs:.2f} s, {result}"
    yield _rewinding(result.theirs)


def _rewinding(prefill_seconds: float) -> str:
    cache = ours()
    blocks = [inputs(BLOCK, start) for start in range(0, PREFILL, BLOCK)]
    for block in blocks:
        our_step(cache, *block)
    token = inputs(1, 7)
    start = time.perf_counter()
    cache.remove(0, PREFILL - REWIND)
    rewound = our_step(cache, *token)
    seconds = time.perf_counter() - start
    # Fresh: the token among the keys and values that it sees.
    seen = WINDOW - 1
    keys = mx.concatenate([k for _, k, _ in blocks], axis=2)[:, :, : PREFILL - REWIND][:, :, -seen:]
    values = mx.concatenate([v for _, _, v in blocks], axis=2)[:, :, : PREFILL - REWIND][:, :, -seen:]
    q, k, v = token
    mask = create_causal_mask(1, seen)
    fresh = SDPA(
        q, mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2), scale=SCALE, mask=mask
    )
    worst = mx.abs(rewound - fresh).max().item()
    return (
        f"rewinding {REWIND} after the window slid, and one token: {seconds * 1e3:.2f} ms, "
        f"off by {worst:.0e}; RotatingKVCache cannot, and prefills again: "
        f"{prefill_seconds / seconds:.0f} times as long"
    )

"""Measures the rounding error of keys after 500 removals."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from benchmarks.rows import Row
from benchmarks.setting import Setting
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.plugin.rope.probe import scheme_of
from tests.plugin.running import difference
from tests.plugin.tiny import tiny_llama

REMOVALS, WIDTH, SINKS = 500, 4, 8


def run(setting: Setting) -> Iterator[Row]:
    """Largest error of 16-bit keys after 500 removals of 4 tokens, against rotating stored keys."""
    for dtype in (mx.bfloat16, mx.float16):
        yield from _errors(dtype)


def _errors(dtype: mx.Dtype) -> Iterator[Row]:
    model = tiny_llama(dtype, num_hidden_layers=1, max_position_embeddings=4096)
    rotation = scheme_of(model).rotations[0]
    assert rotation is not None
    cache = make_prompt_cache(model)
    layer = cache[0]
    noise = iter(mx.random.split(mx.random.key(0), REMOVALS + 1))
    originals: list[tuple[mx.array, int]] = []

    def feed(n: int) -> mx.array:
        kv = mx.random.normal((1, 2, n, 8), key=next(noise)).astype(dtype)
        originals.extend((kv[:, :, i : i + 1], layer.offset + i) for i in range(n))
        keys: mx.array
        keys, _ = layer.update_and_fetch(kv, kv)
        mx.eval(keys)
        return keys

    repeated = feed(64)
    for _ in range(REMOVALS):
        cache.remove(SINKS, SINKS + WIDTH)
        del originals[SINKS : SINKS + WIDTH]
        repeated = mx.concatenate(
            [repeated[:, :, :SINKS], rotation.apply(repeated[:, :, SINKS + WIDTH :], -WIDTH)], axis=2
        )
        keys = feed(WIDTH)
        repeated = mx.concatenate(
            [repeated, rotation.apply(keys[:, :, -WIDTH:], cache.position - layer.offset)], axis=2
        )
        mx.eval(repeated)
    lead = layer.offset - cache.position
    ours = rounding = again = 0.0
    for position, (original, stored_at) in enumerate(originals):
        wide = original.astype(mx.float32)
        exact = rotation.apply(wide, position + lead - stored_at)
        ours = max(ours, difference(keys[:, :, position : position + 1], exact))
        rounding = max(rounding, difference(exact.astype(dtype), exact))
        there = rotation.apply(wide, position - stored_at)
        again = max(again, difference(repeated[:, :, position : position + 1], there))
    name = str(dtype).split(".")[-1]
    work = f"largest error of {name} keys after {REMOVALS} removals of {WIDTH} tokens"
    peers = {"again": ("rotating what is stored", again), "rounding": ("one rounding", rounding)}
    for key, (peer, error) in peers.items():
        yield Row(f"drift.{name}.{key}", work, "", ours, peer, error, "less", ours / error)

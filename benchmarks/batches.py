"""Measures decode steps of several sequences in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, RotatingKVCache

from benchmarks.measure import check_equal, speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.shape import Shape, arrays, attention, contiguous, evaluate, fill, shape_of
from mlx_kvcache.plugin import make_prompt_cache

LENGTHS = {
    "8 of 64": [64] * 8,
    "8 of 512": [512] * 8,
    "one of 2,048 and seven of 64": [2048] + [64] * 7,
}
WINDOW = 512


def run(setting: Setting) -> Iterator[Row]:
    """A decode step of 8 sequences, of equal and of unequal lengths, against BatchKVCache."""
    model, _ = setting.load("smollm2")
    shape, rounds = shape_of(model), setting.of(20, 4)
    for index, (name, lengths) in enumerate(LENGTHS.items()):
        ours = _ours(model, lengths, shape)
        theirs = merged([contiguous(n, seed, shape) for seed, n in enumerate(lengths)], BatchKVCache)
        key = ("short", "equal", "ragged")[index]
        yield _beside(f"batches.{key}", f"{name}, the model", lambda c: _step(model, c), ours, theirs, rounds)
        given = arrays(1, 9, len(lengths), shape)
        alone = f"{name}, cache and attention"
        yield _beside(f"batches.{key}.attention", alone, lambda c: attention(c, *given), ours, theirs, rounds)  # noqa: B023
    yield _windows(model, shape, rounds)


def _windows(model: Any, shape: Shape, rounds: int) -> Row:
    """Measure a batch whose sliding windows have moved."""
    lengths = [1024] + [96] * 7
    model.make_cache = lambda: [RotatingKVCache(WINDOW) for _ in range(shape.layers)]
    try:
        ours = _ours(model, lengths, shape)
        theirs = [fill(model.make_cache(), n, seed, shape=shape) for seed, n in enumerate(lengths)]
    finally:
        del model.make_cache
    batch, given = merged(theirs, BatchRotatingKVCache), arrays(1, 9, len(lengths), shape)
    name = f"one of 1,024 and seven of 96 in windows of {WINDOW}, cache and attention"
    return _beside("batches.windows", name, lambda c: attention(c, *given), ours, batch, rounds)


def _beside(key: str, work: str, step: Callable[[Any], mx.array], ours: Any, theirs: Any, rounds: int) -> Row:
    check_equal(step(ours), step(theirs))
    peer = type(theirs[0]).__name__
    return speed(
        key, work, "ms", lambda: timed(lambda: step(ours)), peer, lambda: timed(lambda: step(theirs)), rounds
    )


def _step(model: Any, cache: Any) -> mx.array:
    logits: mx.array = model(mx.array([[5]] * 8), cache=cache)
    mx.eval(logits)
    return logits


def _ours(model: Any, lengths: list[int], shape: Shape) -> list[Any]:
    caches = [fill(make_prompt_cache(model), n, seed, shape=shape) for seed, n in enumerate(lengths)]
    return [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]


def merged(caches: list[Any], kind: Any) -> list[Any]:
    """Merge mlx-lm's caches into a batch."""
    batch = [kind.merge([cache[i] for cache in caches]) for i in range(len(caches[0]))]
    evaluate(batch)
    return batch

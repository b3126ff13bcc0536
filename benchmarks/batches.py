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

Step = Callable[[Any], mx.array]
"""Decodes one token of each row of a cache."""

LENGTHS = {
    "short": ("8 of 64", [64] * 8),
    "equal": ("8 of 512", [512] * 8),
    "ragged": ("one of 2,048 and seven of 64", [2048] + [64] * 7),
}
MANY = {
    "equal.32": ("32 of 512", [512] * 32),
    "ragged.32": ("one of 2,048 and 31 of 64", [2048] + [64] * 31),
}
"""Batches for a GPU, which reads many rows at a time."""
SHARED = 2048
WINDOW = 512


def run(setting: Setting) -> Iterator[Row]:
    """A decode step of 8 sequences, of equal and of unequal lengths, against BatchKVCache; on a GPU of 32."""
    model, _ = setting.load("smollm2")
    shape, rounds = shape_of(model), setting.of(20, 4)
    is_gpu = mx.default_device().type == mx.gpu
    for key, (name, lengths) in (LENGTHS | MANY if is_gpu else LENGTHS).items():
        ours = _ours(model, lengths, shape)
        theirs = merged([contiguous(n, seed, shape) for seed, n in enumerate(lengths)], BatchKVCache)
        step = _step(model, len(lengths))
        yield _beside(f"batches.{key}", f"{name}, the model", step, ours, theirs, rounds)
        given = arrays(1, 9, len(lengths), shape)
        alone = f"{name}, cache and attention"
        yield _beside(f"batches.{key}.attention", alone, lambda c: attention(c, *given), ours, theirs, rounds)  # noqa: B023
    if is_gpu:
        yield _forks(model, shape, rounds)
    yield _windows(model, shape, rounds)


def _forks(model: Any, shape: Shape, rounds: int) -> Row:
    """Measure 8 forks of one prompt, which the peer holds 8 times."""
    prompt, rows = fill(make_prompt_cache(model), SHARED, shape=shape), 8
    forks = [prompt.fork() for _ in range(rows)]
    ours = [layer.merge([fork[i] for fork in forks]) for i, layer in enumerate(prompt)]
    theirs = merged([contiguous(SHARED, shape=shape) for _ in range(rows)], BatchKVCache)
    name = f"{rows} forks of {SHARED:,}, the model"
    return _beside("batches.forks", name, _step(model, rows), ours, theirs, rounds)


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


def _beside(key: str, work: str, step: Step, ours: Any, theirs: Any, rounds: int) -> Row:
    check_equal(step(ours), step(theirs))
    peer = type(theirs[0]).__name__
    return speed(
        key, work, "ms", lambda: timed(lambda: step(ours)), peer, lambda: timed(lambda: step(theirs)), rounds
    )


def _step(model: Any, rows: int) -> Step:
    """A function that decodes one token of each row."""

    def step(cache: Any) -> mx.array:
        logits: mx.array = model(mx.array([[5]] * rows), cache=cache)
        mx.eval(logits)
        return logits

    return step


def _ours(model: Any, lengths: list[int], shape: Shape) -> list[Any]:
    caches = [fill(make_prompt_cache(model), n, seed, shape=shape) for seed, n in enumerate(lengths)]
    return [layer.merge([cache[i] for cache in caches]) for i, layer in enumerate(caches[0])]


def merged(caches: list[Any], kind: Any) -> list[Any]:
    """Merge mlx-lm's caches into a batch."""
    batch = [kind.merge([cache[i] for cache in caches]) for i in range(len(caches[0]))]
    evaluate(batch)
    return batch

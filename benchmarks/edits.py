"""Measures rewinding, and removal of tokens from the middle."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from benchmarks.measure import check_equal, once, speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.shape import contiguous, fill, read, shape_of
from mlx_kvcache.plugin import make_prompt_cache

BLOCK, BACK = 512, 64


def run(setting: Setting) -> Iterator[Row]:
    """Rewinding 64 tokens, and removing the middle of 4,096 against prefilling the tokens after it."""
    model, _ = setting.load(setting.of("smollm2", "tiny"))
    context, shape = setting.of(4096, 2048), shape_of(model)
    ours, theirs = fill(make_prompt_cache(model), context, shape=shape), contiguous(context, shape=shape)
    token = mx.array([[5]])

    def rewind(cache: Any, back: Any) -> float:
        mx.eval(model(mx.array([[5] * BACK]), cache=cache))

        def work() -> None:
            back(cache)
            mx.eval(model(token, cache=cache))

        return timed(work)

    yield speed(
        "edits.rewind",
        f"rewinding {BACK} of {context:,} and a token",
        "ms",
        lambda: rewind(ours, lambda cache: cache.rewind(BACK)),
        "KVCache",
        lambda: rewind(theirs, lambda cache: trim_prompt_cache(cache, BACK)),
        setting.of(10, 4),
    )
    yield _removal(model, context, setting.of(5, 3))


def _removal(model: Any, context: int, rounds: int) -> Row:
    """Compare a removal with mlx-lm's caches, which must prefill the tokens after it again."""
    text = mx.random.randint(0, 500, (1, context), key=mx.random.key(0))
    cache = make_prompt_cache(model)
    begin, end = context // 4, 3 * context // 4
    read(model, cache, text, BLOCK)
    token, seconds = mx.array([[5]]), []
    found: list[mx.array] = []
    # The first removal also probes the model's RoPE, once for each model. It is not counted.
    for _ in range(rounds + 1):
        branch = cache.fork()
        seconds.append(timed(lambda: _removed(model, branch, begin, end, token, found)))  # noqa: B023
    for again in found:
        check_equal(again, found[0], 1e-5)
    theirs: list[KVCache] = [KVCache() for _ in model.layers]
    mx.eval(model(text[:, :begin], cache=theirs))

    def prefill() -> None:
        read(model, theirs, text[:, end:], BLOCK)
        mx.eval(model(token, cache=theirs))

    return once(
        "edits.remove",
        f"removing {begin:,} to {end:,} of {context:,}, and a token",
        "ms",
        median(seconds[1:]),
        "prefill of what comes after",
        timed(prefill),
    )


def _removed(model: Any, cache: Any, begin: int, end: int, token: mx.array, found: list[mx.array]) -> None:
    cache.remove(begin, end)
    found.append(model(token, cache=cache))
    mx.eval(found[-1])

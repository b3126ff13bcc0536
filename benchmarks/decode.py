"""Measures decoding of one token after contexts of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import trim_prompt_cache

from benchmarks.measure import check_equal, speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.shape import arrays, attention, contiguous, fill, prepared, shape_of
from mlx_kvcache.plugin import make_prompt_cache

DRIFT = 16
"""Tokens by which a context may grow before it is trimmed to its length."""


def run(setting: Setting) -> Iterator[Row]:
    """One token after 256 to 16,384: the whole model, and only its cache and attention."""
    model, _ = setting.load("smollm2")
    shape = shape_of(model)
    token, given = mx.array([[5]]), arrays(1, 7, shape=shape)
    for context in setting.of((256, 1024, 4096, 16384), (256, 2048)):
        ours = fill(make_prompt_cache(model), context, shape=shape)
        theirs = contiguous(context, shape=shape)
        peers = {"KVCache": theirs, "prepared K/V": prepared(context + 1, shape)}
        check_equal(model(token, cache=ours), model(token, cache=theirs))
        for what, step in (
            ("model", lambda cache: model(token, cache=cache)),
            ("attention", lambda cache: attention(cache, *given)),
        ):
            for peer, cache in peers.items():
                rounds = setting.of(60 if context < 4096 else 16, 6)
                yield _beside(what, context, step, ours, peer, cache, rounds)


def _beside(
    what: str,
    context: int,
    step: Callable[[Any], mx.array],
    ours: Any,
    peer: str,
    theirs: Any,
    rounds: int,
) -> Row:
    key = f"decode.{what}.{context}" + ("" if peer == "KVCache" else ".bare")
    work = f"a token after {context:,}, " + ("the model" if what == "model" else "cache and attention")

    def seconds(cache: Any) -> float:
        taken = timed(lambda: mx.eval(step(cache)))
        if (more := cache[0].offset - context) > DRIFT:
            trim_prompt_cache(cache, more)
        return taken

    return speed(key, work, "ms", lambda: seconds(ours), peer, lambda: seconds(theirs), rounds)

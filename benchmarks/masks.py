"""Measures building the mask of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from benchmarks.measure import speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.shape import fill
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama

BLOCK, CONTEXT, WINDOW = 512, 4096, 512


def run(setting: Setting) -> Iterator[Row]:
    """The mask array of a block of 512 after 4,096 tokens: full attention, and a window of 512."""
    full, windowed = tiny_llama(), tiny_llama()
    windowed.make_cache = lambda: [RotatingKVCache(WINDOW) for _ in windowed.layers]
    for name, model, theirs, window in (
        ("full attention", full, [KVCache() for _ in full.layers], None),
        ("window", windowed, windowed.make_cache(), WINDOW),
    ):
        ours = fill(make_prompt_cache(model), CONTEXT, step=BLOCK)
        fill(theirs, CONTEXT, step=BLOCK)
        peer = type(theirs[0]).__name__
        if window is None and not mx.array_equal(_mask(ours, window), _mask(theirs, window)):
            raise RuntimeError("the masks differ")
        yield speed(
            f"masks.{name.split()[0]}",
            f"mask of {BLOCK} tokens after {CONTEXT:,}, {name}",
            "us",
            lambda: timed(lambda: _mask(ours, window)),  # noqa: B023
            peer,
            lambda: timed(lambda: _mask(theirs, window)),  # noqa: B023
            setting.of(100, 30),
        )


def _mask(cache: Any, window: int | None) -> mx.array:
    mask: mx.array = cache[0].make_mask(BLOCK, return_array=True, window_size=window)
    mx.eval(mask)
    return mask

"""Measures prefilling a prompt in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.measure import check_equal, speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.shape import read
from mlx_kvcache.plugin import make_prompt_cache

BLOCK = 512


def run(setting: Setting) -> Iterator[Row]:
    """Prompts of 128 to 8,192 tokens (on a GPU to 32,768) in blocks of 512, through two layers."""
    model, _ = setting.load("tiny")
    lengths: tuple[int, ...] = (128, 512, 2048, 4096, 8192)
    if mx.default_device().type == mx.gpu:
        lengths += (16384, 32768)
    for length in setting.of(lengths, (128, 1024)):
        text = mx.random.randint(0, 500, (1, length), key=mx.random.key(length))
        check_equal(
            read(model, _ours(model), text, BLOCK),
            read(model, _theirs(model), text, BLOCK),
        )
        yield speed(
            f"prefill.{length}",
            f"prefill of {length:,} by {BLOCK}",
            "ms",
            lambda: _seconds(model, _ours(model), text),  # noqa: B023
            "KVCache",
            lambda: _seconds(model, _theirs(model), text),  # noqa: B023
            setting.of({128: 12, 512: 12, 2048: 8, 4096: 5}.get(length, 2), 4),
        )


def _ours(model: Any) -> Any:
    return make_prompt_cache(model)


def _theirs(model: Any) -> Any:
    return [KVCache() for _ in model.layers]


def _seconds(model: Any, cache: Any, text: mx.array) -> float:
    return timed(lambda: read(model, cache, text, BLOCK))

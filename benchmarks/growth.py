"""Measures peak memory while a conversation grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from benchmarks.measure import peak_of
from benchmarks.rows import Row
from benchmarks.setting import DIM, KV_HEADS, LAYERS, Setting
from benchmarks.shape import evaluate
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama

TOKENS = 8192


def run(setting: Setting) -> Iterator[Row]:
    """Peak bytes of K and V while growing to 8,192 tokens, relative to the live bytes; updates only."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    live = LAYERS * TOKENS * KV_HEADS * DIM * 2 * 4
    for block in setting.of((512, 64, 1), (512,)):
        ours = _peak(make_prompt_cache(model), block) / live
        theirs = _peak([KVCache() for _ in range(LAYERS)], block) / live
        yield Row(
            f"growth.{block}",
            f"peak while growing to {TOKENS:,} by {block}",
            "of the live bytes",
            ours,
            "KVCache",
            theirs,
            "less",
            ours / theirs,
        )


def _peak(cache: Any, block: int) -> int:
    tokens = mx.ones((1, KV_HEADS, block, DIM))
    mx.eval(tokens)
    return peak_of(lambda: _grow(cache, tokens))


def _grow(cache: Any, tokens: mx.array) -> None:
    block = tokens.shape[2]
    for _ in range(0, TOKENS, block):
        cache[0].make_mask(block, return_array=False, window_size=None)
        for layer in cache:
            layer.update_and_fetch(tokens, tokens)
        evaluate(cache)

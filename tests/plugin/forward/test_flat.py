"""Decoding without end: at the end no more memory and no larger graph than after a thousand tokens."""

from __future__ import annotations

import io
import os
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache
from tqdm import tqdm

from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.tiny import tiny_llama

STEPS = int(os.environ.get("FLAT_STEPS", "2000"))
FIRST = 1000
CYCLE = 256
"""Tokens in which room is made a few times: the largest size in so many counts."""


class Size(NamedTuple):
    """What has been piled up: bytes of all arrays of MLX, and nodes behind those of the cache."""

    nbytes: int
    nodes: int


def tiny_model() -> nn.Module:
    """A window and full attention in one layer each."""
    model = tiny_llama(
        hidden_size=8, num_hidden_layers=2, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1
    )
    model.make_cache = lambda: [RotatingKVCache(16), KVCache()]
    return model


def size_of(cache: PromptCache) -> Size:
    dot = io.StringIO()
    mx.export_to_dot(dot, *cache.pool.buffers)
    return Size(mx.get_active_memory(), dot.getvalue().count("->"))


def test_memory_and_graph_stay_flat() -> None:
    model = tiny_model()
    cache = make_prompt_cache(model, capacity=64, overflow="shift", sinks=2, rewind=4)
    token = mx.array([[1]])
    early, late = Size(0, 0), Size(0, 0)
    for step in tqdm(range(1, STEPS + 1), disable=STEPS < 100_000):
        token = mx.argmax(model(token, cache=cache), axis=-1)
        mx.eval(token)
        if FIRST - CYCLE < step <= FIRST:
            early = largest(early, size_of(cache))
        if step > STEPS - CYCLE:
            late = largest(late, size_of(cache))
    tqdm.write(f"until {FIRST:,} tokens {early}, until {STEPS:,} {late}")
    assert abs(late.nbytes / early.nbytes - 1) <= 0.01
    assert late.nodes <= early.nodes
    assert cache.position <= 64


def largest(a: Size, b: Size) -> Size:
    return Size(max(a.nbytes, b.nbytes), max(a.nodes, b.nodes))

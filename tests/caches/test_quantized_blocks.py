"""Blocks longer than what is stored of them, in fewer bits."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, ChunkedAttentionCache, Quantization, SlidingWindowCache
from mlx_kvcache.quantization import Codec, Transform
from tests.rounding import rounded


@pytest.mark.parametrize("kind", [SlidingWindowCache, ChunkedAttentionCache])
@pytest.mark.parametrize("after", [0, 100])
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_the_tokens_of_a_block_are_read_as_if_all_were_stored(
    kind: type[SlidingWindowCache | ChunkedAttentionCache], after: int, transform: Transform
) -> None:
    kv = mx.random.normal((1, 3, 20, 64), key=mx.random.key(0))
    cache = kind(8)
    cache.init(mx.float32, capacity=64, quantization=Quantization(4, 64, after, transform, recent=0))
    with cache.forward(Batch.run(0, 0, 20)):
        cache.layer(0).put(kv, kv)
        keys, values, _ = cache.layer(0).get()
    expected = kv if after else rounded(kv, Codec(4, 64, transform))
    tolerance = 0 if transform == "none" else 1e-5
    assert mx.allclose(keys, expected, 0, tolerance) and mx.allclose(values, expected, 0, tolerance)

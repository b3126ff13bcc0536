"""Blocks longer than what is stored of them, in fewer bits."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_kvcache import Batch, ChunkedAttentionCache, Quantization, SlidingWindowCache


@pytest.mark.parametrize("kind", [SlidingWindowCache, ChunkedAttentionCache])
@pytest.mark.parametrize("after", [0, 100])
def test_the_tokens_of_a_block_are_read_as_if_all_were_stored(
    kind: type[SlidingWindowCache | ChunkedAttentionCache], after: int
) -> None:
    kv = mx.random.normal((1, 3, 20, 64), key=mx.random.key(0))
    cache = kind(8)
    cache.init(mx.float32, capacity=64, quantization=Quantization(4, after=after))
    with cache.forward(Batch.run(0, 0, 20)):
        cache.layer(0).put(kv, kv)
        keys, values, _ = cache.layer(0).get()
    words, *rest = mx.quantize(kv.astype(mx.float16), group_size=64, bits=4)
    scales, biases = (part.astype(mx.float32) for part in rest)
    rounded = mx.dequantize(words, scales, biases, group_size=64, bits=4)
    expected = kv if after else rounded
    assert mx.array_equal(keys, expected) and mx.array_equal(values, expected)

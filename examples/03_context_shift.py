"""Decodes beyond a cache's capacity: drops old tokens and re-bases the keys that stay."""

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache import Batch, CacheFullError, CausalCache, rope_shift, slide

head_dim, capacity, keep = 8, 32, 4
rope = nn.RoPE(head_dim)
cache = CausalCache(shift=rope_shift.of(rope))
cache.init(dtype=mx.float32, capacity=capacity)

for step in range(100):
    content = mx.random.normal((1, 1, 1, head_dim))
    try:
        cache.start_forward(Batch([cache.end(0)], [0]))
    except CacheFullError as full:
        dropped = slide(cache, sequence=0, keep=keep)
        print(f"step {step}: {full}; {dropped} dropped")
        cache.start_forward(Batch([cache.end(0)], [0]))
    keys = rope(content, offset=cache.end(0) - 1)
    layer = cache.layer(0)
    layer.put(keys, content)
print("at the end", cache.end(0), "tokens are cached")

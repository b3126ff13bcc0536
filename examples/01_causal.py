"""Uses a causal cache on its own: fill, read, rewind."""

import mlx.core as mx

from mlx_kvcache import Batch, CausalCache

cache = CausalCache()
cache.init(dtype=mx.float32, capacity=64)

heads, head_dim = 2, 8
positions = [0, 1, 2, 3, 4]
keys = mx.random.normal((1, heads, len(positions), head_dim))
values = mx.random.normal((1, heads, len(positions), head_dim))

# An exception inside the block removes the tokens again.
with cache.forward(Batch(positions, sequences=[0] * 5)):
    layer = cache.layer(0)
    layer.put(keys, values)
    history, _, mask = layer.get()
print("prefill: history", history.shape, "mask", mask)

cache.remove(0, 3)  # the tokens from position 3 on
print("after rewinding, the next position is", cache.end(0))

with cache.forward(Batch([3], [0])):
    layer = cache.layer(0)
    layer.put(keys[:, :, 3:4], values[:, :, 3:4])
    history, _, mask = layer.get()
print("one token: history", history.shape, "mask", mask)

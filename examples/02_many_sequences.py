"""Computes attention for a batch of sequences that share a prefix."""

import mlx.core as mx

from mlx_kvcache import Batch, CausalCache, attention

cache = CausalCache()
cache.init(dtype=mx.float32, max_sequences=4, capacity=64)
heads, head_dim = 2, 8


def forward(batch: Batch) -> mx.array:
    """Run one attention layer on random tokens, in the order of the batch."""
    queries, keys, values = mx.random.normal((3, 1, heads, len(batch), head_dim))
    with cache.forward(batch):
        return attention(queries, keys, values, cache.layer(0), scale=head_dim**-0.5)


prompt = 32
forward(Batch.run(sequence=0, begin=0, n=prompt))
before = cache.nbytes
for branch in (1, 2, 3):
    cache.copy_prefix(src=0, dst=branch, length=prompt)
print(f"3 branches of {prompt} tokens took {cache.nbytes - before} more bytes")

# Unequal lengths, no padding: branch 1 reads two tokens, the others one.
output = forward(Batch(positions=[32, 33, 32, 32], sequences=[1, 1, 2, 3]))
print("output", output.shape, "ends", [cache.end(sequence) for sequence in range(4)])

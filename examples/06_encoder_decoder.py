"""Uses one wrapper for self-attention and cross-attention in an encoder-decoder model."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache import Batch, CausalCache, EncoderCache, WrapperCache, attention

DIM, HEADS, VOCABULARY, LAYERS = 32, 4, 50, 2
CROSS, SELF = 0, 1  # layer types
SCALE = (DIM // HEADS) ** -0.5


def heads(x: mx.array) -> mx.array:
    return x.reshape(1, -1, HEADS, DIM // HEADS).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """The projections of an attention layer. Without a source, only queries are projected."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))

    def project(self, x: mx.array, source: mx.array | None) -> tuple[Any, Any, Any]:
        if source is None:
            return heads(self.query(x)), None, None
        return heads(self.query(x)), heads(self.key(source)), heads(self.value(source))


class Decoder(nn.Module):
    """Alternates self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.own = [Attention() for _ in range(LAYERS)]
        self.cross = [Attention() for _ in range(LAYERS)]

    def __call__(self, tokens: mx.array, encoded: mx.array | None, cache: WrapperCache) -> mx.array:
        """Compute logits. Pass `encoded` once; later calls read its keys and values from the cache."""
        x = self.embed(tokens)[None]
        for i in range(LAYERS):
            cache.set_layer_type(SELF)
            y = attention(*self.own[i].project(x, x), cache.layer(i), scale=SCALE)
            x = x + y.transpose(0, 2, 1, 3).reshape(x.shape)
            cache.set_layer_type(CROSS)
            y = attention(*self.cross[i].project(x, encoded), cache.layer(i), scale=SCALE)
            x = x + y.transpose(0, 2, 1, 3).reshape(x.shape)
        logits: mx.array = self.embed.as_linear(x)[0]
        return logits

    def without_cache(self, tokens: mx.array, encoded: mx.array) -> mx.array:
        x = self.embed(tokens)[None]
        for own, cross in zip(self.own, self.cross, strict=True):
            for layer, source, mask in ((own, None, "causal"), (cross, encoded, None)):
                q, k, v = layer.project(x, x if source is None else source)
                y = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask)
                x = x + y.transpose(0, 2, 1, 3).reshape(x.shape)
        logits: mx.array = self.embed.as_linear(x)[0]
        return logits


mx.random.seed(0)
model, encoded = Decoder(), mx.random.normal((1, 20, DIM))
tokens = mx.random.randint(0, VOCABULARY, (12,))
cache = WrapperCache(EncoderCache(), CausalCache())
cache.init(dtype=mx.float32, capacity=64)

cache.start_forward(Batch(range(8), [0] * 8, multimodal=[0]))
logits = [model(tokens[:8], encoded, cache)]
for position in range(8, 12):
    cache.start_forward(Batch([position], [0]))
    logits.append(model(tokens[position : position + 1], None, cache))
fresh = model.without_cache(tokens, encoded)
worst = float(mx.abs(mx.concatenate(logits) - fresh).max())
print(f"largest difference from the same network without a cache: {worst:.1e}")
assert worst < 1e-4

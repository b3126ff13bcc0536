"""Rewinds a decoder that alternates sliding-window and full attention layers."""

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache import Batch, CausalCache, SlidingWindowCache, WrapperCache, attention

DIM, HEADS, VOCABULARY, LAYERS, WINDOW = 32, 4, 50, 4, 8
SCALE = (DIM // HEADS) ** -0.5


class Decoder(nn.Module):
    """Even layers use a sliding window, odd layers full attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.rope = nn.RoPE(DIM // HEADS)
        self.qkv = [nn.Linear(DIM, 3 * DIM) for _ in range(LAYERS)]

    def project(self, i: int, x: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = self.qkv[i](x).reshape(1, -1, 3, HEADS, DIM // HEADS).transpose(2, 0, 3, 1, 4)
        return self.rope(q, offset=offset), self.rope(k, offset=offset), v

    def __call__(self, tokens: mx.array, offset: int, cache: WrapperCache) -> mx.array:
        x = self.embed(tokens)[None]
        for i in range(LAYERS):
            cache.set_layer_type(i % 2)  # even layers are local
            y = attention(*self.project(i, x, offset), cache.layer(i), scale=SCALE)
            x = x + y.transpose(0, 2, 1, 3).reshape(x.shape)
        logits: mx.array = self.embed.as_linear(x)[0]
        return logits

    def without_cache(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)[None]
        distance = mx.arange(len(tokens))[:, None] - mx.arange(len(tokens))[None]
        for i in range(LAYERS):
            mask = (distance >= 0) & (distance < WINDOW) if i % 2 == 0 else distance >= 0
            q, k, v = self.project(i, x, 0)
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask)
            x = x + y.transpose(0, 2, 1, 3).reshape(x.shape)
        logits: mx.array = self.embed.as_linear(x)[0]
        return logits


mx.random.seed(0)
model, tokens = Decoder(), mx.random.randint(0, VOCABULARY, (40,))
cache = WrapperCache(SlidingWindowCache(WINDOW, rewind=16), CausalCache())
cache.init(dtype=mx.float32, capacity=64)


def feed(part: mx.array) -> mx.array:
    with cache.forward(Batch.run(0, cache.end(0), len(part))):
        return model(part, cache.end(0) - len(part), cache)


feed(tokens[:30])
cache.remove(0, 18)  # the window has moved past 18, but rewind=16 keeps enough to go back
again = mx.concatenate([tokens[:18], tokens[30:]])
logits = mx.concatenate([feed(again[18:24]), *[feed(again[i : i + 1]) for i in range(24, 28)]])
fresh = model.without_cache(again)[18:]
worst = float(mx.abs(logits - fresh).max())
print(f"largest difference from the same network without a cache: {worst:.1e}")
assert worst < 1e-4

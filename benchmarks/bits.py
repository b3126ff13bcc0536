"""Measures quantization: bytes of K and V, and the loss on real text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache
from tqdm import tqdm

from benchmarks.rows import Row, held, less
from benchmarks.setting import Setting
from benchmarks.text import code, losses, topics
from mlx_kvcache import Batch, CausalCache, Quantization
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, BLOCK = 2048, 256
DECODED = 8
"""The block where the newest tokens are held in float: a longer one would read many tokens unrounded, which
a decoded token does not."""

WAYS: dict[str, dict[str, Any]] = {
    "8": {"kv_bits": 8},
    "8, last layer in float": {"kv_bits": 8, "kv_float": "last"},
    "6": {"kv_bits": 6},
    "5": {"kv_bits": 5},
    "4": {"kv_bits": 4},
    "3": {"kv_bits": 3},
    "2": {"kv_bits": 2},
    "8 and 6": {"kv_bits": (8, 6)},
    "8 and 4": {"kv_bits": (8, 4)},
    "8 and 3": {"kv_bits": (8, 3)},
    "8 and 2": {"kv_bits": (8, 2)},
    "4 and 8": {"kv_bits": (4, 8)},
    "6 and 4": {"kv_bits": (6, 4)},
    "6 and 3": {"kv_bits": (6, 3)},
    "5 and 4": {"kv_bits": (5, 4)},
    "5 and 3": {"kv_bits": (5, 3)},
    "4, groups of 32": {"kv_bits": 4, "kv_group_size": 32},
}
"""Options by name: one width for keys and values, or "keys and values" separately."""
SHORT = ("8", "6", "5", "4", "3", "2", "8 and 4", "5 and 4", "5 and 3")
"""What is measured on the second text."""
CENTERED = ("5 and 4", "4", "3", "2")
"""What is also measured with centers, which are taken from the other text."""
THEIRS = (4,)
"""Bits of mlx-lm's own cache."""


def run(setting: Setting) -> Iterator[Row]:
    """Bytes and loss of SmolLM2 on two texts of 2,048 tokens, with quantized keys and values."""
    model, tokenizer = setting.load("smollm2")
    size = setting.of(TOKENS, BLOCK)
    first, second = topics(tokenizer, size + 1), code(tokenizer, size + 1)
    yield from _on("topics", model, first, second[:-1], setting.of([*WAYS], ["8 and 4"]))
    yield from _on("code", model, second, first[:-1], setting.of(SHORT, ["8 and 4"]))


def _on(text: str, model: Any, tokens: list[int], other: list[int], names: Iterable[str]) -> Iterator[Row]:
    """Bytes and loss on one text, with and without what lowers it, and those of mlx-lm's cache."""

    def compared(key: str, work: str, cache: Any, block: int = BLOCK) -> Row:
        found = losses(model, cache, tokens, block).mean()
        return less(f"bits.loss.{text}.{key}", f"loss in {work}, on {text}", "nats", found, "float32", whole)

    whole = losses(model, make_prompt_cache(model), tokens, BLOCK).mean()
    halves = (len(tokens) - 1) * sum(2 * 2 * layer.self_attn.n_kv_heads * 64 for layer in model.layers)
    for name in tqdm(names, unit="way", leave=False):
        options = WAYS[name]
        cache = make_prompt_cache(model, **options)
        assert cache.pool.quantization is not None
        is_narrow = bool(cache.pool.quantization.recent)
        yield compared(name, f"{name} bits", cache, DECODED if is_narrow else BLOCK)
        size = halved(model, cache.pool.quantization, len(tokens) - 1)
        yield held(f"bits.bytes.{text}.{name}", f"K and V in {name} bits", size, "float16", halves)
        if is_narrow:
            rounded = make_prompt_cache(model, kv_recent=0, **options)
            yield compared(f"{name}.rounded", f"{name} bits of all tokens", rounded)
            plain = make_prompt_cache(model, kv_recent=0, kv_transform="none", **options)
            yield compared(f"{name}.plain", f"{name} bits without transform", plain)
        if name in CENTERED:
            centered = make_prompt_cache(model, kv_text=other, **options)
            yield compared(f"{name}.centered", f"{name} bits, centered", centered, DECODED)
    for bits in THEIRS:
        theirs = [QuantizedKVCache(64, bits) for _ in model.layers]
        yield compared(f"{bits}.mlx-lm", f"{bits} bits of mlx-lm's QuantizedKVCache", theirs)


def halved(model: Any, quantization: Quantization, n: int) -> int:
    """The bytes of n tokens of a model whose keys and values are in float16."""
    cache = CausalCache()
    cache.init(mx.float16, capacity=n, max_batch=n, quantization=quantization)
    with cache.forward(Batch.run(0, 0, n)):
        for index, layer in enumerate(model.layers):
            cache.layer(index).put(*[mx.zeros((1, layer.self_attn.n_kv_heads, n, 64))] * 2)
    return cache.nbytes

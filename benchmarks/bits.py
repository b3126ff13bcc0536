"""Measures quantization: bytes of K and V, and the loss on real text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs
from tqdm import tqdm

from benchmarks import gemma3
from benchmarks.rows import Row, held, less
from benchmarks.setting import Setting
from benchmarks.text import code, foretold, losses_and_divergences, losses_of, topics
from mlx_kvcache import Batch, CausalCache, Quantization
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.quantization import RECENT

TOKENS, BLOCK = 2048, 256
GEMMA_TOKENS = 1024
"""Twice its window; a token has 262,144 logits."""
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
    "8 and 4": {"kv_bits": (8, 4)},
    "6 and 4": {"kv_bits": (6, 4)},
    "6 and 3": {"kv_bits": (6, 3)},
    "5 and 4": {"kv_bits": (5, 4)},
    "5 and 3": {"kv_bits": (5, 3)},
    "4 and 2": {"kv_bits": (4, 2)},
    "4, groups of 32": {"kv_bits": 4, "kv_group_size": 32},
}
"""Options by name: one width for keys and values, or "keys and values" separately."""
SHORT = ("8", "6", "5", "4", "3", "8 and 4", "5 and 4", "5 and 3", "4 and 2")
"""What is measured on the second text."""
OTHER_MODEL = ("8", "6", "4", "3", "8 and 4", "6 and 4", "5 and 4", "5 and 3", "4 and 2")
"""What is measured with the second model."""
CENTERED = ("5 and 4", "5 and 3", "4", "4 and 2", "3")
"""What is also measured with centers, which are taken from the other text."""
THEIRS = (4,)
"""Bits of mlx-lm's own cache."""
KIVI = (4, 3)
"""Bits of VeloxQuant-MLX's KIVI, which quantizes keys by channel."""


def run(setting: Setting) -> Iterator[Row]:
    """Bytes and loss of SmolLM2 on two texts of 2,048 tokens, and of Gemma 3, with quantized K and V."""
    model, tokenizer = setting.load("smollm2")
    size = setting.of(TOKENS, BLOCK)
    first, second = topics(tokenizer, size + 1), code(tokenizer, size + 1)
    yield from _sizes(model, size, names := setting.of([*WAYS], ["8 and 4"]))
    yield from _on("topics", model, first, second[:-1], names)
    yield from _on("code", model, second, first[:-1], setting.of(SHORT, ["8 and 4"]))
    if setting.model or setting.is_quick:
        return
    del model
    try:
        model, tokenizer = gemma3.load()
    except (FileNotFoundError, ImportError) as error:
        print(f"Gemma 3 is left out: {error}", file=sys.stderr)
        return
    text = topics(tokenizer, GEMMA_TOKENS + 1)
    yield from _on("gemma3", model, text, code(tokenizer, GEMMA_TOKENS), OTHER_MODEL)


def _sizes(model: Any, n: int, names: Iterable[str]) -> Iterator[Row]:
    """The bytes of n tokens, against float16."""
    halves = n * sum(2 * 2 * layer.self_attn.n_kv_heads * 64 for layer in model.layers)
    for name in names:
        quantization = make_prompt_cache(model, **WAYS[name]).pool.quantization
        assert quantization is not None
        size = halved(model, quantization, n)
        yield held(f"bits.bytes.topics.{name}", f"K and V in {name} bits", size, "float16", halves)


def _on(text: str, model: Any, tokens: list[int], other: list[int], names: Iterable[str]) -> Iterator[Row]:
    """The loss on one text, with and without what lowers it, and with the caches of others."""
    read = foretold(model, make_prompt_cache(model), tokens, BLOCK)
    expected = mx.concatenate([logs for _, logs in read])
    whole = losses_of(expected, tokens).mean()

    def compared(key: str, work: str, cache: Any, block: int = BLOCK) -> Iterator[Row]:
        found, apart = losses_and_divergences(model, cache, tokens, block, expected)
        work, key = f"{work}, on {text}", f"{text}.{key}"
        yield less(f"bits.loss.{key}", f"loss in {work}", "nats", found.mean(), "float32", whole)
        yield Row(
            f"bits.divergence.{key}", f"KL divergence from float in {work}", "nats", float(apart.mean())
        )

    for name in tqdm(names, unit="way", leave=False):
        options = WAYS[name]
        cache = make_prompt_cache(model, **options)
        assert cache.pool.quantization is not None
        is_narrow = bool(cache.pool.quantization.recent)
        yield from compared(name, f"{name} bits", cache, DECODED if is_narrow else BLOCK)
        if is_narrow:
            rounded = make_prompt_cache(model, kv_recent=0, **options)
            yield from compared(f"{name}.rounded", f"{name} bits of all tokens", rounded)
            plain = make_prompt_cache(model, kv_recent=0, kv_transform="none", **options)
            yield from compared(f"{name}.plain", f"{name} bits without transform", plain)
        if name in CENTERED:
            centered = make_prompt_cache(model, kv_text=other, **options)
            yield from compared(f"{name}.centered", f"{name} bits, centered", centered, DECODED)
    if any(isinstance(entry, RotatingKVCache) for entry in make_theirs(model)):
        # mlx-lm does not quantize windows.
        return
    for bits in THEIRS:
        theirs = [QuantizedKVCache(64, bits) for _ in model.layers]
        yield from compared(f"{bits}.mlx-lm", f"{bits} bits of mlx-lm's QuantizedKVCache", theirs)
    for bits in KIVI:
        if kivi := _kivi(model, bits):
            yield from compared(f"{bits}.kivi", f"{bits} bits of VeloxQuant-MLX's KIVI", kivi, DECODED)


def _kivi(model: Any, bits: int) -> list[Any] | None:
    """Make VeloxQuant-MLX's KIVI with as many newest tokens in float; None if it is not installed.

    Keys are quantized in groups of 64 tokens, so 16 to 79 tokens are in float, 48 on average.
    """
    try:
        from veloxquant_mlx import KVCacheBuilder, KVCacheConfig
    except ImportError:
        return None
    config = KVCacheConfig(
        method="kivi", bit_width_inlier=bits, kivi_group_size=64, residual_length=RECENT, head_dim=64
    )
    caches: list[Any] = KVCacheBuilder.for_model(model, config)
    return caches


def halved(model: Any, quantization: Quantization, n: int) -> int:
    """The bytes of n tokens of a model whose keys and values are in float16."""
    cache = CausalCache()
    cache.init(mx.float16, capacity=n, max_batch=n, quantization=quantization)
    with cache.forward(Batch.run(0, 0, n)):
        for index, layer in enumerate(model.layers):
            cache.layer(index).put(*[mx.zeros((1, layer.self_attn.n_kv_heads, n, 64))] * 2)
    return cache.nbytes

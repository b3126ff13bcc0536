"""Measures quantization: bytes of K and V, and the loss on real text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from benchmarks.rows import Row, held, less
from benchmarks.setting import Setting
from benchmarks.text import losses, topics
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, BLOCK = 2048, 256

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
    "4, groups of 32": {"kv_bits": 4, "kv_group_size": 32},
}
"""Options by name: one width for keys and values, or "keys and values" separately."""


def run(setting: Setting) -> Iterator[Row]:
    """Bytes and loss of SmolLM2 on 2,048 tokens of real text, with quantized keys and values."""
    model, tokenizer = setting.load("smollm2")
    text = topics(tokenizer, setting.of(TOKENS, BLOCK) + 1)
    whole = losses(model, make_prompt_cache(model), text, BLOCK).mean()
    ways = setting.of(WAYS, {"8 and 4": WAYS["8 and 4"]})
    for name, options in tqdm(ways.items(), unit="way", leave=False):
        cache = make_prompt_cache(model, **options)
        loss = losses(model, cache, text, BLOCK).mean()
        halves = (len(text) - 1) * sum(2 * 2 * layer.self_attn.n_kv_heads * 64 for layer in model.layers)
        yield held(f"bits.bytes.{name}", f"K and V in {name} bits", cache.nbytes, "float16", halves)
        yield less(f"bits.loss.{name}", f"loss in {name} bits", "nats", loss, "float32", whole)

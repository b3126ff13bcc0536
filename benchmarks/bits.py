"""What fewer bits cost: bytes of K and V, and the loss on real text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from tqdm import tqdm

from benchmarks.text import topics
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, BLOCK = 2048, 256

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
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
"""Bits of keys and values alike, or of keys and of values."""


class Measured(NamedTuple):
    """Bytes of K and V beside those of float16, and the mean loss in nats a token."""

    name: str
    share: float
    loss: float


def measured() -> Iterator[Measured]:
    """Each way, the first of them in float."""
    model, tokenizer = smollm2.load(mx.float32)
    text = topics(tokenizer, TOKENS + 1)
    for name, options in tqdm(WAYS.items(), unit="way"):
        cache = make_prompt_cache(model, **options)
        loss = _loss(model, cache, text)
        halves = TOKENS * sum(2 * 2 * layer.self_attn.n_kv_heads * 64 for layer in model.layers)
        yield Measured(name, cache.nbytes / halves, loss)


def _loss(model: Any, cache: Any, text: list[int]) -> float:
    total = 0.0
    for start in range(0, TOKENS, BLOCK):
        logits = model(mx.array([text[start : start + BLOCK]]), cache=cache)[0].astype(mx.float32)
        chosen = mx.array(text[start + 1 : start + BLOCK + 1])[:, None]
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, chosen, axis=1)[:, 0]
        part: Any = losses.sum().item()
        total += part
    return total / TOKENS


def run() -> Iterator[str]:
    """Bytes and loss of SmolLM2 on 2,048 tokens of real text, for keys and values in fewer bits."""
    whole = None
    for name, share, loss in measured():
        whole = whole or loss
        yield f"{name:24} {share:.3f} of float16's bytes, loss {loss:.4f} ({100 * (loss / whole - 1):+.2f}%)"

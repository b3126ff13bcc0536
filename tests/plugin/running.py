"""Running models on caches, and mlx-lm's keys rotated by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from tests.plugin.configurations import build

Cache = list[Any]


@cache
def model_of(name: str, is_wide: bool = False) -> nn.Module:
    """The model of a configuration for all tests that leave it as it is: built and tried once."""
    return build(name, is_wide=is_wide)


def logits_of(model: nn.Module, cache: Cache, tokens: list[int], block: int | None = None) -> mx.array:
    """Logits (len(tokens), vocabulary) of tokens fed in blocks."""
    size = block or len(tokens)
    parts = []
    for start in range(0, len(tokens), size):
        parts.append(model(mx.array([tokens[start : start + size]]), cache=cache)[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def greedy(model: nn.Module, prompt: list[int], n: int, block: int = 1) -> list[int]:
    """By mlx-lm's own caches, token by token, which is exact everywhere, or in blocks."""
    cache, tokens = make_theirs(model), list[int]()
    for start in range(0, len(prompt), block):
        logits = model(mx.array([prompt[start : start + block]]), cache=cache)
    for _ in range(n):
        best: int = mx.argmax(logits[0, -1]).tolist()  # type: ignore[assignment]
        tokens.append(best)
        logits = model(mx.array([[best]]), cache=cache)
    return tokens


def deviation(logits: mx.array, expected: mx.array) -> float:
    """The largest difference, as a fraction of the standard deviation of what is expected."""
    worst = (mx.abs(logits - expected).max() / mx.sqrt(mx.var(expected))).tolist()
    assert isinstance(worst, float)
    return worst


def difference(a: mx.array, b: mx.array) -> float:
    worst = mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().tolist()
    assert isinstance(worst, float)
    return worst


def plain(model: nn.Module) -> list[KVCache]:
    return [KVCache() for _ in model.layers]


def without(
    cache: list[KVCache], begin: int, end: int, dims: int, base: float, traditional: bool
) -> list[KVCache]:
    """mlx-lm's caches less the tokens [begin, end), the later keys rotated by hand."""
    result = []
    for layer in cache:
        keys, values = (array[:, :, : layer.offset] for array in (layer.keys, layer.values))
        tail = keys[:, :, end:].astype(mx.float32)
        # As (tokens, heads, 1, dim) every token is rotated by the same amount.
        turned = mx.fast.rope(
            tail.transpose(2, 1, 0, 3),
            dims,
            traditional=traditional,
            base=base,
            scale=1.0,
            offset=mx.full((tail.shape[2],), begin - end),
        ).transpose(2, 1, 0, 3)
        new = KVCache()
        new.update_and_fetch(
            mx.concatenate([keys[:, :, :begin], turned.astype(keys.dtype)], axis=2),
            mx.concatenate([values[:, :, :begin], values[:, :, end:]], axis=2),
        )
        result.append(new)
    return result

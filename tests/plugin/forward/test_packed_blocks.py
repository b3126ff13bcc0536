"""Packed keys and values are seen as they are stored, by blocks of any size and by rows of any batch.

The last bit of a float, which differs with the shape of a product, can tip a feature into the next level, so
that most logits are compared and not all.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import logits_of

NAMES = ["llama", "llama:window", "gemma3_text", "gpt_oss", "llama4", "deepseek_v3", "deepseek_v32"]
NAMES += ["kimi_linear", "qwen3_next"]
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]


@lru_cache(maxsize=1)
def model_of(name: str) -> nn.Module:
    return build(name, is_wide=True)


def assert_close(found: mx.array, expected: mx.array) -> None:
    worst = mx.sort(mx.abs(found - expected).max(axis=-1) / mx.std(expected))
    assert worst[worst.size // 2] <= 0.02


@pytest.mark.parametrize(
    "options", [{"kv_bits": 8}, {"kv_bits": (8, 4), "kv_recent": 0, "quantize_after": 9}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_a_block_sees_its_own_tokens_as_smaller_blocks_see_them(name: str, options: dict[str, Any]) -> None:
    """Blocks longer than a window with what can be dropped, of which not all tokens are stored."""
    model, found = model_of(name), list[mx.array]()
    for block in (40, 3):
        cache = make_prompt_cache(model, rewind=2, kv_group_size=32, **options)
        logits_of(model, cache, TEXT[:10])
        found.append(logits_of(model, cache, TEXT[10:50], block))
    assert_close(*found)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_sees_its_own_tokens_as_alone(name: str) -> None:
    """Rows of unequal length, in blocks that are padded on the left, and single tokens."""
    model, lengths = model_of(name), (25, 14)
    caches = [make_prompt_cache(model, rewind=2, kv_group_size=32, kv_bits=(8, 4)) for _ in range(4)]
    batch = [one.merge([one, two]) for one, two in zip(*caches[:2], strict=True)]
    for layer in batch:
        layer.prepare(left_padding=[25 - n for n in lengths])
    block = mx.array([[0] * (25 - n) + TEXT[:n] for n in lengths])
    found = [model(block, cache=batch)] + [model(mx.array([[t], [t]]), cache=batch) for t in TEXT[40:50]]
    for row, (n, alone) in enumerate(zip(lengths, caches[2:], strict=True)):
        expected = [logits_of(model, alone, TEXT[:n]), logits_of(model, alone, TEXT[40:50], 1)]
        assert_close(found[0][row, 25 - n :], expected[0])
        assert_close(mx.concatenate([logits[row] for logits in found[1:]]), expected[1])

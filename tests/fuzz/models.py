"""Tiny models of several architectures, each with a conversation that must not suffer."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.configurations import build

MODELS = ("llama", "llama:window", "deepseek_v32", "llama4", "qwen3_next", "gpt2")
"""Full attention, windows, a latent with an index beside it, chunks, recurrences, learned positions."""
TOKENS = 90
"""Of every vocabulary."""


class Held(NamedTuple):
    """A model, and a conversation in its pool."""

    model: nn.Module
    bystander: PromptCache


@cache
def held(name: str) -> Held:
    """A model with heads that can be divided into groups of 32 features."""
    model = build(name, is_wide=True)
    bystander = make_prompt_cache(model)
    run(model, bystander, 5)
    return Held(model, bystander)


def run(model: nn.Module, cache: Any, n: int, first: int = 1) -> mx.array:
    """Feed n tokens, and compute what comes out."""
    logits: mx.array = model(mx.array([[(first + 7 * i) % TOKENS for i in range(n)]]), cache=cache)
    mx.eval(logits)
    assert logits.shape[:2] == (1, n)
    return logits

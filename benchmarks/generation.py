"""Measures text generation with mlx-lm's generate_step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache as theirs

from benchmarks.measure import speed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from mlx_kvcache.plugin import make_prompt_cache as ours

TOKENS = 32


def run(setting: Setting) -> Iterator[Row]:
    """Milliseconds per token of mlx_lm's generate_step, with this package's caches and mlx-lm's."""
    model, tokenizer = setting.load("smollm2")
    text = "Once upon a time there was a small cache that"
    prompt = mx.array(tokenizer.encode(text) if tokenizer else list(text.encode()))

    def generate(make: Callable[[Any], Any]) -> tuple[list[int], float]:
        steps = generate_step(prompt, model, max_tokens=TOKENS + 1, prompt_cache=make(model))
        tokens = [next(steps)[0]]
        start = time.perf_counter()
        tokens += [token for token, _ in steps]
        return tokens, time.perf_counter() - start

    if generate(ours)[0] != generate(theirs)[0]:
        raise RuntimeError("the two generate different text")
    yield speed(
        "generation",
        "a token of mlx_lm.generate",
        "ms",
        lambda: generate(ours)[1],
        "mlx-lm's caches",
        lambda: generate(theirs)[1],
        setting.of(12, 2),
        TOKENS,
    )

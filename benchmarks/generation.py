"""Speed of generating text."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache as theirs

from benchmarks.measure import paired
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache as ours

TOKENS, ROUNDS = 32, 20


def run() -> Iterator[str]:
    """Seconds per token of SmolLM2 by mlx_lm's generate_step, against mlx-lm's own caches."""
    model, tokenizer = smollm2.load()
    prompt = mx.array(tokenizer.encode("Once upon a time there was a small cache that"))

    def generate(make) -> tuple[list[int], float]:
        steps = generate_step(prompt, model, max_tokens=TOKENS + 1, prompt_cache=make(model))
        tokens = [next(steps)[0]]
        start = time.perf_counter()
        tokens += [token for token, _ in steps]
        return tokens, time.perf_counter() - start

    assert generate(ours)[0] == generate(theirs)[0], "different text"
    result = paired(lambda: generate(ours)[1], lambda: generate(theirs)[1], ROUNDS, "generation")
    yield (
        f"{TOKENS / result.ours:.2f} tokens/s, mlx-lm {TOKENS / result.theirs:.2f}; "
        f"time of ours to theirs {result}, so speed {1 / result.ratio:.3f} of theirs"
    )

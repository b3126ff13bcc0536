"""The same in bfloat16 and float16: not further from float32 than mlx-lm's own caches are.

In 16 bits two right ways to compute differ. How far mlx-lm's own are from a computation in float32, with the
same weights, is what rounding does.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache.plugin import PromptCache, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import logits_of

KINDS = ["llama", "llama:window", "gemma3_text", "llama4", "deepseek_v3", "falcon_h1"]
"""Full attention, windows, both, chunks, latents, a recurrence. On a CPU MLX's experts need float32."""
DTYPES = [mx.bfloat16, mx.float16]
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(60)]


@lru_cache(maxsize=2)
def models_of(name: str, dtype: mx.Dtype) -> tuple[nn.Module, nn.Module]:
    """A model, and one in float32 with the same weights."""
    model, exact = (build(name, is_dense=True) for _ in range(2))
    for each in (model, exact):
        each.set_dtype(dtype)
    exact.set_dtype(mx.float32)
    return model, exact


def logprobs_of(model: nn.Module, cache: Any, block: int) -> mx.array:
    """By mlx-lm's loop, which is made to go on with given tokens: near ties would part them."""
    forced = iter(TEXT[25:32])
    steps = generate_step(
        mx.array(TEXT[:25]),
        model,
        max_tokens=6,
        prompt_cache=cache,
        prefill_step_size=block,
        sampler=lambda logprobs: mx.array([next(forced)]),
    )
    return mx.stack([logprobs for _, logprobs in steps]).astype(mx.float32)


def distance(a: mx.array, b: mx.array) -> float:
    """Root of the mean square."""
    found = mx.sqrt(mx.square(a.astype(mx.float32) - b.astype(mx.float32)).mean()).tolist()
    assert isinstance(found, float)
    return found


@pytest.mark.parametrize("block", [5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_mlx_lms_loop(name: str, dtype: mx.Dtype, block: int) -> None:
    model, exact = models_of(name, dtype)
    expected = logprobs_of(exact, make_theirs(exact), 1)
    theirs = logprobs_of(model, make_theirs(model), block)
    ours = logprobs_of(model, make_prompt_cache(model), block)
    noise = distance(theirs, expected)
    assert 0 < distance(ours, expected) <= 1.5 * noise
    assert distance(ours, theirs) <= 2 * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_states_and_files(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    model, exact = models_of(name, dtype)
    cache, own, file = make_prompt_cache(model), make_theirs(model), tmp_path / "cache.safetensors"
    noise = distance(
        logits_of(model, make_theirs(model), TEXT[:25], 1), logits_of(exact, make_theirs(exact), TEXT[:25], 1)
    )
    for position in range(1, 18):
        for each in (cache, own):
            logits_of(model, each, TEXT[position - 1 : position])
        assert kinds_of(cache) == kinds_of(own)
        if position not in (1, 8, 15, 16, 17):
            continue
        cache.save(file, format="mlx-lm")
        expected = logits_of(model, cache.fork(), TEXT[position : position + 1])
        for loaded in (PromptCache.load(file, model), load_prompt_cache(str(file))):
            found = logits_of(model, loaded, TEXT[position : position + 1])
            assert distance(found, expected) <= 2 * noise


def kinds_of(cache: Any) -> list[list[tuple[mx.Dtype, int, int]]]:
    """Of each entry's arrays what does not depend on how many tokens they hold."""
    return [
        [
            (array.dtype, array.ndim, array.shape[-1])
            for _, array in tree_flatten(entry.state)
            if isinstance(array, mx.array)
        ]
        for entry in cache
    ]

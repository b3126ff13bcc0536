"""The small configurations of mlx-vlm's models: complete, sound, and telling where it contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.models.cache import make_prompt_cache

from tests.plugin.configurations import VOCABULARY, module_of
from tests.plugin.configurations.vlm import build_language_model
from tests.plugin.configurations.vlm_modules import language_modules
from tests.plugin.configurations.vlm_tables import (
    VLM_CONFIGURATIONS,
    VLM_DIFFERS_IN_BLOCKS,
    VLM_NOT_BUILT,
    VLM_STAY_NARROW,
)

TOKENS = [(7 * i + i * i + i // 7) % VOCABULARY for i in range(23)]
# Relative to the standard deviation of the logits.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def without_compiling() -> Iterator[None]:
    """A function takes up to seconds to compile for the CPU, and runs a few times here.

    Compiled once for all lengths, `hy_v4` would also keep the place where it partitions scores.
    """
    mx.disable_compile()
    yield
    mx.enable_compile()


def run(model: nn.Module, tokens: list[int], blocks: list[int]) -> mx.array:
    """Logits of the tokens, fed in blocks to mlx-vlm's own caches."""
    cache = make_prompt_cache(model)
    parts = []
    begin = 0
    for size in blocks:
        parts.append(model(mx.array([tokens[begin : begin + size]]), cache=cache).logits)
        mx.eval(parts[-1])
        begin += size
    return mx.concatenate(parts, axis=1)


def deviation(logits: mx.array, expected: mx.array) -> float:
    worst = (mx.abs(logits - expected).max() / mx.sqrt(mx.var(expected))).tolist()
    assert isinstance(worst, float)
    return worst


def test_every_language_module_has_its_place() -> None:
    configured = {module_of(name) for name in VLM_CONFIGURATIONS}
    assert not configured & set(VLM_NOT_BUILT)
    assert sorted(configured | set(VLM_NOT_BUILT)) == language_modules()
    assert set(VLM_DIFFERS_IN_BLOCKS) | VLM_STAY_NARROW <= set(VLM_CONFIGURATIONS)


@pytest.mark.parametrize("name", sorted(VLM_CONFIGURATIONS))
def test_language_model_runs(name: str) -> None:
    model = build_language_model(name)
    whole = run(model, TOKENS, [len(TOKENS)])
    assert whole.shape[:2] == (1, len(TOKENS)) and whole.shape[2] >= VOCABULARY
    assert mx.isfinite(whole).all().item()
    spread = mx.sqrt(mx.var(whole, axis=-1))
    assert mx.all((spread > 0.1) & (spread < 10)).item()
    # More than a window in one block, and more than a window token by token.
    parts = run(model, TOKENS, [13] + [1] * 10)
    assert (deviation(parts, whole) < TOLERANCE) == (name not in VLM_DIFFERS_IN_BLOCKS)

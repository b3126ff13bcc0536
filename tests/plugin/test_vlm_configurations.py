"""The small configurations of mlx-vlm's models: complete, sound, and telling where it contradicts itself."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_vlm.models.cache import make_prompt_cache

from tests.plugin.configurations import VOCABULARY, chosen, module_of
from tests.plugin.configurations.vlm import (
    VLM_CONFIGURATIONS,
    VLM_DIFFERS_IN_BLOCKS,
    VLM_NOT_BUILT,
    VLM_STAY_NARROW,
    VLM_WHOLE,
    build_language_model,
    build_vlm,
    language_modules,
    picture,
)
from tests.plugin.running import deviation

pytestmark = pytest.mark.usefixtures("without_compiling")
TOKENS = [(7 * i + i * i + i // 7) % VOCABULARY for i in range(23)]
# Relative to the standard deviation of the logits.
TOLERANCE = 1e-4


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


def test_every_language_module_has_its_place() -> None:
    configured = {module_of(name) for name in VLM_CONFIGURATIONS}
    assert not configured & set(VLM_NOT_BUILT)
    assert sorted(configured | set(VLM_NOT_BUILT)) == language_modules()
    assert set(VLM_DIFFERS_IN_BLOCKS) | VLM_STAY_NARROW <= set(VLM_CONFIGURATIONS)


# All of them are run on both kinds of caches, and compared, by test_vlm_architectures.py.
ALONE = chosen(VLM_CONFIGURATIONS, [*VLM_DIFFERS_IN_BLOCKS, "llama", "qwen2_vl"])


@pytest.mark.parametrize("name", sorted(ALONE))
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


@pytest.mark.parametrize("name", sorted(VLM_WHOLE))
def test_whole_model_sees_the_picture(name: str) -> None:
    model = build_vlm(name)
    first, second = (
        model(**picture(name, seed), cache=make_prompt_cache(model.language_model)).logits for seed in (0, 1)
    )
    inputs = picture(name)
    assert first.shape == (*inputs["input_ids"].shape, VOCABULARY)
    assert mx.isfinite(first).all().item()
    assert deviation(second[:, -1], first[:, -1]) > 0.05
    features = model.get_input_embeddings(**inputs)
    assert features.inputs_embeds.shape[:2] == inputs["input_ids"].shape

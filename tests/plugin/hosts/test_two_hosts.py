"""Models of both hosts in one process, each attached or not, and handed to the other's tools."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
import mlx_vlm.models.cache as mlx_vlm_cache
import pytest
from mlx_lm.generate import generate_step

from mlx_kvcache.plugin import attach, detach, make_prompt_cache
from mlx_kvcache.plugin.hosts.layout import host_of
from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from mlx_kvcache.plugin.hosts.mlx_vlm import MLX_VLM
from mlx_kvcache.plugin.hosts.observe import is_cache
from tests.plugin.configurations import build
from tests.plugin.configurations.vlm import build_language_model, build_vlm
from tests.plugin.running import difference

TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(20)]
CACHES: list[Any] = [mlx_lm_cache, mlx_vlm_cache]


def logits(model: Any, cache: Any) -> mx.array:
    found = model(mx.array([TEXT]), cache=cache)
    array: mx.array = getattr(found, "logits", found)
    return array


def test_each_model_is_of_its_host() -> None:
    of_lm, of_vlm, whole = build("llama"), build_language_model("llama"), build_vlm("llava")
    assert [host_of(model) for model in (of_lm, of_vlm, whole)] == [MLX_LM, MLX_VLM, MLX_VLM]
    assert isinstance(make_prompt_cache(of_lm)[0], mlx_lm_cache.KVCache)
    assert isinstance(make_prompt_cache(of_vlm)[0], mlx_vlm_cache.KVCache)
    assert make_prompt_cache(whole).pool.model is whole.language_model


def test_both_are_attached_and_one_is_detached() -> None:
    models: list[Any] = [build("llama"), build_language_model("llama")]
    before = [own.make_prompt_cache for own in CACHES]
    expected = [
        logits(model, own.make_prompt_cache(model)) for model, own in zip(models, CACHES, strict=True)
    ]
    for model in models:
        attach(model)
    for model, own, each in zip(models, CACHES, expected, strict=True):
        cache = own.make_prompt_cache(model)
        assert is_cache(cache) and difference(logits(model, cache), each) <= 1e-5
    detach(models[0])
    assert [is_cache(own.make_prompt_cache(model)) for model, own in zip(models, CACHES, strict=True)] == [
        False,
        True,
    ]
    detach(models[1])
    assert [own.make_prompt_cache for own in CACHES] == before


@pytest.mark.parametrize("other", CACHES, ids=["of mlx-lm", "of mlx-vlm"])
def test_the_other_host_s_tool_makes_a_cache_for_an_attached_model(other: Any) -> None:
    """As servers on top of both do. The entries are those of the model's host."""
    models: list[Any] = [build("llama"), build_language_model("llama")]
    for model in models:
        with attach(model):
            cache = other.make_prompt_cache(model)
            assert is_cache(cache)
            assert isinstance(cache[0], host_of(model).caches.KVCache)
            logits(model, cache)
            assert cache.position == len(TEXT)


def test_a_model_whose_output_a_tool_cannot_use() -> None:
    """mlx-lm's generation expects an array. Its own error is raised, and the cache goes on."""
    model: Any = build_language_model("llama")
    with attach(model):
        cache = mlx_lm_cache.make_prompt_cache(model)
        with pytest.raises(TypeError):
            next(generate_step(mx.array(TEXT), model, prompt_cache=cache))
        cache.rewind_to(0)
        logits(model, cache)
        assert cache.position == len(TEXT)

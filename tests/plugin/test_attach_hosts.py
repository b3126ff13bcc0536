"""Attached models in programs that have mlx-lm's functions under names of their own."""

from __future__ import annotations

import gc
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models import gpt2, llama
from mlx_vlm.models import cache as mlx_vlm_cache

from mlx_kvcache.errors import NotSupportedError
from mlx_kvcache.plugin import PromptCache, attach, detach, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_gpt2, tiny_llama

TOKENS = [5, 17, 3, 88]

host = ModuleType("a_tool")
host.make_prompt_cache = mlx_lm_cache.make_prompt_cache  # type: ignore[attr-defined]
"""Bound before anything is attached, and not in a module of mlx-lm."""


def of_vlm(model: Any) -> Any:
    """As mlx-vlm's own function does it."""
    return model.make_cache() if hasattr(model, "make_cache") else [None] * len(model.layers)


def made(model: nn.Module) -> list[Any]:
    return [host.make_prompt_cache(model), of_vlm(model), mlx_lm_cache.make_prompt_cache(model)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next"])
def test_the_order_of_imports_does_not_matter(name: str) -> None:
    """One model has no make_cache of its own, the others have."""
    model = build(name)
    had = hasattr(model, "make_cache")
    own = [type(entry) for entry in mlx_lm_cache.make_prompt_cache(model)]
    expected = logits_of(model, mlx_lm_cache.make_prompt_cache(model), TOKENS)
    with attach(model, rewind=9):
        for cache in made(model):
            assert isinstance(cache, PromptCache)
            assert [entry.__name__ for entry in map(type, cache)] == [kind.__name__ for kind in own]
            assert mx.allclose(logits_of(model, cache, TOKENS), expected, atol=1e-4)
        # By another way than attach, with other options.
        assert make_prompt_cache(model, capacity=7).capacity == 7
    assert hasattr(model, "make_cache") == had
    assert [type(entry) for entry in host.make_prompt_cache(model)] == own


def test_a_model_of_no_host_gets_the_caches_of_the_host_that_is_asked() -> None:
    class Own(nn.Module):
        layers = (None,)

    own = Own()  # type: ignore[no-untyped-call]
    with attach(tiny_gpt2()):
        for caches in (mlx_lm_cache, mlx_vlm_cache):
            assert [type(entry) for entry in caches.make_prompt_cache(own)] == [caches.KVCache]


def test_each_attach_needs_its_detach() -> None:
    model, other = tiny_gpt2(), tiny_gpt2()
    attach(model, capacity=50)
    attach(model, capacity=60)
    assert {cache.capacity for cache in made(model)} == {60}
    detach(model)
    assert {cache.capacity for cache in made(model)} == {50}
    assert not hasattr(other, "make_cache")
    cache = make_prompt_cache(model)
    detach(model)
    # Caches are alive, and yet the model is not attached.
    assert type(model) is not gpt2.Model and not hasattr(model, "make_cache")
    assert type(host.make_prompt_cache(model)[0]) is mlx_lm_cache.KVCache
    bounded = host.make_prompt_cache(model, 30)
    assert type(bounded[0]) is mlx_lm_cache.RotatingKVCache
    del cache
    gc.collect()
    assert type(model) is gpt2.Model


def test_a_make_cache_that_the_model_has_as_an_attribute() -> None:
    model = tiny_gpt2()
    model.make_cache = lambda: [mlx_lm_cache.RotatingKVCache(8) for _ in range(2)]
    own = model.make_cache
    with attach(model):
        for cache in made(model):
            assert isinstance(cache, PromptCache)
            assert [type(entry).__name__ for entry in cache] == ["RotatingKVCache"] * 2
        model.make_cache = lambda: [mlx_lm_cache.RotatingKVCache(9) for _ in range(2)]
        assert {cache[0].max_size for cache in made(model)} == {9}
        model.make_cache = own
    assert model.make_cache is own
    del model.make_cache
    assert not hasattr(model, "make_cache")


class Mine(llama.Model):  # type: ignore[misc]
    def make_cache(self) -> list[Any]:
        return [mlx_lm_cache.KVCache(), *(mlx_lm_cache.RotatingKVCache(8) for _ in self.layers[1:])]


def test_a_class_that_is_chosen_while_the_model_is_attached() -> None:
    model = tiny_llama()
    attach(model)

    class Own(type(model)):  # type: ignore[misc]
        def make_cache(self) -> Any:
            return super().make_cache()

    model.__class__ = Own
    assert all(isinstance(cache, PromptCache) for cache in made(model))
    attach(model)
    assert all(isinstance(cache, PromptCache) for cache in made(model))
    detach(model)
    detach(model)
    assert type(model) is Own
    assert {type(entry) for cache in made(model) for entry in cache} == {mlx_lm_cache.KVCache}
    model.__class__ = Mine
    with attach(model):
        assert {type(entry).__name__ for cache in made(model) for entry in cache} == {
            "KVCache",
            "RotatingKVCache",
        }
    assert type(model) is Mine


class Wrapper(nn.Module):
    """A model of mlx-vlm, which has the language model inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.language_model = tiny_llama()

    def __call__(self, tokens: mx.array, cache: Any = None) -> Any:
        return SimpleNamespace(logits=self.language_model(tokens, cache=cache))


class Silent(nn.Module):
    """What nobody calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = [nn.Linear(2, 2)]


class Closed(llama.Model):  # type: ignore[misc]
    """What has no subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("it is final")


def test_a_wrapper_is_refused_with_what_to_attach_instead() -> None:
    model = Wrapper()
    with pytest.raises(TypeError, match=r"got .*Wrapper without layers or make_cache.*its language_model"):
        attach(model)
    attach(model.language_model)
    cache = of_vlm(model.language_model)
    model(mx.array([TOKENS]), cache=cache)
    assert isinstance(cache, PromptCache) and cache.position == 4
    detach(model.language_model)


def test_what_cannot_be_observed_is_refused_and_not_attached() -> None:
    closed = tiny_llama()
    closed.__class__ = Closed
    before = mlx_lm_cache.make_prompt_cache
    for model, reason in ((Silent(), "does not define __call__"), (closed, "it is final")):
        original = type(model)
        with pytest.raises(NotSupportedError, match=reason):
            attach(model)
        assert type(model) is original
        with pytest.raises(ValueError, match="not attached"):
            detach(model)
    assert mlx_lm_cache.make_prompt_cache is before

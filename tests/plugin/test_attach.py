"""mlx-lm's own functions, unchanged, on attached models."""

from __future__ import annotations

import copy
import gc
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.server
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import base, llama
from mlx_lm.models import cache as mlx_lm_cache

from mlx_kvcache.plugin import PromptCache, attach, detach
from mlx_kvcache.plugin.hosts import handles as ragged
from tests.plugin.tiny import tiny_llama

ORIGINAL = mlx_lm_cache.make_prompt_cache
PROMPT = mx.array([3, 14, 15, 92, 65])


def bound() -> list[object]:
    """What mlx-lm's modules call make_prompt_cache."""
    names = ("models.cache", "server")
    return [sys.modules[f"mlx_lm.{name}"].make_prompt_cache for name in names]


def tokens(model: nn.Module, n: int = 12, **options: Any) -> list[int]:
    return [token for token, _ in generate_step(PROMPT, model, max_tokens=n, **options)]


def test_attach_and_detach_are_counted() -> None:
    first, second, never = tiny_llama(), tiny_llama(), tiny_llama()

    def make(model: nn.Module) -> Any:
        return sys.modules["mlx_lm.server"].make_prompt_cache(model)

    attach(first, capacity=50)
    attach(second)
    attach(first, capacity=60)
    assert [make(m).capacity for m in (first, second)] == [60, None]
    assert not isinstance(make(never), PromptCache)
    detach(first)
    assert make(first).capacity == 50
    detach(first)
    assert not isinstance(make(first), PromptCache) and isinstance(make(second), PromptCache)
    detach(second)
    assert bound() == [ORIGINAL, ORIGINAL]
    with pytest.raises(ValueError, match="not attached"):
        detach(first)


def test_generating_gives_the_same_tokens() -> None:
    model = tiny_llama()
    expected = tokens(model)
    with attach(model):
        assert tokens(model) == expected
    assert bound() == [ORIGINAL, ORIGINAL]


def test_max_kv_size_is_honoured() -> None:
    model = tiny_llama()
    with attach(model):
        made = sys.modules["mlx_lm.server"].make_prompt_cache(model, 20)
        assert (made.capacity, made._conversation.limits.overflow, made._conversation.limits.sinks) == (
            20,
            "shift",
            4,
        )
        assert len(tokens(model, 60, max_kv_size=20)) == 60


def test_kv_bits_that_do_not_fit_are_refused_instead_of_ignored() -> None:
    model = tiny_llama()
    with (
        attach(model),
        pytest.raises(ValueError, match=r"head_dim 8 of .* is not a multiple of group_size 64"),
    ):
        tokens(model, kv_bits=8, quantized_kv_start=0)


def test_bad_options_attach_nothing() -> None:
    with pytest.raises(ValueError, match="capacity"):
        attach(tiny_llama(), capacity=-1)
    assert bound() == [ORIGINAL, ORIGINAL]


def test_a_model_that_is_dropped_is_detached() -> None:
    model = tiny_llama()
    attach(model)
    del model
    gc.collect()
    assert bound() == [ORIGINAL, ORIGINAL]


def test_generate_on_the_chat_model(chat_model: tuple[nn.Module, Any]) -> None:
    model, tokenizer = chat_model
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    with attach(model):
        assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=10)


def test_the_model_and_its_module_are_put_back() -> None:
    """While caches live, the model has a class of its own and its module attends to handles."""
    gc.collect()
    # Caches of other tests may live, such as those of a page whose blocks have run.
    others = set(ragged._users[llama.__name__])
    model = tiny_llama()
    with attach(model):
        cache = sys.modules["mlx_lm.server"].make_prompt_cache(model)
        assert type(model) is not llama.Model
        assert isinstance(model, llama.Model)
        assert llama.scaled_dot_product_attention is ragged.attending(base.scaled_dot_product_attention)
        twin = copy.deepcopy(model)
        assert mx.array_equal(twin(PROMPT[None]), model(PROMPT[None]))
    assert type(model) is not llama.Model
    del cache
    gc.collect()
    assert type(model) is llama.Model
    assert ragged._users[llama.__name__] == others
    theirs = base.scaled_dot_product_attention
    put_back = ragged.attending(theirs) if others else theirs
    assert llama.scaled_dot_product_attention is put_back

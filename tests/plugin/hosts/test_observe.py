"""The class of a model that has caches."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from mlx_kvcache.plugin import attach, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_llama

TOKENS = [5, 17, 3, 88]


def pickled(model: nn.Module, protocol: int | None = None) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(model, protocol))  # noqa: S301  # its own
    return twin


class Mine(llama.Model):  # type: ignore[misc]
    """A user's own."""


def test_a_class_that_was_set_back_by_the_user_stays() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    model.__class__ = llama.Model
    del cache
    assert type(model) is llama.Model


def test_a_class_that_the_user_chose_meanwhile_stays() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    model.__class__ = Mine
    del cache
    assert type(model) is Mine
    cache = make_prompt_cache(model)
    logits_of(model, cache, TOKENS)
    assert type(model) is not Mine and isinstance(model, Mine)
    assert cache.position == 4
    del cache
    assert type(model) is Mine


def test_a_subclass_of_the_class_with_caches_is_a_model_like_others() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    own = type("Own", (type(model),), {})
    model.__class__ = own
    logits_of(model, cache, TOKENS)
    assert cache.position == 4
    del cache
    assert type(model) is own
    again = make_prompt_cache(model)
    logits_of(model, again, TOKENS, 2)
    assert again.position == 4
    assert isinstance(copy.deepcopy(model), own)
    del again
    assert type(model) is own


@pytest.mark.parametrize("is_attached", [False, True])
def test_copies_of_a_model_with_caches_are_plain_models(is_attached: bool) -> None:
    model = tiny_llama()
    original = type(model)
    cache = make_prompt_cache(model)
    if is_attached:
        attach(model)
    expected = np.array(model(mx.array([TOKENS]), cache=cache))
    twins = [pickled(model, protocol) for protocol in range(2, 6)]
    for twin in (*twins, copy.deepcopy(model), copy.copy(model)):
        assert type(twin) is original
        assert np.array_equal(np.array(twin(mx.array([TOKENS]))), expected)
        own = make_prompt_cache(twin)
        logits_of(twin, own, TOKENS)
        assert own.pool is not cache.pool
        with pytest.raises(ValueError, match="another model"):
            twin(mx.array([[1]]), cache=cache)
        del own
        assert type(twin) is original
    assert cache.position == 4


def test_a_class_that_nobody_uses_any_more_is_let_go() -> None:
    """mlx-lm makes a module with a class anew whenever it loads a model that brings its own code."""
    model = tiny_llama()
    own = type("Own", (llama.Model,), {})
    model.__class__ = own
    cache = make_prompt_cache(model)
    logits_of(model, cache, TOKENS)
    gone = weakref.ref(own)
    del model, cache, own
    gc.collect()
    assert gone() is None


def test_models_of_one_class_are_observed_apart() -> None:
    one, two = tiny_llama(), tiny_llama()
    cache = make_prompt_cache(one)
    assert type(two) is llama.Model
    other = make_prompt_cache(two)
    del cache
    assert type(one) is llama.Model and type(two) is not llama.Model
    del other
    assert type(two) is llama.Model


def test_recurrent_models_are_copied_too() -> None:
    model = build("qwen3_next")
    cache = make_prompt_cache(model)
    twin = pickled(model)
    assert isinstance(twin, nn.Module) and type(model).__mro__[1] is type(twin)
    del cache

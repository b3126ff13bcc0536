"""What a newer mlx-lm could ask for is noticed when a model is attached, not in the middle of a text."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import attach, make_prompt_cache
from mlx_kvcache.plugin.hosts.mlx_lm import MLX_LM
from mlx_kvcache.plugin.hosts.mlx_vlm import MLX_VLM
from tests.plugin.configurations import build
from tests.plugin.configurations.vlm import build_language_model
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama


def test_an_attribute_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lm_cache.RotatingKVCache, "compress", lambda self: None, raising=False)
    with pytest.raises(
        NotSupportedError, match=r"mlx-lm 0\.\d+\.\d+ .* mlx_lm\.models\.cache\.RotatingKVCache has compress"
    ):
        attach(tiny_llama())


def test_a_function_with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lm_cache.PromptTrie, "search", lambda self, tokens: None)
    with pytest.raises(NotSupportedError, match=r"PromptTrie.search takes \['self', 'tokens'\]"):
        attach(tiny_llama())


def test_a_function_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mlx_lm_cache.LRUPromptCache, "insert_cache")
    with pytest.raises(NotSupportedError, match=r"insert_cache takes \[\]"):
        attach(tiny_llama())


def test_a_function_of_mlx_vlm_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of those that are replaced is looked at before anything is."""
    monkeypatch.delattr("mlx_vlm.apc.APCManager.stats_snapshot")
    told = r"mlx-vlm 0\.\d+\.\d+ is not supported: apc.APCManager.stats_snapshot takes \[\]"
    with pytest.raises(NotSupportedError, match=told):
        attach(build_language_model("llama"))


def test_every_function_that_is_replaced_is_in_the_description() -> None:
    described = {path.rpartition(".")[2] for path in MLX_VLM.functions}
    tools = importlib.import_module("mlx_kvcache.plugin.serving.mlx_vlm_tools")
    assert not {*tools.FUNCTIONS, *(name for _, name, _ in tools._PATCHES)} - described


class Curious(nn.Module):
    """A model that asks its cache for something."""

    def __init__(self, ask: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ask = ask
        self.layers = [nn.Linear(4, 4)]

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        create_attention_mask(inputs, cache[0])
        self.ask(cache[0])
        return inputs


def test_a_model_that_asks_for_more_than_there_is() -> None:
    with pytest.raises(NotSupportedError, match=r"test_contract does not run .*entropy"):
        make_prompt_cache(Curious(lambda layer: layer.entropy))


def test_a_model_that_writes_a_layer_twice() -> None:
    def twice(layer: Any) -> None:
        for _ in range(2):
            layer.update_and_fetch(mx.zeros((1, 1, layer.rows.forward.n, 4)), mx.zeros((1, 1, 2, 4)))

    with pytest.raises(NotSupportedError, match="layer 0 is written twice"):
        make_prompt_cache(Curious(twice))


def test_a_cache_of_a_class_that_is_derived_from_a_known_one() -> None:
    class Special(KVCache):  # type: ignore[misc]
        pass

    model = tiny_llama()
    model.make_cache = lambda: [KVCache(), Special(), KVCache()]
    told = (
        r"layer 1 of mlx_lm\.models\.llama uses tests\.plugin\.hosts\.test_contract\..*Special, which is not"
    )
    with pytest.raises(NotSupportedError, match=told):
        make_prompt_cache(model)


def test_a_cache_of_another_package_that_has_a_known_name() -> None:
    """As mlx-vlm's: its module tells it from mlx-lm's."""

    class Theirs:
        pass

    Theirs.__module__, Theirs.__qualname__ = "mlx_vlm.models.cache", "KVCache"
    model = tiny_llama()
    model.make_cache = lambda: [Theirs()]
    told = r"uses mlx_vlm\.models\.cache\.KVCache, .* supported are KVCache, .* of mlx_lm\.models\.cache"
    with pytest.raises(NotSupportedError, match=told):
        make_prompt_cache(model)


def test_a_layer_that_the_model_never_writes() -> None:
    """Its place stays empty and its offset 0, as in mlx-lm; forwards are complete without it."""
    model = tiny_llama()
    model.make_cache = lambda: [KVCache() for _ in range(4)]
    cache = make_prompt_cache(model)
    logits_of(model, cache, [1, 2, 3])
    assert cache.position == 3
    assert [layer.offset for layer in cache] == [3, 3, 3, 0]
    for layer in cache[:3]:
        layer.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    assert cache.position == 4


of_0_31 = pytest.mark.skipif(not MLX_LM.keeps_numbers_apart, reason="since 0.32 caches have no meta_state")
TEXT = [(7 * i + 3 * i * i + 11) % 90 for i in range(30)]


def theirs_of(cache: Any) -> list[Any]:
    """mlx-lm's own caches of the same state."""
    return [
        getattr(mlx_lm_cache, type(entry).__name__).from_state(entry.state, entry.meta_state)
        for entry in cache
    ]


@of_0_31
@pytest.mark.parametrize("options", [{}, {"kv_bits": 8, "kv_group_size": 32}], ids=["float", "packed"])
@pytest.mark.parametrize("name", ["llama", "llama:window", "gemma3_text", "lfm2", "falcon_h1", "deepseek_v3"])
def test_states_of_0_31_load_into_its_own_classes(name: str, options: dict[str, Any]) -> None:
    model = build(name, is_wide=True)
    is_window = name in ("llama:window", "gemma3_text")
    if options and (is_window or name == "deepseek_v3"):
        pytest.skip("mlx-lm 0.31 cannot quantize a window, or keys that are part of the values")
    cache = make_prompt_cache(model, **options)
    for position in range(1, 18):
        logits_of(model, cache, TEXT[position - 1 : position])
        expected = logits_of(model, cache.fork(), TEXT[position : position + 1])
        found = logits_of(model, theirs_of(cache), TEXT[position : position + 1])
        assert difference(found, expected) <= (2e-2 if options else 1e-4) * mx.std(expected)


@of_0_31
def test_chunks_whose_position_0_31_would_not_know() -> None:
    """It takes the number of keys for the position, which is right in the first chunk only."""
    model = build("llama4")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:5])
    assert [entry.offset for entry in theirs_of(cache)] == [5] * len(cache)
    logits_of(model, cache, TEXT[5:11])
    with pytest.raises(NotSupportedError, match="chunks that start at position 8"):
        theirs_of(cache)
    mx.eval([entry.state for entry in cache])

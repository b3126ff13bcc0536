"""mlx-lm's store of prompt caches, as its server uses it, on attached models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import LRUPromptCache

from mlx_kvcache.plugin import attach, reuse
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(80)]
OTHER = [89 - token for token in TEXT]


@pytest.fixture(params=["llama", "gemma3_text", "llama4", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = build(request.param)
    with attach(model, rewind=4):
        yield model


def filled(model: nn.Module, tokens: list[int], block: int = 6) -> list[Any]:
    cache: list[Any] = mlx_lm_cache.make_prompt_cache(model)
    logits_of(model, cache, tokens, block)
    return cache


def assert_serves(model: nn.Module, store: LRUPromptCache, tokens: list[int], least: int) -> None:
    """What is fetched, with the rest computed, answers as the whole computed afresh."""
    cache, rest = store.fetch_nearest_cache("key", tokens)
    assert rest == tokens[len(tokens) - len(rest) :]
    assert rest
    assert len(tokens) - len(rest) >= least
    cache = cache or mlx_lm_cache.make_prompt_cache(model)
    expected = logits_of(model, unattached(model), tokens, 1)[-1:]
    assert difference(logits_of(model, cache, rest)[-1:], expected) <= 1e-4


def unattached(model: nn.Module) -> list[Any]:
    return (
        model.make_cache() if hasattr(model, "make_cache") else [mlx_lm_cache.KVCache() for _ in model.layers]
    )


def test_longer_shorter_and_equal_prompts(model: nn.Module) -> None:
    store = LRUPromptCache()
    store.insert_cache("key", TEXT[:12], filled(model, TEXT[:12]))
    store.insert_cache("key", TEXT[:40], filled(model, TEXT[:40]))
    assert_serves(model, store, TEXT[:50], least=40)
    assert_serves(model, store, TEXT[:40], least=30)
    assert_serves(model, store, TEXT[:38] + OTHER[:9], least=30)
    assert_serves(model, store, TEXT[:14] + OTHER[:9], least=8)
    assert_serves(model, store, TEXT[:12], least=6)
    assert_serves(model, store, OTHER[:20], least=0)


def test_prefixes_go_where_the_longer_cache_serves_them_and_stay_elsewhere() -> None:
    full, window = build("llama"), build("gemma3_text")
    for model, left in ((full, 1), (window, 2)):
        with attach(model, rewind=4):
            store = LRUPromptCache()
            store.insert_cache("key", TEXT[:30], filled(model, TEXT[:30]))
            store.insert_cache("key", TEXT[:60], filled(model, TEXT[:60]))
            assert len(store) == left
            assert store.nbytes >= 0
            assert_serves(model, store, TEXT[:30] + OTHER[:5], least=28)


def test_what_is_stored_is_not_changed_by_its_use(model: nn.Module) -> None:
    store = LRUPromptCache()
    store.insert_cache("key", TEXT[:40], filled(model, TEXT[:40]))
    for tail in (OTHER[:7], OTHER[20:29], TEXT[40:50]):
        assert_serves(model, store, TEXT[:39] + tail, least=30)


def test_a_draft_models_caches_behind(model: nn.Module) -> None:
    draft = tiny_llama()
    with attach(draft):
        store = LRUPromptCache()
        both = filled(model, TEXT[:30])
        both += filled(draft, TEXT[:30])
        store.insert_cache("key", TEXT[:30], both)
        cache, rest = store.fetch_nearest_cache("key", TEXT[:29] + OTHER[:4])
    assert cache is not None
    reached = 33 - len(rest)
    assert reached >= 24
    assert {rows.positions[0] for rows in {id(e.rows): e.rows for e in cache}.values()} == {reached}


def test_a_draft_models_own_caches_behind() -> None:
    model, draft = tiny_llama(), tiny_llama()
    with attach(model):
        store = LRUPromptCache()
        own = [mlx_lm_cache.KVCache() for _ in draft.layers]
        logits_of(draft, own, TEXT[:30])
        store.insert_cache("key", TEXT[:30], [*filled(model, TEXT[:30]), *own])
        cache, rest = store.fetch_nearest_cache("key", TEXT[:20] + OTHER[:4])
    assert cache is not None
    assert {entry.offset for entry in cache} == {20}
    assert len(rest) == 4


def test_stored_caches_of_models_that_are_not_attached() -> None:
    model, attached = tiny_llama(), tiny_llama()
    with attach(attached):
        store = LRUPromptCache()
        own = [mlx_lm_cache.KVCache() for _ in model.layers]
        logits_of(model, own, TEXT[:30])
        store.insert_cache("key", TEXT[:30], own)
        cache, rest = store.fetch_nearest_cache("key", TEXT[:20] + OTHER[:4])
    assert [type(entry) for entry in cache or []] == [mlx_lm_cache.KVCache] * 3
    assert len(rest) == 4


def test_bytes_are_counted_and_bounded() -> None:
    model = tiny_llama()
    with attach(model):
        one = filled(model, TEXT[:40])
        size = sum(entry.nbytes for entry in one)
        store = LRUPromptCache(max_size=10, max_bytes=2 * size)
        for start in range(5):
            store.insert_cache("key", [start, *TEXT[:39]], filled(model, [start, *TEXT[:39]]))
            assert store.nbytes <= 2 * size
        assert len(store) == 2


def test_everything_is_put_back() -> None:
    assert reuse.LRUPromptCache.fetch_nearest_cache is reuse.original_fetch
    with attach(tiny_llama()):
        assert reuse.LRUPromptCache.fetch_nearest_cache is reuse.fetch_nearest_cache
    assert reuse.LRUPromptCache.fetch_nearest_cache is reuse.original_fetch
    assert reuse.LRUPromptCache.insert_cache is reuse.original_insert


def test_one_token() -> None:
    model = tiny_llama()
    with attach(model):
        store = LRUPromptCache()
        store.insert_cache("key", TEXT[:5], filled(model, TEXT[:5]))
        assert store.fetch_nearest_cache("key", TEXT[:1]) == (None, TEXT[:1])

"""mlx-lm's store of prompt caches, as its server uses it, on attached models."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import LRUPromptCache

from mlx_kvcache.plugin import attach
from mlx_kvcache.plugin.serving import mlx_lm_store as reuse
from tests.plugin.running import difference, logits_of, model_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(80)]
OTHER = [89 - token for token in TEXT]


@pytest.fixture(params=["llama", "gemma3_text", "llama4", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = model_of(request.param)
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
    full, window = model_of("llama"), model_of("gemma3_text")
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


def test_what_ended_early_is_stored_as_far_as_it_was_computed(model: nn.Module) -> None:
    store = LRUPromptCache()
    for computed, tokens in ((TEXT[:20], TEXT[:40]), (TEXT[:34], TEXT[:33])):
        reuse.insert_partial(store, "key", tokens, filled(model, computed))
        assert_serves(model, store, TEXT[:60], least=min(len(computed), len(tokens)))
    n = len(store)
    reuse.insert_partial(store, "key", TEXT[:32], filled(model, TEXT[:32]))
    assert len(store) == n
    reuse.insert_partial(store, "key", TEXT[:9], mlx_lm_cache.make_prompt_cache(model))
    assert len(store) == n


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


def test_batches_reuse_what_single_prompts_do(model: nn.Module) -> None:
    """Four turns, repeats of the first one, and prompts that part in the middle of it."""
    counts = []
    for is_batch in (False, True):
        store, counted = LRUPromptCache(), list[int]()
        generator = BatchGenerator(model)

        def reply(
            prompt: list[int],
            is_batch: bool = is_batch,
            store: LRUPromptCache = store,
            counted: list[int] = counted,
            generator: BatchGenerator = generator,
        ) -> list[int]:
            cache, rest = store.fetch_nearest_cache("key", prompt)
            cache = cache or mlx_lm_cache.make_prompt_cache(model)
            counted.append(len(prompt) - len(rest))
            if not is_batch:
                tokens = [
                    t for t, _ in generate_step(mx.array(rest), model, prompt_cache=cache, max_tokens=9)
                ]
                store.insert_cache("key", prompt + tokens, cache)
                return tokens
            generator.insert([rest], [9], caches=[cache], all_tokens=[prompt[: counted[-1]]])
            tokens = []
            while responses := generator.next_generated():
                tokens += [response.token for response in responses]
                for response in responses:
                    if response.finish_reason:
                        store.insert_cache("key", response.all_tokens, response.prompt_cache)
            return tokens

        prompt = TEXT[:40]
        for turn in range(4):
            prompt = [*prompt, *reply(prompt)[:-1], *OTHER[turn : turn + 12]]
        for other in (TEXT[:40], TEXT[:40], TEXT[:30] + OTHER[:9]):
            reply(other)
        counts.append(counted)
        assert len(store) <= 7
    assert counts[0] == counts[1]
    assert counts[0][1:4] > [30, 50, 70]


def test_shorter_prefixes_of_hybrids_go_where_the_longer_cache_serves_them() -> None:
    model = model_of("qwen3_next")
    with attach(model):
        store = LRUPromptCache()
        cache = filled(model, TEXT[:20], 20)
        store.insert_cache("key", TEXT[:20], copy.deepcopy(cache))
        logits_of(model, cache, TEXT[20:40], 20)
        store.insert_cache("key", TEXT[:40], cache)
        assert len(store) == 1
        assert_serves(model, store, TEXT[:20] + OTHER[:5], least=20)


def test_a_model_that_is_gone_or_loaded_again_is_a_miss() -> None:
    model, store = tiny_llama(), LRUPromptCache()
    kept = tiny_llama()
    with attach(model), attach(kept):
        store.insert_cache("one", TEXT[:20], filled(model, TEXT[:20]))
        store.insert_cache("two", TEXT[:20], filled(kept, TEXT[:20]))
    del model
    with attach(kept):
        assert store.fetch_nearest_cache("one", TEXT[:30]) == (None, TEXT[:30])
        assert len(store) == 1
        assert store.fetch_nearest_cache("two", TEXT[:30])[1] == TEXT[20:30]
        reuse.note_models(store, [tiny_llama()])
        assert store.fetch_nearest_cache("two", TEXT[:30]) == (None, TEXT[:30])
        assert len(store) == store.nbytes == 0


@pytest.mark.parametrize("seed", range(4))
def test_the_index_is_mlx_lms_trie(seed: int) -> None:
    """Random puts, takes and searches over few tokens."""
    rng, index, trie = random.Random(seed), reuse.Index(), mlx_lm_cache.PromptTrie()
    stored: set[tuple[int, ...]] = set()
    for step in range(300):
        tokens = rng.choices(range(3), k=rng.randrange(1, 7))
        what = rng.random()
        if what < 0.3:
            assert index.add("m", tokens, step) == trie.add("m", tokens, step)
            stored.add(tuple(tokens))
        elif what < 0.4 and stored:
            chosen = list(rng.choice(sorted(stored)))
            assert index.get("m", chosen) == trie.get("m", chosen)
            assert index.pop("m", chosen) == trie.pop("m", chosen)
            stored.remove(tuple(chosen))
        elif what < 0.5 and tuple(tokens) in stored:
            assert sorted(index.pop_prefixes("m", tokens)) == sorted(trie.pop_prefixes("m", tokens))
            stored -= {tuple(tokens[:n]) for n in range(len(tokens))}
            trie = rebuilt(trie, stored)
        elif stored:
            ours, theirs = index.search("m", tokens), trie.search("m", tokens)
            assert (ours.exact, ours.shorter, ours.common_prefix) == (
                theirs.exact,
                theirs.shorter,
                theirs.common_prefix,
            )
            assert len(ours.longer or []) == len(theirs.longer or [])


def rebuilt(trie: Any, stored: set[tuple[int, ...]]) -> Any:
    """The same without the empty paths that mlx-lm's `pop_prefixes` leaves."""
    new = mlx_lm_cache.PromptTrie()
    for tokens in stored:
        new.add("m", list(tokens), trie.get("m", list(tokens)))
    return new


def test_stores_of_caches_that_are_not_ours_stay_as_they_are() -> None:
    """Prompts of one token and of none, exact ones among them."""
    model, attached = tiny_llama(), tiny_llama()
    found = []
    for is_attached in (False, True):
        with attach(attached) if is_attached else contextlib.nullcontext():
            store = LRUPromptCache()
            for tokens in ([], TEXT[:1], TEXT[:5], TEXT[:9]):
                own = [mlx_lm_cache.KVCache() for _ in model.layers]
                if tokens:
                    logits_of(model, own, tokens)
                store.insert_cache("key", tokens, own)
            asked = (list[int](), TEXT[:1], TEXT[:2], TEXT[:5], TEXT[:7], TEXT[:12], OTHER[:4])
            fetched = [store.fetch_nearest_cache("key", tokens) for tokens in asked]
            found.append([(cache and cache[0].offset, rest) for cache, rest in fetched])
    assert found[0] == found[1]


def test_the_third_prompt_that_begins_alike_resumes_where_they_part() -> None:
    """Recurrent layers have no state inside a block, until a lookup has marked where prompts branch off."""
    model, prefix = model_of("qwen3_next"), TEXT[:60]
    with attach(model, rewind=4):
        store = LRUPromptCache()
        for number, reused in enumerate((0, 0, 60, 60)):
            tokens = prefix + OTHER[number : number + 10]
            cache, rest = store.fetch_nearest_cache("key", tokens)
            assert len(tokens) - len(rest) == reused
            cache = cache or mlx_lm_cache.make_prompt_cache(model)
            expected = logits_of(model, unattached(model), tokens, 1)[-1:]
            assert difference(logits_of(model, cache, rest)[-1:], expected) <= 1e-4
            store.insert_cache("key", tokens, cache)

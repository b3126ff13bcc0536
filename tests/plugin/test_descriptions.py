"""`repr` of what users hold: short, and without addresses."""

from __future__ import annotations

from mlx_kvcache.plugin import Many, make_prompt_cache, make_session_pool
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.test_prompt_cache import TEXT
from tests.plugin.tiny import tiny_llama

MODEL = tiny_llama()


def test_short_descriptions() -> None:
    cache = make_prompt_cache(MODEL)
    logits_of(MODEL, cache, TEXT[:20])
    assert repr(cache) == f"PromptCache(20 tokens, capacity=None, {cache.nbytes / 1e3:.1f} kB, llama)"
    assert repr(cache[:2]) == "[KVCache(layer 0, 20 tokens), KVCache(layer 1, 20 tokens)]"
    assert repr(cache[0].merge([cache[0], cache[0]])) == "KVCache(layer 0, rows of 20, 20 tokens)"
    nested = make_prompt_cache(build("deepseek_v32"), capacity=8)
    assert repr(nested).startswith("PromptCache(0 tokens, capacity=8, 0 B, deepseek")
    assert repr(nested[0]) == "CacheList(KVCache(layer 0[0], 0 tokens), KVCache(layer 0[1], 0 tokens))"
    assert repr(make_prompt_cache(build("mamba"))[0]) == "ArraysCache(layer 0, 0 tokens)"
    first, _ = cache[:2]
    cache.close()
    assert repr(cache) == "PromptCache(closed, llama)"
    assert repr(first) == "KVCache(layer 0, closed)"
    many = Many(MODEL)
    many.add([1, 2])
    assert repr(many) == "Many(1 sequence, tokens_per_step=128, llama)"
    with make_session_pool(MODEL) as pool:
        session = pool.open(TEXT[:5])
        assert repr(session) == "Session(5 tokens, 0 reused, 5 to compute)"
        logits_of(MODEL, session.cache, session.rest)
        session.close()
        assert repr(session) == "Session(closed)"
        assert repr(pool) == f"SessionPool(1 stored, {pool.nbytes / 1e3:.1f} kB)"

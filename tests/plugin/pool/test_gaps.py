"""Caches that tokens have been taken out of: they are not those of the tokens that are left."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import LRUPromptCache

from mlx_kvcache.cells.table import CellTable
from mlx_kvcache.plugin import attach, make_prompt_cache
from mlx_kvcache.sessions import SessionPool
from tests.interrupts import Planted
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of, plain
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(200)]
MODEL = tiny_llama()
SHIFTS: dict[str, Any] = {"capacity": 32, "overflow": "shift", "sinks": 4}


def test_gaps_are_counted_and_forked() -> None:
    cache = make_prompt_cache(MODEL, **SHIFTS)
    logits_of(MODEL, cache, TEXT[:30], 5)
    cache.rewind(2)
    cache.remove(20)
    assert cache.gaps == 0
    cache.remove(5, 10)
    assert (cache.gaps, cache.fork().gaps) == (1, 1)
    logits_of(MODEL, cache, TEXT[:20], 5)
    assert cache.gaps == 2


@pytest.mark.parametrize("model", [MODEL, build("ministral3")], ids=["head", "tail"])
def test_a_removal_that_fails_leaves_no_gap(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it would rotate what is before it or what is after it."""
    cache = make_prompt_cache(model)
    logits_of(model, cache, TEXT[:30])

    def fails(*given: Any) -> None:
        raise Planted

    with monkeypatch.context() as patched:
        patched.setattr(CellTable, "assign", fails)
        with pytest.raises(Planted):
            cache.remove(5, 10)
    assert (cache.gaps, cache.position) == (0, 30)
    cache.remove(5, 10)
    assert (cache.gaps, cache.position) == (1, 25)


def test_a_session_whose_cache_has_shifted_is_not_stored() -> None:
    pool = SessionPool(lambda: make_prompt_cache(MODEL, **SHIFTS))
    with pool.open(TEXT[:50]) as session:
        logits_of(MODEL, session.cache, session.rest, 8)
    assert len(pool) == 0
    assert pool.counts.rejected == {"tokens have been taken out": 1}
    with pool.open(TEXT[:30]) as session:
        assert session.reused == 0
        ours = logits_of(MODEL, session.cache, session.rest, 8)[-1:]
    assert difference(ours, logits_of(MODEL, plain(MODEL), TEXT[:30])[-1:]) <= 1e-4
    assert pool.open(TEXT[:30]).reused == 29


@pytest.mark.parametrize("salt", [None, "mine"])
def test_a_session_that_has_shifted_serves_nobody_else(salt: str | None) -> None:
    pool = SessionPool(lambda: make_prompt_cache(MODEL, capacity=32))
    with pool.open(TEXT[:20]) as session:
        logits_of(MODEL, session.cache, session.rest, 8)
    with pool.open(TEXT[:32]) as session:
        logits_of(MODEL, session.cache, session.rest, 8)
        session.shift(4, 1, salt)
        assert (len(session.tokens), session.reused, session.cache.position) == (18, 6, 18)
        left, own = [*session.tokens, 5], session.salt
    assert pool.open(left).reused == 4
    assert pool.open(left, own).reused == 18
    assert salt is None or own == salt


def test_mlx_lms_store_does_not_keep_what_has_shifted() -> None:
    store = LRUPromptCache()
    with attach(MODEL, **SHIFTS):
        for n, is_kept in ((50, False), (30, True)):
            cache = mlx_lm_cache.make_prompt_cache(MODEL)
            logits_of(MODEL, cache, TEXT[:n], 8)
            store.insert_cache("key", TEXT[:n], cache)
            assert (len(store) > 0) == is_kept
        found, rest = store.fetch_nearest_cache("key", TEXT[:60])
        assert found is not None
        assert (found[0].offset, rest) == (30, TEXT[30:60])


def test_mlx_lms_store_where_the_last_token_was_never_fed() -> None:
    """The cache holds one token less than it is stored under."""
    store = LRUPromptCache()
    with attach(MODEL):
        cache = mlx_lm_cache.make_prompt_cache(MODEL)
        logits_of(MODEL, cache, TEXT[:19])
        store.insert_cache("key", TEXT[:20], cache)
        for tokens, held in ((TEXT[:40], 19), (TEXT[:10], 9)):
            found, rest = store.fetch_nearest_cache("key", tokens)
            assert found is not None
            assert (found[0].offset, rest) == (held, tokens[held:])

"""Sessions on real models: what is reused, kept, given up and shifted."""

from __future__ import annotations

import random
import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError, NotSupportedError
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.sessions import SessionPool
from mlx_kvcache.sessions.session import Session
from tests.plugin.running import difference, logits_of, model_of
from tests.plugin.tiny import tiny_gpt2, tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(200)]
MODEL = tiny_llama()


def pool_of(model: nn.Module = MODEL, capacity: int | None = None, **bounds: Any) -> SessionPool:
    return SessionPool(lambda: make_prompt_cache(model, capacity=capacity, rewind=8), **bounds)


def computed(model: nn.Module, session: Session) -> mx.array:
    """Logits after the session's tokens, of which only `rest` is computed."""
    return logits_of(model, session.cache, session.rest)[-1:]


def afresh(model: nn.Module, tokens: list[int]) -> mx.array:
    return logits_of(model, make_theirs(model), list(tokens), 1)[-1:]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "llama4", "qwen3_next"])
@pytest.mark.parametrize("seed", range(2))
def test_conversations_that_share_beginnings(name: str, seed: int) -> None:
    """Random prompts over few tokens: whatever is reused, the answer is that of a fresh computation."""
    model, rng = model_of(name), random.Random(seed)
    pool = pool_of(model, max_stored=5)
    known: list[list[int]] = [TEXT[:12]]
    for _ in range(25):
        base = rng.choice(known)
        tokens = base[: rng.randrange(1, len(base) + 1)] + rng.choices(range(90), k=rng.randrange(5))
        with pool.open(tokens) as session:
            assert session.rest
            assert session.reused + len(session.rest) == len(tokens)
            assert difference(computed(model, session), afresh(model, tokens)) <= 2e-4
        known = [*known[-6:], tokens]
        assert len(pool) <= 5
    assert pool.counts.hits + pool.counts.misses == 25
    assert pool.counts.reused > 0


def test_a_repeated_turn_computes_only_what_is_new() -> None:
    pool = pool_of()
    with pool.open(TEXT[:30]) as first:
        computed(MODEL, first)
        logits_of(MODEL, first.cache, TEXT[30:33])
        first.extend(TEXT[30:33])
    second = pool.open(TEXT[:40])
    assert (second.reused, second.rest) == (33, TEXT[33:40])
    third = pool.open(TEXT[:33])
    assert third.rest == TEXT[32:33]
    other = pool.open(TEXT[:20] + TEXT[50:60])
    assert other.reused == 20
    assert (pool.counts.hits, pool.counts.misses, pool.counts.reused) == (3, 1, 33 + 32 + 20)


def test_a_salt_keeps_apart() -> None:
    pool = pool_of()
    with pool.open(TEXT[:30], salt="one tenant") as session:
        computed(MODEL, session)
    assert pool.open(TEXT[:30], salt="another").reused == 0
    assert pool.open(TEXT[:30]).reused == 0
    assert pool.open(TEXT[:30], salt="one tenant").reused == 29


def filled(pool: SessionPool, tokens: list[int], is_pinned: bool = False) -> None:
    session = pool.open(tokens)
    computed(MODEL, session)
    session.close(is_pinned)


def test_the_least_recently_used_goes_and_what_is_pinned_stays() -> None:
    pool = pool_of(max_stored=3)
    filled(pool, [1] * 10, is_pinned=True)
    for start in (2, 3):
        filled(pool, [start] * 10)
    pool.open([2] * 12).cache.close()
    filled(pool, [4] * 10)
    reused = {start: pool.open([start] * 11).reused for start in (1, 2, 3, 4)}
    assert reused == {1: 10, 2: 10, 3: 0, 4: 10}
    assert pool.counts.evicted == 1


def test_bytes_are_bounded_and_given_back() -> None:
    one = make_prompt_cache(MODEL)
    logits_of(MODEL, one, TEXT[:64])
    size = one.pool.nbytes
    one.close()
    pool = pool_of(max_bytes=3 * size)
    for start in range(8):
        filled(pool, [start, *TEXT[:63]])
        assert pool.nbytes <= 3 * size
    assert pool.counts.evicted >= 5
    pool.clear()
    assert (len(pool), pool.nbytes) == (0, 0)


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    pool = pool_of(max_bytes=100)
    filled(pool, TEXT[:40])
    assert len(pool) == 0
    assert pool.counts.rejected["larger than the budget"] == 1
    assert pool.nbytes == 0


def test_a_longer_conversation_takes_the_place_of_its_beginning() -> None:
    pool = pool_of()
    filled(pool, TEXT[:20])
    filled(pool, TEXT[:40])
    assert len(pool) == 1
    filled(pool, TEXT[:10], is_pinned=True)
    filled(pool, TEXT[:60])
    assert len(pool) == 2
    filled(pool, TEXT[:60])
    assert len(pool) == 2


def test_shifting_keeps_the_first_tokens() -> None:
    pool = pool_of(capacity=32)
    session = pool.open(TEXT[:30])
    computed(MODEL, session)
    assert session.shift(keep=4, room=2) == []
    assert session.tokens == TEXT[:30]
    assert session.shift(keep=4, room=8) == []
    assert session.tokens == TEXT[:4] + TEXT[17:30]
    assert session.cache.position == 17
    session.close()
    assert len(pool) == 1


def test_what_is_left_after_a_removal_is_kept_apart() -> None:
    pool = pool_of()
    with pool.open(TEXT[:40]) as session:
        computed(MODEL, session)
    with pool.open(TEXT[:50]) as session:
        session.remove(10, 30, salt="cut")
        left = TEXT[:10] + TEXT[30:50]
        assert (session.tokens, session.reused, session.rest) == (left, 20, TEXT[40:50])
        assert difference(computed(MODEL, session), afresh(MODEL, left)) > 0
    assert pool.open([*left, 1], salt="cut").reused == 30
    assert pool.open([*left, 1]).reused == 10


def test_a_removal_that_cannot_be_changes_nothing() -> None:
    gpt2 = tiny_gpt2()
    for model, begin, end, error in (
        (MODEL, 10, 41, ValueError),
        (MODEL, 10, 9, ValueError),
        (MODEL, -1, 9, ValueError),
        (gpt2, 10, 30, NotSupportedError),
    ):
        pool = pool_of(model)
        with pool.open(TEXT[:40]) as session:
            computed(model, session)
            before = session.tokens[:]
            with pytest.raises(error, match="40"):
                session.remove(begin, end, salt="cut")
            assert (session.tokens, session.salt, session.cache.position) == (before, None, 40)


def test_where_tokens_cannot_be_moved_they_are_given_back() -> None:
    """Learned positions: what stays behind the gap is to be computed again."""
    model = tiny_gpt2()
    session = pool_of(model, capacity=32).open(TEXT[:30])
    computed(model, session)
    again = session.shift(keep=4, room=8)
    assert again == TEXT[17:30]
    assert session.tokens == TEXT[:4]
    session.extend(again)
    ours = logits_of(model, session.cache, again)[-1:]
    assert difference(ours, afresh(model, TEXT[:4] + TEXT[17:30])) <= 1e-4


def test_bad_input() -> None:
    pool = pool_of(capacity=32)
    with pytest.raises(ValueError, match="at least 1 token"):
        pool.open([])
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, got -1"):
        pool_of(max_bytes=-1)
    session = pool.open(TEXT[:5])
    with pytest.raises(CacheError, match="only 0 of 5 tokens"):
        session.shift()
    with pytest.raises(ValueError, match="keep=30 and room=8"):
        session.shift(keep=30, room=8)
    with pytest.raises(ValueError, match="3 tokens for a cache that holds 0"):
        pool.store(TEXT[:3], session.cache)
    session.close()
    session.close()
    assert pool.counts.rejected["empty"] == 1
    assert len(pool) == 0


def test_several_threads_on_one_pool() -> None:
    """Four workers with a shared beginning; each answer is that of a fresh computation."""
    pool, errors = pool_of(), []
    filled(pool, TEXT[:30], is_pinned=True)
    expected = {w: afresh(MODEL, TEXT[:30] + [w] * 9) for w in range(4)}
    mx.eval(list(expected.values()))

    def work(worker: int) -> None:
        try:
            for _ in range(5):
                with pool.open(TEXT[:30] + [worker] * 9) as session:
                    # Arrays that threads share must not be evaluated by two at once.
                    with session.cache.pool.lock:
                        found = computed(MODEL, session)
                    if difference(found, expected[worker]) > 2e-4:
                        errors.append((worker, "differs"))
        except Exception as error:  # noqa: BLE001  # reported by the main thread
            errors.append((worker, repr(error)))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pool.counts.hits == 20


def test_a_long_life_leaves_few_runs() -> None:
    """Forks of forks, trimmed and refilled: whoever is left alone soon lies in one piece."""
    rng = random.Random(1)
    first = make_prompt_cache(MODEL)
    logits_of(MODEL, first, TEXT[:100])
    branches, tokens = [first], {id(first): TEXT[:100]}
    for _ in range(150):
        origin = rng.choice(branches)
        branch = origin.fork()
        keep = max(1, branch.position - rng.randrange(40))
        branch.rewind_to(keep)
        more = rng.choices(range(90), k=rng.randrange(1, 50))
        logits_of(MODEL, branch, more)
        tokens[id(branch)] = tokens[id(origin)][:keep] + more
        branches = [*branches[-4:], branch]
    last = branches[-1]
    text = tokens[id(last)]
    del branches, branch, origin, first
    more = [step % 90 for step in range(260)]
    logits_of(MODEL, last, more, 1)
    [(_, positional)] = last.pool.positional()
    assert len(positional._table[last._conversation.sequence].spans) == 1
    expected = afresh(MODEL, text + more + [5])
    assert difference(logits_of(MODEL, last, [5]), expected) <= 2e-4


def test_a_cache_that_is_stored_again_when_it_has_grown() -> None:
    pool, cache = pool_of(), make_prompt_cache(MODEL)
    for n in (10, 20):
        logits_of(MODEL, cache, TEXT[n - 10 : n])
        assert pool.store(TEXT[:n], cache)
    assert len(pool) == 1
    assert pool.open(TEXT[:30]).reused == 20


def test_a_stored_cache_that_somebody_closes_is_forgotten() -> None:
    pool, cache = pool_of(), make_prompt_cache(MODEL)
    logits_of(MODEL, cache, TEXT[:10])
    pool.store(TEXT[:10], cache)
    cache.close()
    assert pool.open(TEXT[:30]).reused == 0
    assert (len(pool), dict(pool.counts.rejected)) == (0, {"closed": 1})


def test_tokens_that_nobody_noted_are_dropped() -> None:
    """An application that leaves out the end token: what it told is stored."""
    for model in (MODEL, model_of("gemma3_text"), model_of("mamba2")):
        pool = pool_of(model)
        with pool.open(TEXT[:20]) as session:
            computed(model, session)
            session.extend(TEXT[20:21])
            logits_of(model, session.cache, TEXT[20:22], 1)
        assert len(pool) == 1
        with pool.open(TEXT[:21] + TEXT[50:60]) as session:
            assert session.reused >= 20
            assert difference(computed(model, session), afresh(model, session.tokens)) <= 1e-4


def test_the_pools_lock_may_be_held_while_a_session_is_closed() -> None:
    """One thread opens a session, another holds the lock of the caches and closes one."""
    inside, waits = threading.Event(), False

    def make() -> Any:
        if waits:
            inside.set()
            with lock:
                pass
        return make_prompt_cache(MODEL)

    pool = SessionPool(make)
    first = pool.open(TEXT[:5])
    computed(MODEL, first)
    lock, waits = first.cache.pool.lock, True
    opening = threading.Thread(target=lambda: pool.open(TEXT[50:60]).close(), daemon=True)

    def close() -> None:
        with lock:
            opening.start()
            inside.wait()
            first.close()

    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    for thread in (closing, opening):
        thread.join(60)
        assert not thread.is_alive(), "each waits for a lock that the other holds"


def test_the_third_prompt_that_begins_alike_resumes_where_they_part() -> None:
    """Recurrent layers have no state inside a block, until a session has marked where prompts branch off."""
    model = model_of("qwen3_next")
    pool = pool_of(model)
    for number, reused in enumerate((0, 0, 60, 60)):
        tokens = TEXT[:60] + TEXT[100 + number : 120]
        with pool.open(tokens) as session:
            assert session.reused == reused
            assert difference(computed(model, session), afresh(model, tokens)) <= 2e-4


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "rwkv7"])
def test_an_edit_of_the_newest_message_computes_only_what_is_new(name: str) -> None:
    """Two turns with long replies; then the second message is another one."""
    model = model_of(name)
    pool = pool_of(model)
    with pool.open(TEXT[:20]) as session:
        computed(model, session)
        logits_of(model, session.cache, TEXT[20:97], 1)
        session.extend(TEXT[20:97])
    with pool.open(TEXT[:110]) as session:
        assert session.reused == 97
        computed(model, session)
        logits_of(model, session.cache, TEXT[110:190], 1)
        session.extend(TEXT[110:190])
    edited = TEXT[:97] + TEXT[3:30]
    with pool.open(edited) as session:
        assert session.reused == 97
        assert difference(computed(model, session), afresh(model, edited)) <= 2e-4

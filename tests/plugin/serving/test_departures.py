"""Why a prompt could not reuse more: the departure of a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Many, make_prompt_cache, make_session_pool
from mlx_kvcache.sessions import Departure, SessionPool
from mlx_kvcache.sessions.session import Session
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(200)]
OTHER = [(7 * i + i * i) % 90 for i in range(1, 201)]
MODEL = tiny_llama()


class Letters:
    """A tokenizer of 90 letters."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(40 + token) for token in tokens)


def pool_of(model: Any = MODEL, **options: Any) -> SessionPool:
    return SessionPool(lambda: make_prompt_cache(model, rewind=8), tokenizer=Letters(), **options)


def stored(pool: SessionPool, tokens: list[int], salt: Any = None) -> Session:
    with pool.open(tokens, salt) as session:
        logits_of(session.cache.pool.model, session.cache, session.rest)
    return session


def departed(session: Session) -> Departure:
    assert session.departure
    return session.departure


def test_a_full_hit_has_no_departure() -> None:
    pool = pool_of()
    assert departed(stored(pool, TEXT[:100])).reason == "first prompt"
    assert str(pool.open(OTHER[:100], "salt", store=False).departure) == "no conversation is stored"
    for tokens in (TEXT[:100], TEXT[:60], TEXT[:140]):
        assert pool.open(tokens).departure is None
    assert pool.counts.departures == {"first prompt": 2}


def test_a_departure_shows_both_sides_as_text() -> None:
    pool = pool_of()
    stored(pool, TEXT[:100])
    found = departed(pool.open(TEXT[:40] + OTHER[:80]))
    before, theirs, ours = (tuple(tokens) for tokens in (TEXT[32:40], TEXT[40:48], OTHER[:8]))
    assert found == Departure("departs", 40, 40, 60, before, theirs, ours)
    assert str(found) == (
        f"the prompt departs from the closest stored conversation at token 40: "
        f"it has {Letters().decode(OTHER[:8])!r} instead of {Letters().decode(TEXT[40:48])!r} "
        f"after {Letters().decode(TEXT[32:40])!r}; 60 more tokens would have been reused"
    )
    assert str(departed(pool.open([89, *TEXT]))).startswith(
        "no stored conversation begins as the prompt does"
    )


def test_a_window_cannot_go_back() -> None:
    pool = pool_of(build("gemma3_text"))
    stored(pool, TEXT[:120])
    found = departed(pool.open(TEXT[:90] + OTHER[:40]))
    assert (found.reason, found.position) == ("cannot go back", 90)
    assert found.reused < 90 < found.reused + found.lost
    assert f"the cache can go back only to token {found.reused};" in str(found)
    whole = departed(pool.open(TEXT[:80]))
    assert (whole.reason, whole.position, whole.prompt) == ("cannot go back", 80, ())
    assert "the whole prompt is in the closest stored conversation" in str(whole)


def test_what_was_evicted_is_told_apart() -> None:
    pool = pool_of(max_stored=1)
    stored(pool, TEXT[:100])
    stored(pool, OTHER[:50])
    found = departed(pool.open(TEXT[:120]))
    assert (found.reason, found.position, found.lost) == ("evicted", 100, 100)
    assert "shares 100 tokens with an evicted conversation, which ends there" in str(found)
    pool.clear()
    assert departed(pool.open(TEXT[:120])).reason == "first prompt"


def test_a_conversation_with_another_salt_is_named_but_not_shown() -> None:
    pool = pool_of()
    stored(pool, TEXT[:100], "one")
    stored(pool, OTHER[:50], "two")
    found = departed(pool.open(TEXT[:60] + OTHER[:40], "two"))
    assert (found.reason, found.position, found.stored) == ("other salt", 60, ())
    assert str(found) == "60 leading tokens of the prompt are stored with another salt only"


def test_a_branch_may_be_thrown_away() -> None:
    pool = pool_of()
    stored(pool, TEXT[:50])
    with pool.open(TEXT[:80], store=False) as branch:
        logits_of(MODEL, branch.cache, branch.rest)
    with pytest.raises(CacheError):
        branch.cache.position  # noqa: B018
    assert (len(pool), pool.open(TEXT[:80]).reused) == (1, 50)
    with pool.open(TEXT[:80], store=False) as branch:
        logits_of(MODEL, branch.cache, branch.rest)
        branch.store = True
    assert pool.open(TEXT[:90]).reused == 80


def test_what_was_read_before_cancel_serves_the_next_try() -> None:
    """Many reads prompts in blocks; those of a cancelled sequence stay, and the others go on."""
    pool = make_session_pool(MODEL)
    many = Many(MODEL, tokens_per_step=16)
    session = pool.open(TEXT[:100])
    ticket = many.add(session.rest, cache=session.cache)
    other = many.add(OTHER[:4], max_tokens=30)
    for _ in range(3):
        many.step()
    many.cancel(ticket)
    session.close()
    again = pool.open(TEXT[:100])
    assert (again.reused, again.departure) == (3 * 16, None)
    assert [one.ticket for one in many.step()] == [ticket, other]
    logits = logits_of(MODEL, again.cache, again.rest)[-1]
    assert mx.allclose(logits, logits_of(MODEL, make_prompt_cache(MODEL), TEXT[:100])[-1], atol=1e-4)


class Pieces(Letters):
    """Two letters of one token each, and a token for both; 9 is special and spelled like two others."""

    all_special_ids = (9,)

    def get_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, token: int) -> str:
        return {1: "a", 2: "b", 3: "ab", 9: "ab"}.get(token, chr(200 + token))

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.convert_ids_to_tokens(token) for token in tokens)


def test_a_history_takes_the_tokens_that_were_generated() -> None:
    pool = SessionPool(lambda: make_prompt_cache(MODEL), tokenizer=Pieces())
    stored(pool, [20, 21, 22, 1, 2, 1, 2, 23])
    fresh = [20, 21, 22, 3, 3, 23, 24, 25]
    assert pool.open(fresh).reused == 3
    tokens = pool.retokenize(fresh)
    assert tokens == [20, 21, 22, 1, 2, 1, 2, 23, 24, 25]
    assert (pool.open(tokens).reused, pool.open(tokens).departure) == (8, None)
    assert pool.retokenize([20, 21, 22, 3, 9, 23]) == [20, 21, 22, 1, 2, 9, 23]
    assert pool.retokenize([20, 21, 22, 3, 30]) == [20, 21, 22, 1, 2, 30]
    assert pool.retokenize(fresh, salt="another") == fresh
    with pytest.raises(ValueError, match=r"retokenize needs a tokenizer .* the pool has .*Letters"):
        pool_of().retokenize(fresh)


def test_a_history_takes_tokens_from_the_folder(tmp_path: Path) -> None:
    generated, fresh = [20, 21, 22, 1, 2, 1, 2, 23], [20, 21, 22, 3, 3, 23, 24, 25]
    with make_session_pool(MODEL, folder=tmp_path, tokenizer=Pieces()) as pool:
        stored(pool, generated)
    with make_session_pool(MODEL, folder=tmp_path, tokenizer=Pieces()) as pool:
        tokens = pool.retokenize(fresh)
        assert tokens == [*generated, 24, 25] and pool.retokenize(fresh, salt="another") == fresh
        assert pool.open(tokens, store=False).reused == 8
    # A file that has less of the text than memory does not win.
    with make_session_pool(MODEL, folder=tmp_path / "less", tokenizer=Pieces()) as pool:
        stored(pool, generated[:5])
        pool.flush()
        pool.clear()
        stored(pool, fresh[:6])
        assert pool.retokenize([*generated, 24]) == [*fresh[:6], 24]

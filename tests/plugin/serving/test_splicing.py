"""Prompts that change before their end, in session pools and in mlx-lm's server.

The models have one layer, through which a splice is exact, so replies equal those of fresh computations.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlx_kvcache.plugin import make_session_pool
from mlx_kvcache.sessions import Session, SessionPool
from tests.folders import written
from tests.plugin.running import difference, logits_of
from tests.plugin.serving.clients import Client, served
from tests.plugin.test_splice import ONE_LAYER, drawn, fresh
from tests.plugin.tiny import tiny_gpt2

TEXT = drawn(Random(1), 300)
CHANGED = [*TEXT[:5], 1, 2, 3, *TEXT[9:150], *TEXT[170:290]]


def computed(session: Session) -> Session:
    """The session with its rest computed, whose last logits are those of a fresh computation."""
    logits = logits_of(ONE_LAYER, session.cache, session.rest, 7)[-1]
    assert difference(logits, fresh(ONE_LAYER, session.tokens)) <= 2e-5
    assert session.cache.position == len(session.tokens)
    return session


def opened(pool: SessionPool, tokens: list[int], **options: Any) -> int:
    with pool.open(tokens, **options) as session:
        computed(session)
        return session.reused


def test_a_pool_splices_on_request() -> None:
    pool = make_session_pool(ONE_LAYER)
    opened(pool, TEXT)
    assert opened(pool, CHANGED, splice=64) == 5 + 141 + 119
    # What is spliced is stored apart, and is not found without the option.
    assert opened(pool, CHANGED) == 5
    assert set(pool.counts.departures) == {"first prompt", "departs"}
    assert opened(pool, [*CHANGED, 7], splice=64) == len(CHANGED)
    assert pool.counts.spliced == 1
    with pool.open([*CHANGED[:40], *CHANGED[60:]], splice=64, recompute=0.5) as session:
        assert session.reused == 40 + (len(CHANGED) - 60) // 2 - 1
        computed(session)


def test_salts_are_kept_apart() -> None:
    pool = make_session_pool(ONE_LAYER)
    opened(pool, TEXT, salt="a")
    assert opened(pool, CHANGED, salt="b", splice=64) == 0
    assert opened(pool, CHANGED, salt="a", splice=64) > 200


def test_a_small_saving_is_not_worth_it() -> None:
    pool = make_session_pool(ONE_LAYER)
    opened(pool, TEXT)
    assert opened(pool, [*TEXT[:200], 1, *TEXT[201:260]], splice=64) == 200


def test_tokens_that_cannot_move_are_a_miss_with_a_reason() -> None:
    model = tiny_gpt2()
    pool = make_session_pool(model)
    text = [token % 64 for token in TEXT[:60]]
    with pool.open(text) as session:
        logits_of(model, session.cache, session.rest)
    with pool.open([*text[:10], *text[20:]], splice=16) as session:
        assert session.reused == 10
    assert pool.counts.rejected["tokens cannot be moved"] == 1


def test_a_session_that_is_left_in_the_middle_of_a_splice() -> None:
    pool = make_session_pool(ONE_LAYER)
    opened(pool, TEXT)
    with pool.open(CHANGED, splice=64) as session:
        logits_of(ONE_LAYER, session.cache, session.rest[:2])
    # Its two tokens are stored, and nothing joins them when others follow.
    follow = [*CHANGED[:7], *drawn(Random(2), 20)]
    with pool.open(follow, splice=1) as session:
        computed(session)


def test_splices_on_disk_are_apart_too(tmp_path: Path) -> None:
    with make_session_pool(ONE_LAYER, folder=tmp_path) as pool:
        opened(pool, TEXT)
        opened(pool, CHANGED, splice=64)
    with make_session_pool(ONE_LAYER, folder=tmp_path) as pool:
        assert opened(pool, CHANGED) == 5
        assert opened(pool, [*CHANGED, 8], splice=64) == len(CHANGED)


@pytest.mark.parametrize(
    ("options", "error"), [({"splice": -1}, "splice"), ({"recompute": 2.0}, "recompute")]
)
def test_options_out_of_range(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make_session_pool(ONE_LAYER).open(TEXT, **options)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return written(tmp_path_factory.mktemp("models") / "one", tokenizer, layers=1)


WORDS = [f"word {i}" for i in range(60)]
PROMPTS = [
    " ".join(["On Monday:", *WORDS]),
    " ".join(["On the next Tuesday:", *WORDS[:20], *WORDS[25:], "and more"]),
    " ".join(["Never:", *WORDS[:10], "something else", *WORDS[20:50], "the end"]),
]


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "alone"])
def test_a_server_keeps_what_moved(one_layer: Path, more: dict[str, object]) -> None:
    with served(one_layer, is_attached=False) as client:
        expected = [client.complete(prompt, **more).text for prompt in PROMPTS]
    with served(one_layer, cache_reuse=16) as client:
        answers = [client.complete(prompt, **more) for prompt in PROMPTS]
        assert [answer.text for answer in answers] == expected
        shares = [_cached(answer.body["usage"]) for answer in answers]
        assert shares[0] == 0 and min(shares[1:]) > 0.6
        # What was spliced is found again with the tokens of its prompt and reply.
        again = client.complete(PROMPTS[2] + answers[2].text, **more)
        assert _cached(again.body["usage"]) > 0.9
    with served(one_layer) as client:
        plain = [client.complete(prompt, **more) for prompt in PROMPTS]
        assert max(_cached(answer.body["usage"]) for answer in plain) < 0.1


def _cached(usage: dict[str, Any]) -> float:
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return cached / int(usage["prompt_tokens"])


def test_many_clients_at_once(one_layer: Path) -> None:
    prompts = [f"{i} {PROMPTS[i % 3]}" for i in range(6)]

    def ask(client: Client, prompt: str) -> str:
        return client.complete(prompt).text

    with served(one_layer, is_attached=False) as client:
        expected = [ask(client, prompt) for prompt in prompts]
    with (
        served(one_layer, "--prefill-step-size", 16, cache_reuse=16) as client,
        ThreadPoolExecutor(6) as pool,
    ):
        for prompt in PROMPTS:
            ask(client, prompt)
        assert list(pool.map(lambda prompt: ask(client, prompt), prompts)) == expected

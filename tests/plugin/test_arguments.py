"""Arguments that are wrong: a typed error that says what is valid, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from mlx_kvcache.plugin import (
    Many,
    PromptCache,
    attach,
    generate_many,
    holdings,
    make_prompt_cache,
    make_session_pool,
)
from mlx_kvcache.plugin.attach import attach_all
from mlx_kvcache.sessions import SessionPool
from tests.plugin.configurations import build
from tests.plugin.running import logits_of, plain
from tests.plugin.test_prompt_cache import TEXT
from tests.plugin.test_prompt_cache import assert_goes_on as goes_on
from tests.plugin.tiny import tiny_llama

MODEL = tiny_llama()
assert_goes_on = partial(goes_on, model=MODEL)


@pytest.fixture
def cache() -> PromptCache:
    return make_prompt_cache(MODEL)


def test_options_that_would_do_nothing() -> None:
    """A bound that is missing is told, not guessed."""
    for options, message in (
        ({"overflow": "shift"}, r'overflow="shift" needs a capacity'),
        ({"sinks": 4}, r'sinks=4 .* overflow="shift"'),
        ({"capacity": 8, "sinks": 4}, r'sinks=4 .* overflow="shift"'),
    ):
        with pytest.raises(ValueError, match=message):
            make_prompt_cache(MODEL, **options)


def test_options_that_are_misspelled(tmp_path: Path, cache: PromptCache) -> None:
    """The nearest one comes first; names of mlx-lm's options are known."""
    cache.save(tmp_path / "a")
    calls: dict[str, Callable[..., object]] = {
        "make_prompt_cache": partial(make_prompt_cache, MODEL),
        "PromptCache.load": partial(PromptCache.load, tmp_path / "a", MODEL),
        "attach": partial(attach, MODEL),
        "attach_all": attach_all,
        "Many": partial(Many, MODEL),
        "generate_many": partial(generate_many, MODEL, []),
        "make_session_pool": partial(make_session_pool, MODEL),
    }
    for name, call in calls.items():
        with pytest.raises(
            TypeError, match=rf"^{name} has no option kvbits; did you mean kv_bits\?.*capacity"
        ):
            call(kvbits=4)
        with pytest.raises(TypeError, match="did you mean quantize_after"):
            call(quantized_kv_start=4)
        with pytest.raises(TypeError, match='use capacity=64, overflow="shift", sinks=4'):
            call(max_kv_size=64)
    with pytest.raises(TypeError, match="did you mean tokens_per_step"):
        Many(MODEL, token_per_step=4)
    assert mlx_lm_cache.make_prompt_cache(MODEL).__class__ is list


def test_numbers_that_are_no_numbers(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    wrong: Any = "3"
    for call, message in (
        (lambda: cache.rewind(2.5), "n must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: cache.rewind_to(wrong), "position must be a whole number, got '3'"),
        (lambda: cache.can_resume(wrong), "position must be"),
        (lambda: cache.resume_point(wrong), "position must be"),
        (lambda: cache.remove(wrong), "begin must be"),
        (lambda: cache.remove(1, wrong), "end must be"),
        (lambda: cache[0].trim(wrong), "n must be"),
        (lambda: cache[0].extract(wrong), "row must be"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert_goes_on(cache, TEXT[:20])


def test_inputs_of_other_shapes(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    for tokens, message in (
        (mx.array([1, 2, 3]), r"tokens must be an array \(batch, n\), got shape \(3,\)"),
        (mx.array(3), r"tokens must be an array \(batch, n\), got shape \(\)"),
        (mx.zeros((1, 0), mx.int32), r"got shape \(1, 0\)"),
        (mx.zeros((3, 2), mx.int32), "input has 3 rows, but the prompt cache has 1"),
        ([[1, 2]], "without tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL(tokens, cache=cache)
    assert_goes_on(cache, TEXT[:20])


def test_some_layers_of_a_cache_are_refused(cache: PromptCache) -> None:
    """The others would take the tokens in without keys for them."""
    logits_of(MODEL, cache, TEXT[:20])
    with pytest.raises(ValueError, match="1 of the 3 layers"):
        logits_of(MODEL, cache[:1], TEXT[20:23])
    assert_goes_on(cache, TEXT[:20])
    logits_of(MODEL, cache[:3], TEXT[20:23])
    assert_goes_on(cache, TEXT[:23])


def test_values_of_other_types(cache: PromptCache, tmp_path: Path) -> None:
    """What would fail somewhere inside, or do nothing without a word."""
    logits_of(MODEL, cache, TEXT[:4])
    many, make = Many(MODEL), partial(make_prompt_cache, MODEL)
    calls: dict[str, Callable[[], object]] = {
        "kv_float must be layer indices": lambda: make(kv_float=3.5),  # type: ignore[arg-type]
        "stop_tokens must be token ids, got the text": lambda: many.add([1], stop_tokens="</s>"),  # type: ignore[arg-type]
        "stop_tokens must be a sequence of token ids, got int": lambda: many.add([1], stop_tokens=5),  # type: ignore[arg-type]
        "sampler must be a function": lambda: many.add([1], sampler=0.7),  # type: ignore[arg-type]
        "prompts must be lists of tokens, got int": lambda: generate_many(MODEL, 5),  # type: ignore[arg-type]
        "tokens must be token ids, got the text": lambda: cache.save(tmp_path / "a", "abcd"),  # type: ignore[arg-type]
        "cache must be a prompt cache, got list": lambda: make_session_pool(MODEL).store([1], [1]),  # type: ignore[arg-type]
        "disk must be a DiskTier, got str": lambda: SessionPool(make, disk="a"),  # type: ignore[arg-type]
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert len(many) == 0 and not list(tmp_path.iterdir())


def test_stop_tokens_in_an_array() -> None:
    expected = [one.token for one in generate_many(MODEL, [TEXT[:5]], max_tokens=4)]
    last = list(generate_many(MODEL, [TEXT[:5]], max_tokens=4, stop_tokens=mx.array(expected[:1])))[-1]  # type: ignore[arg-type]
    assert (last.token, last.finish) == (expected[0], "stop")


def test_caches_of_others_do_not_join(cache: PromptCache) -> None:
    logits_of(MODEL, cache, TEXT[:20])
    (theirs, *_) = plain(MODEL)
    calls: tuple[Callable[[], object], ...] = (
        lambda: cache[0].extend(theirs),
        lambda: cache[0].merge([cache[0], theirs]),
        lambda: holdings(cache),  # type: ignore[arg-type]
        lambda: Many(MODEL).add([1], cache=[theirs] * 3),  # type: ignore[arg-type]
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"mlx_lm\.models\.cache\.KVCache|PromptCache\.pool|got list"):
            call()
    nested = make_prompt_cache(build("deepseek_v32"))
    for call in (lambda: nested[0].extend(theirs), lambda: nested[0].merge([nested[0], theirs])):
        with pytest.raises(TypeError, match=r"mlx_lm\.models\.cache\.KVCache"):
            call()
    assert_goes_on(cache, TEXT[:20])


def test_texts_that_are_given_for_tokens(cache: PromptCache) -> None:
    many, wrong = Many(MODEL), "hello"
    with make_session_pool(MODEL) as pool, pool.open([1, 2]) as session:
        calls: tuple[Callable[[], object], ...] = (
            lambda: many.add(wrong),  # type: ignore[arg-type]
            lambda: generate_many(MODEL, wrong),  # type: ignore[arg-type]
            lambda: list(generate_many(MODEL, [wrong])),  # type: ignore[list-item]
            lambda: pool.open(wrong),  # type: ignore[arg-type]
            lambda: pool.store(wrong, cache),  # type: ignore[arg-type]
            lambda: session.extend(wrong),  # type: ignore[arg-type]
        )
        for call in calls:
            with pytest.raises(TypeError, match="encode it with the tokenizer"):
                call()
        assert (len(many), len(pool), session.tokens) == (0, 0, [1, 2])


def test_tokens_that_are_no_whole_numbers() -> None:
    many, wrong = Many(MODEL), [1, 2.5]
    with make_session_pool(MODEL) as pool:
        for open_with in (many.add, pool.open):
            call: Callable[..., object] = open_with
            with pytest.raises(TypeError, match=r"must be whole numbers, got 2\.5"):
                call(wrong)
            with pytest.raises(TypeError, match="must be a sequence of token ids, got int"):
                call(3)
            with pytest.raises(TypeError, match=r"one dimension, got shape \(1, 3\)"):
                call(mx.array([[1, 2, 3]]))
        with pytest.raises(TypeError, match="prompt must be a sequence of token ids, got int"):
            list(generate_many(MODEL, [1, 2, 3]))  # type: ignore[list-item]


def test_tokens_in_an_array() -> None:
    tokens, many = mx.array(TEXT[:5]), Many(MODEL)
    many.add(tokens)  # type: ignore[arg-type]
    with make_session_pool(MODEL) as pool:
        with pool.open(tokens) as session:  # type: ignore[arg-type]
            assert session.rest == session.tokens == TEXT[:5]
            logits_of(MODEL, session.cache, session.rest)
            session.extend(mx.array(TEXT[5:7]))  # type: ignore[arg-type]
            logits_of(MODEL, session.cache, TEXT[5:7])
        assert pool.open(TEXT[:9]).reused == 7


def test_a_pool_takes_caches_of_its_own_model_only() -> None:
    with pytest.raises(TypeError, match=r"make must be a function .* got mlx_kvcache\..*PromptCache"):
        SessionPool(make_prompt_cache(MODEL))  # type: ignore[arg-type]
    other, theirs = tiny_llama(), make_prompt_cache(MODEL)
    for pool in (SessionPool(partial(make_prompt_cache, other)), make_session_pool(other)):
        logits_of(MODEL, theirs.fork(), TEXT[:3])
        cache = theirs.fork()
        logits_of(MODEL, cache, TEXT[:3])
        # As the first thing that a pool is asked, too.
        for _ in range(2):
            with pytest.raises(ValueError, match="another model"):
                pool.store(TEXT[:3], cache)
            assert cache.position == 3 and len(pool) == 0
            assert pool.open(TEXT[:3]).reused == 0


def test_a_session_whose_cache_has_left_the_pool_is_given_up() -> None:
    model = tiny_llama(head_dim=64)
    with make_session_pool(model) as pool:
        with pool.open(TEXT[:5]) as session:
            logits_of(model, session.cache, session.rest)
            session.cache[0].to_quantized()
        assert (len(pool), pool.counts.rejected["of another pool"]) == (0, 1)

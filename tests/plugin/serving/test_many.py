"""Many sequences in one loop: each gets the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn

import mlx.core as mx
import pytest

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Generated, Many, PromptCache, generate_many, make_prompt_cache
from tests.interrupts import Planted
from tests.plugin.configurations import CONFIGURATIONS, DIFFERS_IN_BLOCKS, build, chosen
from tests.plugin.running import difference, greedy, logits_of, model_of
from tests.plugin.test_architectures import REFUSED
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(120)]
SPANS = ((0, 17), (20, 26), (30, 71), (40, 43), (50, 60), (60, 61))
PROMPTS = [TEXT[begin:end] for begin, end in SPANS]


def collected(results: Iterable[Generated]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for result in results:
        if result.token is not None:
            tokens.setdefault(result.ticket, []).append(result.token)
    return tokens


@lru_cache(maxsize=1)
def alone(name: str) -> list[list[int]]:
    return [greedy(model_of(name), prompt, 7) for prompt in PROMPTS]


@pytest.mark.parametrize("per_step", [1, 5, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "deepseek_v3", "qwen3_next", "llama4", "gpt_oss"])
def test_the_tokens_of_each_alone(name: str, per_step: int) -> None:
    """Models that take rows of tokens, and such that do not; blocks of all sizes."""
    tokens = collected(generate_many(model_of(name), PROMPTS, 7, tokens_per_step=per_step, most_at_once=4))
    assert [tokens[i] for i in range(len(PROMPTS))] == alone(name)


@pytest.mark.parametrize("name", chosen(name for name in CONFIGURATIONS if name not in REFUSED))
def test_every_architecture(name: str) -> None:
    model = model_of(name)
    tokens = collected(generate_many(model, PROMPTS[:3], 3, tokens_per_step=16))
    block = 1 if name in DIFFERS_IN_BLOCKS else 64
    assert [tokens[i] for i in range(3)] == [greedy(model, prompt, 3, block) for prompt in PROMPTS[:3]]


def test_sequences_join_and_leave_at_any_step() -> None:
    model = build("llama:window")
    many, tokens = Many(model, tokens_per_step=8), dict[int, list[int | None]]()
    arrivals = {0: 0, 2: 1, 3: 2, 9: 3, 10: 4}
    tickets = {}
    for step in range(60):
        if step in arrivals:
            row = arrivals[step]
            tickets[many.add(PROMPTS[row], max_tokens=6 + row)] = row
        for result in many.step():
            tokens.setdefault(tickets[result.ticket], []).append(result.token)
    assert len(many) == 0
    assert tokens == {row: greedy(model, PROMPTS[row], 6 + row) for row in range(5)}


def test_a_conversation_goes_on_in_its_cache() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    logits_of(model, cache, PROMPTS[0])
    fork = cache.fork()
    many = Many(model)
    many.add([3, 4], max_tokens=5, cache=cache)
    many.add([7], max_tokens=5, cache=fork)
    tokens = collected(result for _ in range(6) for result in many.step())
    assert tokens == {0: greedy(model, [*PROMPTS[0], 3, 4], 5), 1: greedy(model, [*PROMPTS[0], 7], 5)}
    assert (cache.position, fork.position) == (17 + 2 + 4, 17 + 1 + 4)


def test_cancelling_and_stopping() -> None:
    model = tiny_llama()
    alone = greedy(model, PROMPTS[1], 12)
    many = Many(model)
    first, second = many.add(PROMPTS[0], max_tokens=50), many.add(PROMPTS[1], 50, stop_tokens=[alone[5]])
    results = [result for _ in range(3) for result in many.step()]
    cache = many.cancel(first)
    assert cache.position == 17 + 2
    results += [result for _ in range(12) for result in many.step()]
    assert [r.finish for r in results if r.ticket == first][-1] == "cancelled"
    assert [r.finish for r in results if r.ticket == second][-1] == "stop"
    assert len(many) == 0
    with pytest.raises(ValueError, match="no sequence 0 is running"):
        many.cancel(first)


def test_one_that_is_full_ends_and_the_others_go_on() -> None:
    model = tiny_llama()
    many = Many(model, capacity=20)
    many.add(PROMPTS[0], max_tokens=50)
    many.add(PROMPTS[1], max_tokens=10)
    results = [result for _ in range(12) for result in many.step()]
    [full] = [result for result in results if result.finish == "full"]
    assert full.ticket == 0
    assert "20" in str(full.error)
    assert collected(results)[1] == greedy(model, PROMPTS[1], 10)


def test_prompts_longer_than_the_capacity_are_read_in_blocks_that_fit() -> None:
    model = tiny_llama()
    many = Many(model, capacity=20, overflow="shift", sinks=4)
    cache = make_prompt_cache(model, capacity=20, overflow="shift", sinks=4)
    many.add(TEXT[:100], max_tokens=3, cache=cache)
    results: list[Generated] = []
    while len(many):
        results += many.step()
    assert results[-1].finish == "length"
    assert (len(results), cache.position <= 20, cache.gaps > 3) == (3, True, True)


def test_numbers_are_checked_before_anything_is_generated() -> None:
    model = tiny_llama()
    wrong: list[dict[str, Any]] = [{"most_at_once": 0}, {"max_tokens": 0}, {"tokens_per_step": 0}]
    for options in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be 1 or more"):
            generate_many(model, [[1, 2]], **options)


def test_one_that_is_closed_meanwhile_ends_and_the_others_go_on() -> None:
    model = tiny_llama()
    many, cache = Many(model), make_prompt_cache(model)
    many.add(PROMPTS[0], max_tokens=50, cache=cache)
    many.add(PROMPTS[1], max_tokens=10)
    results = many.step()
    cache.close()
    results += [result for _ in range(12) for result in many.step()]
    [closed] = [result for result in results if result.finish == "closed"]
    assert closed.ticket == 0
    assert isinstance(closed.error, CacheError)
    assert collected(results)[1] == greedy(model, PROMPTS[1], 10)


def test_one_that_is_stored_otherwise_meanwhile_ends() -> None:
    model = build("llama", is_wide=True)
    many, cache = Many(model), make_prompt_cache(model)
    many.add(PROMPTS[0], max_tokens=50, cache=cache)
    many.add(PROMPTS[1], max_tokens=10)
    results = many.step()
    for layer in cache:
        layer.to_quantized(32, 8)
    results += [result for _ in range(12) for result in many.step()]
    [ended] = [result for result in results if result.finish == "closed"]
    assert (ended.ticket, str(ended.error)) == (0, "the cache has moved to another pool since it was added")
    assert collected(results)[1] == greedy(model, PROMPTS[1], 10)


def test_what_cannot_be_added() -> None:
    model, other = tiny_llama(), tiny_llama()
    many = Many(model)
    cache = make_prompt_cache(model)
    many.add([1], cache=cache)
    closed = make_prompt_cache(model)
    closed.close()
    for error, match, call in (
        (ValueError, "empty", lambda: many.add([])),
        (ValueError, "token 97 is outside the vocabulary of 97", lambda: many.add([5, 97])),
        (ValueError, "token -1", lambda: many.add([-1])),
        (ValueError, "max_tokens must be 1 or more, got 0", lambda: many.add([1], max_tokens=0)),
        (ValueError, "another pool", lambda: many.add([1], cache=make_prompt_cache(other))),
        (CacheError, "in use", lambda: many.add([1], cache=cache)),
        (CacheError, "closed", lambda: many.add([1], cache=closed)),
        (ValueError, "tokens_per_step must be 1 or more, got 0", lambda: Many(model, tokens_per_step=0)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert len(many) == 1


def test_samplers() -> None:
    model = tiny_llama()
    many = Many(model)
    many.add(PROMPTS[0], max_tokens=4, sampler=lambda logprobs: mx.argmin(logprobs, axis=-1))
    many.add(PROMPTS[0], max_tokens=4)
    tokens = collected(result for _ in range(5) for result in many.step())
    assert tokens[1] == greedy(model, PROMPTS[0], 4)
    assert tokens[0][0] != tokens[1][0]


def test_a_step_starts_the_next_one_and_waits_for_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it returns, all samplers of the next one have been called."""
    many, called = Many(tiny_llama()), list[int]()

    def sampler(logprobs: mx.array) -> mx.array:
        called.append(len(logprobs))
        return mx.argmin(logprobs, axis=-1)

    for prompt in PROMPTS[:3]:
        many.add(prompt, max_tokens=4, sampler=sampler)
    many.add(PROMPTS[3], max_tokens=4)
    many.step()
    called.clear()
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("waits for arrays"))
    counts = []
    while len(many):
        many.step()
        counts.append(len(called))
    assert counts == [6, 9, 9]


ENDS = ["llama", "gemma3_text", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "falcon_h1", "mamba2"]
"""Full attention, windows, chunks, latent attention, hybrids, and recurrences alone."""


@pytest.mark.parametrize("name", ENDS)
def test_caches_of_sequences_that_end_are_as_alone(name: str) -> None:
    """One ends at a stop token, one is cancelled, and the others go on."""
    model = model_of(name)
    many, caches = Many(model), [make_prompt_cache(model) for _ in range(3)]
    texts = [prompt + reply[:6] for prompt, reply in zip(PROMPTS, alone(name), strict=True)]
    stops = [texts[0][20:21], [], []]
    for prompt, cache, stop in zip(PROMPTS, caches, stops, strict=False):
        many.add(prompt, 6, cache, stop_tokens=stop)
    results = [*many.step(), *many.step()]
    assert many.cancel(1) is caches[1]
    while len(many):
        results += many.step()
    tokens = collected(results)
    assert [len(tokens[i]) for i in range(3)] == [alone(name)[0].index(texts[0][20]) + 1, 2, 6]
    for i, cache in enumerate(caches):
        text = PROMPTS[i] + alone(name)[i][: len(tokens[i]) - 1]
        assert cache.position == len(text)
        expected = logits_of(model, make_prompt_cache(model), [*text, 5, 17], 1)[-2:]
        assert difference(logits_of(model, cache, [5, 17]), expected) <= 1e-4


def likeliest(logits: mx.array) -> int:
    token: Any = mx.argmax(logits[-1]).item()
    return int(token)


BORDERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"capacity": 20, "overflow": "shift", "sinks": 2}),
    ("llama", {"kv_bits": 4, "kv_group_size": 32, "quantize_after": 20}),
    ("gemma3_text", {"rewind": 1}),
    ("gemma3_text", {"rewind": 2}),
]


@pytest.mark.parametrize(("name", "options"), BORDERS)
def test_a_reply_that_ends_has_crossed_no_border_ahead(name: str, options: dict[str, Any]) -> None:
    """Where the next token would shift, quantize or be kept for good, no step is started ahead."""
    model = model_of(name, is_wide=True)
    for n in range(1, 7):
        single, text = make_prompt_cache(model, **options), list[int]()
        logits = logits_of(model, single, PROMPTS[0])
        for _ in range(n):
            if text:
                logits = logits_of(model, single, text[-1:])
            text += [likeliest(logits)]
        many, cache = Many(model, **options), make_prompt_cache(model, **options)
        ticket = many.add(PROMPTS[0], 50, cache)
        assert collected(result for _ in range(n) for result in many.step())[0] == text
        many.cancel(ticket)
        assert (cache.position, cache.gaps) == (single.position, single.gaps)
        assert difference(logits_of(model, cache, [5, 17]), logits_of(model, single, [5, 17])) <= 1e-4


@pytest.mark.parametrize("at", range(1, 9))
def test_a_sampler_that_raises_once_takes_nothing_from_others(at: int) -> None:
    model, calls = model_of("gemma3_text"), 0

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Planted
        return mx.argmax(logprobs, axis=-1)

    many, results = Many(model), list[Generated]()
    many.add(PROMPTS[0], 6, sampler=sampler)
    many.add(PROMPTS[1], 6)
    while len(many):
        with suppress(Planted):
            results += many.step()
    assert collected(results) == {i: alone("gemma3_text")[i][:6] for i in range(2)}


class Failing:
    """A sampler that raises from its `at`-th call on."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, logprobs: mx.array) -> mx.array:
        self._left -= 1
        if self._left <= 0:
            raise Planted
        return mx.argmax(logprobs, axis=-1)


def test_a_sampler_that_never_works_again_raises_in_every_other_step() -> None:
    """Tokens that are computed already are returned in between, and then each step raises."""
    many, model = Many(model_of("llama")), model_of("llama")
    many.add(PROMPTS[0], 6, sampler=Failing(4))
    found = []
    for _ in range(5):
        try:
            found.append(collected(many.step()).get(0))
        except Planted:
            found.append(None)
    tokens = greedy(model, PROMPTS[0], 3)
    assert found == [tokens[:1], tokens[1:2], None, tokens[2:3], None]


@pytest.mark.parametrize("change", [lambda cache: cache.rewind(1), lambda cache: cache.rewind(4)])
def test_a_cache_that_its_user_changes_between_steps(change: Callable[[PromptCache], None]) -> None:
    """The others go on as alone."""
    model = model_of("llama")
    many, cache = Many(model), make_prompt_cache(model)
    many.add(PROMPTS[0], 7, cache)
    many.add(PROMPTS[1], 7)
    results = [*many.step(), *many.step()]
    change(cache)
    while len(many):
        results += many.step()
    assert collected(results)[1] == alone("llama")[1]
    assert len(collected(results)[0]) == 7


def test_steps_in_turns_of_two_threads() -> None:
    model = build("llama")
    many = Many(model)
    for prompt in PROMPTS[:3]:
        many.add(prompt, 7)
    results: list[Generated] = []
    with ThreadPoolExecutor(1) as other:
        for step in range(9):
            results += other.submit(many.step).result() if step % 2 else many.step()
    assert collected(results) == {i: greedy(model, PROMPTS[i], 7) for i in range(3)}


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_step_in_which_the_model_raises_is_made_again(name: str) -> None:
    model = build(name)
    many, results = Many(model, tokens_per_step=8), list[Generated]()
    for prompt in PROMPTS[:3]:
        many.add(prompt, max_tokens=7)
    attention = model.layers[1].self_attn
    whole = attention.o_proj

    def throw(x: mx.array) -> NoReturn:
        raise Planted

    for _ in range(40):
        attention.o_proj = throw
        with suppress(Planted):
            assert not many.step()
        attention.o_proj = whole
        results += many.step()
    assert collected(results) == {i: greedy(model, PROMPTS[i], 7) for i in range(3)}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mamba2"])
@pytest.mark.parametrize("closes", [False, True])
def test_a_sampler_that_raises(name: str, closes: bool) -> None:
    """Its tokens wait for the next step. A sequence whose cache cannot go back by them ends, and says so."""
    model, fails = build(name), False
    cache = make_prompt_cache(model)

    def sampler(logits: mx.array) -> mx.array:
        if fails:
            if closes:
                cache.close()
            raise Planted
        return mx.argmax(logits, axis=-1)

    many = Many(model)
    many.add(PROMPTS[1], max_tokens=5, sampler=sampler, cache=cache)
    results, fails = many.step(), True
    with pytest.raises(Planted):
        many.step()
    fails = False
    results += [result for _ in range(8) for result in many.step()]
    expected = greedy(model, PROMPTS[1], 5)
    if closes:
        first, last = results
        assert (first.token, last.token, last.finish) == (expected[0], None, "interrupted")
        assert isinstance(last.error, CacheError) and isinstance(last.error.__cause__, Planted)
    else:
        assert collected(results) == {0: expected}
    assert len(many) == 0


@pytest.mark.parametrize("mixes", [True, False])
def test_all_are_served_in_turn(mixes: bool) -> None:
    """More sequences than tokens in a step: none waits for others to end."""
    model = tiny_llama() if mixes else build("mamba2")
    many = Many(model, tokens_per_step=4)
    tickets = [many.add([n + 1], max_tokens=30) for n in range(8)]
    found = dict.fromkeys(tickets, 0)
    for _ in range(20):
        for generated in many.step():
            found[generated.ticket] += generated.token is not None
        assert max(found.values()) - min(found.values()) <= 1
    late = many.add(list(range(1, 30)), max_tokens=3)
    while late not in found:
        for generated in many.step():
            found[generated.ticket] = found.get(generated.ticket, 0) + 1
        assert min(found[ticket] for ticket in tickets) < 30, "a prompt waits until the others have ended"

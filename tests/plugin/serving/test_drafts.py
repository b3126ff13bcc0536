"""Drafts from the text so far: the tokens, and the caches, are those of decoding without drafts."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Generated, Many, PromptCache, generate_many, make_prompt_cache
from mlx_kvcache.plugin.serving.next_tokens import Drafter
from tests.interrupts import Planted, Tracer, places
from tests.plugin.configurations import build
from tests.plugin.running import difference, logits_of, model_of
from tests.plugin.serving.test_many import collected

NAMES = ["llama", "gemma2", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "mamba2", "rwkv7", "falcon_h1"]
"""Full attention, windows, chunks, latent attention, hybrids, and recurrences alone."""
MOST = 6
NTH = int(os.environ.get("INTERRUPTS_NTH", "800"))
"""Of the lines of a step every so-manieth is interrupted."""
EXACT = 1e-4
"""In units of the logits' standard deviation."""
RANDOM = [(5 * i + 3 * i * i) % 90 for i in range(31)]
PERIODIC = [3, 41, 7, 60] * 6 + [3, 41]
LOOPS = [*range(10, 30), 88, *range(10, 18)]
PROMPTS = [RANDOM, PERIODIC, LOOPS, [9]]

PHRASE = list(range(20, 34))
SCRIPT = [token for j in range(MOST, -1, -1) for token in [60 + j, *PHRASE[: 2 + j]]] + [58, 59]
"""After the prompt PHRASE, each run's first two tokens find the run before, of which j tokens come again."""


class Scripted:
    """A sampler that chooses the tokens of a script, whatever the logits, which it keeps."""

    def __init__(self, script: Sequence[int] = SCRIPT) -> None:
        self._script = iter(script)
        self.logprobs: list[mx.array] = []

    def __call__(self, logprobs: mx.array) -> mx.array:
        assert logprobs.shape[0] == 1
        self.logprobs.append(logprobs)
        return mx.array([next(self._script)])


def few(logprobs: mx.array) -> mx.array:
    """A sampler that chooses the likeliest of four tokens, so that every text repeats itself in parts."""
    return mx.argmax(logprobs[:, :4], axis=-1)


def steps(many: Many, most: int = 1000) -> Iterator[list[Generated]]:
    """The results of each step until all sequences have ended."""
    while len(many):
        yield many.step()
        most -= 1
        assert most, "the sequences do not end"


def texts_of(
    many: Many, n: int, prompts: Sequence[list[int]] = PROMPTS, **options: Any
) -> dict[int, list[int]]:
    """The texts of these prompts, as the likeliest of few tokens."""
    for prompt in prompts:
        many.add(prompt, n, **({"sampler": few} | options))
    return collected(result for own in steps(many) for result in own)


@lru_cache(maxsize=4)
def plain(name: str, n: int) -> dict[int, list[int]]:
    """The texts of all prompts without drafts."""
    return texts_of(Many(model_of(name)), n)


def normalized(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def assert_equal(ours: mx.array, expected: mx.array) -> None:
    assert difference(ours / mx.std(expected), expected / mx.std(expected)) <= EXACT


def assert_goes_on(name: str, cache: PromptCache, text: list[int]) -> None:
    """The cache holds this text, and goes on as mlx-lm's own does."""
    model, more = model_of(name), [5, 17, 44]
    assert cache.position == len(text)
    theirs = make_theirs(model)
    expected = logits_of(model, theirs, [*text, *more], 1)[-3:]
    assert_equal(logits_of(model, cache, more), expected)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_plain_decoding(name: str) -> None:
    """Four sequences at once, of which some repeat themselves and others do not."""
    many = Many(model_of(name), draft_tokens=MOST)
    assert texts_of(many, 40) == plain(name, 40)
    assert 0 < many.accepted < many.drafted
    # The likeliest tokens of all.
    texts = [collected(generate_many(model_of(name), PROMPTS, 10, draft_tokens=most)) for most in (0, MOST)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_accepted_tokens(name: str) -> None:
    """The sampler sees the logits of plain decoding, once for each token."""
    model, sampler = model_of(name), Scripted()
    cache, many = make_prompt_cache(model), Many(model, draft_tokens=MOST)
    many.add(PHRASE, max_tokens=len(SCRIPT), cache=cache, sampler=sampler)
    accepted, drafted = [], 0
    for results in steps(many):
        if many.drafted > drafted:
            accepted.append(len(results) - 1)
        drafted = many.drafted
        assert cache.position == len(PHRASE) + len(sampler.logprobs) - 1
    assert accepted == list(range(MOST, -1, -1))
    assert many.accepted == sum(accepted)
    text = PHRASE + SCRIPT
    expected = logits_of(model, make_theirs(model), text[:-1], 1)[len(PHRASE) - 1 :]
    assert_equal(mx.concatenate(sampler.logprobs), normalized(expected))
    assert_goes_on(name, cache, text[:-1])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon_h1"])
def test_each_sequence_accepts_its_own_number(name: str) -> None:
    """Their runs of accepted tokens do not coincide, and they end in different steps."""
    model, many = model_of(name), Many(model_of(name), draft_tokens=MOST)
    samplers = [Scripted(SCRIPT[8 * i :]) for i in range(4)]
    caches = [make_prompt_cache(model) for _ in samplers]
    for i, (sampler, cache) in enumerate(zip(samplers, caches, strict=True)):
        many.add(PHRASE, max_tokens=len(SCRIPT) - 8 * i, cache=cache, sampler=sampler)
    counts = [[len([r for r in own if r.ticket == i]) for i in range(4)] for own in steps(many)]
    assert any(len(set(own)) > 2 for own in counts)
    for i, cache in enumerate(caches):
        assert_goes_on(name, cache, PHRASE + SCRIPT[8 * i : -1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_sequences_join_and_leave_at_any_step(name: str) -> None:
    many, tokens = Many(model_of(name), tokens_per_step=12, draft_tokens=MOST), dict[int, list[int]]()
    arrivals, tickets = {0: 0, 2: 1, 3: 2, 9: 3}, {}
    for step in range(80):
        if step in arrivals:
            row = arrivals[step]
            tickets[many.add(PROMPTS[row], max_tokens=16 + 8 * row, sampler=few)] = row
        for ticket, own in collected(many.step()).items():
            tokens.setdefault(tickets[ticket], []).extend(own)
    assert len(many) == 0
    assert tokens == {row: own[: 16 + 8 * row] for row, own in plain(name, 40).items()}
    assert many.accepted


@pytest.mark.parametrize("per_step", [1, 2, 5, 9])
def test_a_call_has_no_more_than_tokens_per_step(per_step: int) -> None:
    model, sizes = build("llama"), list[int]()
    many = Many(model, per_step, draft_tokens=MOST)
    for prompt in PROMPTS:
        many.add(prompt, max_tokens=30, sampler=few)
    # The first step tries the model.
    results = many.step()
    embed = model.model.embed_tokens

    def counted(tokens: mx.array) -> mx.array:
        sizes.append(tokens.size)
        found: mx.array = embed(tokens)
        return found

    model.model.embed_tokens = counted
    texts = collected([*results, *(result for own in steps(many) for result in own)])
    assert max(sizes) == per_step
    assert texts == {i: own[:30] for i, own in plain("llama", 40).items()}
    assert bool(many.accepted) == (per_step > 1)


def test_prompts_do_not_wait_for_drafts() -> None:
    """A prompt is read in as many steps as without drafts, where one more is under way when it comes."""
    found = []
    for most in (0, MOST):
        many = Many(model_of("llama"), tokens_per_step=8, draft_tokens=most)
        many.add(PERIODIC, max_tokens=200, sampler=few)
        for _ in range(20):
            many.step()
        late = many.add(LOOPS, max_tokens=1)
        found.append(next(i for i, own in enumerate(steps(many)) if late in {r.ticket for r in own}))
        assert bool(many.accepted) == bool(most)
    assert found == [5, 4]


@pytest.mark.parametrize("name", ["llama", "mamba2"])
@pytest.mark.parametrize("end", range(1, 13))
def test_ends_inside_a_run(name: str, end: int) -> None:
    """By `max_tokens`, or by a stop token, at each token of accepted and rejected drafts."""
    model = model_of(name)
    for finish, options in (("length", {"max_tokens": end}), ("stop", {"stop_tokens": [SCRIPT[end - 1]]})):
        if finish == "stop" and SCRIPT.index(SCRIPT[end - 1]) != end - 1:
            continue
        many, cache = Many(model, draft_tokens=MOST), make_prompt_cache(model)
        many.add(PHRASE, cache=cache, sampler=Scripted(), **options)
        results = [result for own in steps(many) for result in own]
        assert [result.token for result in results] == SCRIPT[:end]
        assert [result.finish for result in results] == [None] * (end - 1) + [finish]
        # The fourth token comes after the first that have occurred before; the last one needs no draft.
        assert (many.drafted > 0) == (end > 4 or (end, finish) == (4, "stop"))
        assert_goes_on(name, cache, PHRASE + SCRIPT[: end - 1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("overflow", ["error", "shift"])
def test_a_full_cache(name: str, overflow: str) -> None:
    """No draft makes a cache shift, or fail, before plain decoding does."""
    model, found = model_of(name), []
    for most in (0, MOST):
        cache = make_prompt_cache(model, capacity=64, overflow=overflow)  # type: ignore[arg-type]
        many = Many(model, draft_tokens=most, capacity=64, overflow=overflow)
        many.add(PERIODIC, max_tokens=100, cache=cache, sampler=few)
        results = [result for own in steps(many) for result in own]
        last = results[-1]
        found.append((collected(results), last.finish, str(last.error), cache.position, cache.gaps))
        assert bool(many.accepted) == bool(most)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1"])
@pytest.mark.parametrize("after", [0, 40])
def test_quantized(name: str, after: int) -> None:
    """No draft makes a cache quantize before plain decoding does."""
    model, found = build(name, is_wide=True), []
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantize_after": after}
    for most in (0, MOST):
        many = Many(model, draft_tokens=most, **options)
        found.append(texts_of(many, 40))
    assert found[0] == found[1]
    assert many.accepted


@pytest.mark.parametrize("name", ["gemma2", "qwen3_next"])
@pytest.mark.parametrize("rewind", [0, 1, 2, 4])
def test_no_more_than_the_cache_can_go_back(name: str, rewind: int) -> None:
    many = Many(model_of(name), draft_tokens=MOST, rewind=rewind, checkpoints=0, checkpoint_bytes=0)
    many.add(PERIODIC, max_tokens=40, sampler=few)
    results = list(steps(many))
    assert max(map(len, results)) <= max(1, rewind)
    assert bool(many.accepted) == (rewind > 1)
    assert collected(result for own in results for result in own)[0] == plain(name, 40)[1]


def test_a_model_whose_states_cannot_be_computed_again() -> None:
    """It goes on without drafts."""
    model = build("mamba2")
    pool = make_prompt_cache(model).pool
    pool.__dict__["mixers"] = {}
    many = Many(model, draft_tokens=MOST)
    assert texts_of(many, 40) == plain("mamba2", 40)
    assert many.drafted == 0


@pytest.mark.parametrize("name", ["gemma2", "mamba2", "falcon_h1", "gemma2 in mlx-lm's format"])
def test_a_loaded_cache(name: str, tmp_path: Path) -> None:
    """It holds no more than its next token needs, which is enough to go back to any later one."""
    name, _, is_theirs = name.partition(" ")
    model, path = model_of(name), tmp_path / "cache.safetensors"
    saved = make_prompt_cache(model)
    logits_of(model, saved, PERIODIC[:-2])
    saved.save(path, format="mlx-lm" if is_theirs else "mlx_kvcache")
    many = Many(model, draft_tokens=MOST)
    assert texts_of(many, 40, [PERIODIC[-2:]], cache=PromptCache.load(path, model))[0] == plain(name, 40)[1]
    assert many.accepted


def test_drafting_pauses_where_nothing_is_accepted() -> None:
    """A sampler that always chooses another token than the drafted one: drafts get rare and short."""
    text = [1, 2, 3, 1, 2]

    def sampler(logprobs: mx.array) -> mx.array:
        followers = {
            text[i + n] for n in (2, 3) for i in range(len(text) - n) if text[i : i + n] == text[-n:]
        }
        text.append(next(token for token in range(1, 90) if token not in followers))
        return mx.array([text[-1]])

    many = Many(model_of("llama"), draft_tokens=MOST)
    many.add(list(text), max_tokens=300, sampler=sampler)
    assert sum(1 for _ in steps(many)) == 300
    # The first draft, then one token after 1, 2, 4, 8, 16 and each 32 steps.
    assert MOST + 5 <= many.drafted <= MOST + 5 + 300 // 32
    assert many.accepted == 0


def test_a_period_shorter_than_a_draft_is_repeated() -> None:
    many = Many(model_of("llama"), draft_tokens=MOST)
    many.add([5, 6, 5], max_tokens=2 * MOST + 4, sampler=Scripted([6, 5] * 20))
    assert list(map(len, steps(many))) == [1, MOST + 1, MOST + 1, 1]


def test_a_sampler_with_a_state_of_its_own() -> None:
    """It is called for each token once, in order, so that the same seed gives the same text."""
    model, texts = model_of("llama"), []
    for most in (0, MOST):
        draws, many = random.Random(1), Many(model, draft_tokens=most)

        def sampler(logprobs: mx.array, draws: random.Random = draws) -> mx.array:
            likeliest = mx.argsort(logprobs, axis=-1)[:, -2:].tolist()[0]  # type: ignore[index]
            return mx.array([likeliest[draws.random() < 0.9]])  # type: ignore[index]

        many.add(PERIODIC, max_tokens=80, sampler=sampler)
        texts.append(collected(result for own in steps(many) for result in own))
    assert texts[0] == texts[1]
    assert 0 < many.accepted < many.drafted


def test_cancelling_while_drafting() -> None:
    many = Many(model_of("falcon_h1"), draft_tokens=MOST)
    ticket = many.add(PERIODIC, max_tokens=60, sampler=few)
    tokens = collected(result for _ in range(20) for result in many.step())[ticket]
    assert_goes_on("falcon_h1", many.cancel(ticket), PERIODIC + tokens[:-1])
    assert many.accepted


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_next"])
def test_a_step_in_which_the_model_raises_is_made_again(name: str) -> None:
    model = build(name)
    many, results = Many(model, draft_tokens=MOST), list[Generated]()
    for prompt in PROMPTS:
        many.add(prompt, max_tokens=40, sampler=few)
    norm = model.model.norm

    def throw(x: mx.array) -> NoReturn:
        raise Planted

    while len(many):
        model.model.norm = throw
        with suppress(Planted):
            assert not many.step()
        model.model.norm = norm
        results += many.step()
    assert collected(results) == plain(name, 40)
    assert many.accepted


@pytest.mark.parametrize("name", ["llama", "mamba2", "gpt_oss"])
def test_a_sampler_that_raises_inside_a_run(name: str) -> None:
    """All sequences of the step go back, and make it again."""
    calls = 0

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls % 11 == 0:
            raise Planted
        return few(logprobs)

    many, results = Many(model_of(name), draft_tokens=MOST), list[Generated]()
    many.add(PERIODIC, max_tokens=40, sampler=few)
    many.add(PERIODIC, max_tokens=40, sampler=sampler)
    while len(many):
        with suppress(Planted):
            results += many.step()
    assert collected(results) == dict.fromkeys(range(2), plain(name, 40)[1])
    assert many.accepted


@pytest.mark.parametrize("at", range(9, 18))
def test_a_cache_that_is_closed_inside_a_run(at: int) -> None:
    """Its last token is given, and the others go on."""
    many, scripted = Many(model_of("llama"), draft_tokens=MOST), Scripted()
    cache = make_prompt_cache(model_of("llama"))

    def sampler(logprobs: mx.array) -> mx.array:
        if len(scripted.logprobs) == at:
            cache.close()
        return scripted(logprobs)

    many.add(RANDOM, max_tokens=40, sampler=few)
    many.add(PHRASE, max_tokens=40, cache=cache, sampler=sampler)
    results = [result for own in steps(many) for result in own]
    assert collected(results)[0] == plain("llama", 40)[0]
    closed = [result for result in results if result.ticket == 1]
    assert [one.token for one in closed if one.token is not None][: at + 1] == SCRIPT[: at + 1]
    assert closed[-1].finish == "closed"
    assert isinstance(closed[-1].error, CacheError)


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_a_step_that_is_interrupted(name: str) -> None:
    """At any line: the tokens that follow are the same."""

    def make(n: int) -> Many:
        many = Many(model_of(name), draft_tokens=MOST)
        for prompt in PROMPTS[:2]:
            many.add(prompt, max_tokens=30, sampler=few)
        for _ in range(n):
            many.step()
        return many

    def finished(many: Many, given: Sequence[Generated] = ()) -> list[tuple[int, int | None]]:
        results = [*given, *(result for own in steps(many) for result in own)]
        return sorted((one.ticket, one.token) for one in results)

    def step(many: Many, given: list[Generated]) -> None:
        given += many.step()

    lines, first = inspect.getsourcelines(Many.step)
    handed_over = inspect.getsourcefile(Many), first + len(lines) - 1, "return"
    counts = [(many.drafted, many.accepted) for many in map(make, range(25))]
    n = next(i for i, (a, b) in enumerate(pairwise(counts)) if 0 < b[1] - a[1] < b[0] - a[0])
    expected = finished(make(n))
    for at in places(make(n).step, NTH, 7):
        many, given = make(n), list[Generated]()
        tracer = Tracer(at)
        tracer.run(partial(step, many, given))
        place = tracer.places[-1]
        assert place == handed_over or finished(many, given) == expected, place


def test_a_lookup_that_is_interrupted() -> None:
    """It may miss tokens, but goes on."""
    for at in places(partial(Drafter(PHRASE).learn, PHRASE[:4], 3, 1)):
        drafter = Drafter(PHRASE)
        assert Tracer(at).run(partial(drafter.learn, PHRASE[:4], 3, 1))
        assert set(drafter.draft(2)) <= {*PHRASE}


def test_numbers_are_checked() -> None:
    makes: list[Callable[..., Any]] = [Many, partial(generate_many, prompts=[[1]])]
    for make in makes:
        with pytest.raises(ValueError, match="draft_tokens must be 0 or more, got -1"):
            make(model_of("llama"), draft_tokens=-1)
        with pytest.raises(TypeError, match=r"draft_tokens must be a whole number, got 1\.5"):
            make(model_of("llama"), draft_tokens=1.5)

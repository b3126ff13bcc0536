"""An exception at every line of what a prompt cache is asked for: all has happened, or nothing."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache, trim_prompt_cache

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import Generated, Many, PromptCache, make_prompt_cache, make_session_pool
from mlx_kvcache.sessions import SessionPool
from mlx_kvcache.sessions.session import Session
from tests.interrupts import Tracer, places
from tests.plugin.configurations import build
from tests.plugin.tiny import tiny_llama

NTH = int(os.environ.get("INTERRUPTS_NTH", "800"))
"""Of the lines of a call every so-manieth is tried, on each model another one."""

PROMPT = [5, 17, 3, 88, 41, 7, 60, 2, 19, 33, 8, 71]


class Subject(NamedTuple):
    """A model, and the options of its caches."""

    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def windowed() -> nn.Module:
    model = tiny_llama()
    model.make_cache = lambda: [RotatingKVCache(8) for _ in model.layers]
    return model


SUBJECTS = [
    Subject("llama", tiny_llama, {}),
    Subject("window", windowed, {"rewind": 4}),
    Subject("packed", partial(build, "llama", is_wide=True), {"kv_bits": (8, 4), "kv_group_size": 32}),
    Subject("chunks and positions that must not run ahead", partial(build, "llama4"), {}),
    Subject("recurrent and full", partial(build, "falcon_h1"), {}),
]


@pytest.fixture(scope="module", params=SUBJECTS, ids=str)
def subject(request: pytest.FixtureRequest) -> tuple[Subject, nn.Module]:
    chosen: Subject = request.param
    model = chosen.build()
    # What a model is like is found out once, by running it.
    warm = filled(chosen, model)
    assert warm.pool.scheme and warm.pool.batching
    return chosen, model


def filled(subject: Subject, model: nn.Module, **options: Any) -> PromptCache:
    """A cache that has read a block, then tokens, and shares what it holds with a fork."""
    cache = make_prompt_cache(model, **(subject.options | options))
    read(model, cache, PROMPT[:8])
    cache.fork_of_mine = cache.fork()  # type: ignore[attr-defined]
    for token in PROMPT[8:]:
        read(model, cache, [token])
    return cache


def read(model: nn.Module, cache: Any, tokens: list[int]) -> mx.array:
    logits: mx.array = model(mx.array([tokens]), cache=cache)
    mx.eval(logits)
    return logits


def seen(model: nn.Module, cache: PromptCache) -> tuple[int, Any]:
    """How long a cache is, and what the model makes of it."""
    if not cache._rows.conversations or not cache._rows.conversations[0]._release.alive:
        return -1, np.zeros(1)
    for each in cache.pool.caches:
        each.check()
    fork = cache.fork()
    return cache.position, np.array(read(model, fork, [9, 4, 30])[0])


def equals(a: tuple[int, Any], b: tuple[int, Any]) -> bool:
    return a[0] == b[0] and np.allclose(a[1], b[1], rtol=1e-4, atol=1e-5)


def trimmed(model: nn.Module, cache: PromptCache) -> None:
    trim_prompt_cache(cache, 1)


def refused(call: Callable[[PromptCache], Any], model: nn.Module, cache: PromptCache) -> None:
    """A call that some models cannot do."""
    try:
        call(cache)
    except NotSupportedError:
        return


CALLS: dict[str, Callable[[nn.Module, PromptCache], Any]] = {
    "a block": lambda model, cache: read(model, cache, [1, 2, 3, 4, 5]),
    "a token": lambda model, cache: read(model, cache, [6]),
    "rewind": partial(refused, lambda cache: cache.rewind(3)),
    "rewind to the beginning": lambda model, cache: cache.rewind_to(0),
    "remove": partial(refused, lambda cache: cache.remove(2, 5)),
    "remove all": lambda model, cache: cache.remove(0),
    "trim": trimmed,
    "fork": lambda model, cache: cache.fork(),
    "deepcopy": lambda model, cache: copy.deepcopy(cache),
    "merge": lambda model, cache: [layer.merge([layer, layer]) for layer in cache],
    "close": lambda model, cache: cache.close(),
    "figures": lambda model, cache: (cache.nbytes, cache.pool.nbytes, cache.resume_point(5)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_all_or_nothing(subject: tuple[Subject, nn.Module], call: Callable[..., Any]) -> None:
    kind, model = subject
    before = seen(model, filled(kind, model))
    whole = filled(kind, model)
    call(model, whole)
    after = seen(model, whole)
    counted = filled(kind, model)
    for at in places(partial(call, model, counted), NTH, SUBJECTS.index(kind)):
        cache = filled(kind, model)
        tracer = Tracer(at)
        assert tracer.run(partial(call, model, cache))
        place, found = tracer.places[at], seen(model, cache)
        assert equals(found, before) or equals(found, after), place
        if not equals(found, after):
            call(model, cache)
            assert equals(seen(model, cache), after), place


def test_making_room_and_reading_are_each_whole(subject: tuple[Subject, nn.Module]) -> None:
    kind, model = subject
    if filled(kind, model).pool.layout.is_recurrent:
        pytest.skip("tokens of a recurrence cannot be removed")

    def make() -> PromptCache:
        return filled(kind, model, capacity=14, overflow="shift", sinks=2)

    call = CALLS["a block"]
    before, whole, roomy = seen(model, make()), make(), make()
    call(model, whole)
    roomy._conversation.make_room(5, early=True)
    allowed = [before, seen(model, roomy), seen(model, whole)]
    for at in places(partial(call, model, make()), NTH, SUBJECTS.index(kind)):
        cache = make()
        tracer = Tracer(at)
        assert tracer.run(partial(call, model, cache))
        found = seen(model, cache)
        assert any(equals(found, one) for one in allowed), tracer.places[at]
        if not equals(found, allowed[-1]):
            call(model, cache)
            assert equals(seen(model, cache), allowed[-1]), tracer.places[at]


def test_a_file_is_whole(subject: tuple[Subject, nn.Module], tmp_path: Path) -> None:
    kind, model = subject
    path = tmp_path / "chat.safetensors"
    short, long = make_prompt_cache(model, **kind.options), filled(kind, model)
    read(model, short, PROMPT[:3])
    expected = [seen(model, short), seen(model, long)]
    short.save(path)
    for at in places(partial(long.save, path), NTH, SUBJECTS.index(kind)):
        short.save(path)
        tracer = Tracer(at)
        assert tracer.run(partial(long.save, path))
        found = seen(model, PromptCache.load(path, model))
        assert any(equals(found, one) for one in expected), tracer.places[at]
        assert equals(seen(model, long), expected[1])
    long.save(path)
    for at in places(partial(PromptCache.load, path, model), NTH, SUBJECTS.index(kind)):
        # How much a finalizer does, in which nothing can be thrown, differs from time to time.
        Tracer(at).run(partial(PromptCache.load, path, model))
        assert equals(seen(model, PromptCache.load(path, model)), expected[1])
    assert [file.name for file in tmp_path.iterdir() if file != path] == []


def test_rows_of_a_batch_stay_together(subject: tuple[Subject, nn.Module]) -> None:
    kind, model = subject
    calls: dict[str, Callable[[list[Any]], Any]] = {
        "tokens": lambda batch: mx.eval(model(mx.array([[1], [2]]), cache=batch)),
        "filter": lambda batch: [layer.filter([1]) for layer in batch],
        "trim": lambda batch: batch[0].trim(1),
        "extend": lambda batch: batch[0].extend(batch[0].merge([batch[0]])),
    }

    def make() -> list[Any]:
        one, other = filled(kind, model), make_prompt_cache(model, **kind.options)
        read(model, other, PROMPT[:5])
        return [layer.merge([layer, second]) for layer, second in zip(one, other, strict=True)]

    def look(batch: list[Any]) -> list[int]:
        for each in batch[0].rows.pool.caches:
            each.check()
        positions: list[int] = batch[0].rows.positions
        return positions

    for name, call in calls.items():
        if make()[0].rows.pool.batching == "apart" and name == "tokens":
            continue  # rows that are called one after the other are each whole
        if kind.name.startswith("recurrent") and name == "trim":
            continue  # such states do not step back
        whole = make()
        before = look(whole)
        call(whole)
        after = look(whole)
        for at in places(partial(call, make()), NTH, SUBJECTS.index(kind)):
            batch = make()
            tracer = Tracer(at)
            # What is thrown in a finalizer does not come out.
            tracer.run(partial(call, batch))
            assert look(batch) in (before, after), (name, tracer.places[at])


def test_steps_of_many_go_on(subject: tuple[Subject, nn.Module]) -> None:
    kind, model = subject

    def make() -> Many:
        many = Many(model, tokens_per_step=6, **kind.options)
        many.add(PROMPT[:4], max_tokens=4)
        many.step()
        many.add(PROMPT, max_tokens=3)
        return many

    def finished(many: Many, given: Sequence[Generated] = ()) -> list[tuple[int, int | None]]:
        results = [*given]
        while len(many):
            results += many.step()
        return sorted((one.ticket, one.token) for one in results)

    def step(many: Many, given: list[Generated]) -> None:
        given += many.step()

    lines, first = inspect.getsourcelines(Many.step)
    handed_over = inspect.getsourcefile(Many), first + len(lines) - 1, "return"
    expected = finished(make())
    for at in places(make().step, NTH, SUBJECTS.index(kind)):
        many, given = make(), list[Generated]()
        tracer = Tracer(at)
        # What is thrown in a finalizer does not come out, and a step may have fewer lines than the first one.
        tracer.run(partial(step, many, given))
        place = tracer.places[-1]
        assert place == handed_over or finished(many, given) == expected, place


def test_a_pool_knows_what_it_holds(subject: tuple[Subject, nn.Module]) -> None:
    kind, model = subject
    calls: dict[str, Callable[[SessionPool, Session], Any]] = {
        "open": lambda pool, session: pool.open(PROMPT[:9]),
        "close": lambda pool, session: session.close(),
        "clear": lambda pool, session: pool.clear(),
        "remove": lambda pool, session: session.remove(1, session.cache.position, "other"),
    }

    def make() -> tuple[SessionPool, Session]:
        pool = make_session_pool(model, max_stored=2, **kind.options)
        for tokens in ([1, 2, 3], PROMPT[:5], PROMPT[:7], [1, 2, 4]):
            with pool.open(tokens) as session:
                read(model, session.cache, session.rest)
        session = pool.open(PROMPT[:8])
        read(model, session.cache, session.rest)
        return pool, session

    if make()[1].cache.pool.layout.is_recurrent:
        del calls["remove"]
    for name, call in calls.items():
        for at in places(partial(call, *make()), NTH, SUBJECTS.index(kind)):
            pool, session = make()
            tracer = Tracer(at)
            tracer.run(partial(call, pool, session))
            place = name, tracer.places[at]
            assert session.cache._rows.conversation._release.alive or name == "close", place
            for entry in pool._stored:
                assert entry.cache.position == len(entry.tokens), place
                assert (len(entry.tokens), entry) in list(pool._trees[entry.salt].matches(entry.tokens)), (
                    place
                )
            session.close()
            with pool.open([*PROMPT[:8], 9, 4, 30]) as again:
                logits = read(model, again.cache, again.rest)
            fresh = make_prompt_cache(model, **kind.options)
            expected = read(model, fresh, [*PROMPT[:8], 9, 4, 30])
            # Packed keys are read as they were packed, block by block.
            assert kind.name == "packed" or np.allclose(logits[0, -1], expected[0, -1], atol=1e-4), place

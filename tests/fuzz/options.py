"""The plug-in's options and calls, with arguments that nobody meant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mlx.core as mx
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mlx_kvcache import CacheError
from mlx_kvcache.plugin import Many, PromptCache, attach, make_prompt_cache, make_session_pool

from .bounds import folder
from .damage import often
from .models import MODELS, TOKENS, held, run
from .target import drawn

whole = st.integers(-2, 40) | st.integers(0, 9) | st.sampled_from((64, 10**6, 2**31, 2**63, 2**70))
odd: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=2)
    | st.binary(max_size=2)
    | st.lists(whole, max_size=3)
)
number = often(whole, odd)
bits = often(st.sampled_from((None, 8, 6, 5, 4, 3, 2)), number)
layered: st.SearchStrategy[Any] = st.sampled_from(
    (lambda layer: (8, None)[layer % 2], lambda layer: (4, 8), lambda layer: "x", lambda layer: {})
)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "capacity": often(st.sampled_from((None, 1, 8, 16)), number),
    "overflow": often(st.sampled_from(("error", "shift")), odd),
    "rewind": number,
    "sinks": often(st.sampled_from((0, 1, 4)), number),
    "kv_bits": bits | st.tuples(bits, bits) | st.lists(bits, max_size=3) | layered,
    "kv_group_size": often(st.sampled_from((32, 64)), number),
    "kv_float": often(st.sampled_from(((), "last", [0], [-1])), number | st.lists(number, max_size=2)),
    "quantize_after": number,
    "kv_transform": often(st.sampled_from(("hadamard", "none")), odd),
    "kv_text": often(st.lists(st.integers(0, 40), max_size=6), odd),
}
options = st.fixed_dictionaries({}, optional=OPTIONS) | st.fixed_dictionaries(
    {}, optional={"overflow": st.just("shift"), "capacity": st.sampled_from((1, 8, 16)), "sinks": st.just(1)}
)
prompts = often(st.lists(st.integers(0, TOKENS), max_size=6), st.lists(number, max_size=3) | odd)


class Call(NamedTuple):
    """Something that is done with one of the caches that there are."""

    name: str
    which: int
    a: Any
    b: Any


class Programme(NamedTuple):
    """Options for a model's caches, and what is done with those."""

    model: str
    options: dict[str, Any]
    calls: list[Call]


def feed(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    n = call.a if isinstance(call.a, int) and 0 < call.a < 20 else 3
    run(held(programme.model).model, caches[call.which], n)


def rewind(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    caches[call.which].rewind(call.a)


def rewind_to(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    caches[call.which].rewind_to(call.a)


def remove(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    caches[call.which].remove(call.a, call.b)


def fork(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    caches.append(copy.deepcopy(caches[call.which]) if call.a == 0 else caches[call.which].fork())


def close(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    caches[call.which].close()


def ask(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    cache = caches[call.which]
    assert cache.can_resume(call.a) in (True, False)
    point = cache.resume_point(call.a)
    assert 0 <= point <= call.a and cache.can_resume(point)


def trim(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    for layer in caches[call.which]:
        layer.trim(call.a)


def look(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    cache = caches[call.which]
    assert cache.nbytes >= 0 and cache.pool.nbytes >= 0
    mx.eval([layer.state for layer in cache])


def save(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    path = folder() / "saved.safetensors"
    tokens = range(caches[call.which].position) if call.a == 0 else call.a
    form: Any = "mlx-lm" if call.b == 0 else "mlx_kvcache"
    caches[call.which].save(path, tokens, format=form)
    caches.append(PromptCache.load(path, held(programme.model).model))
    if call.b != 0:
        assert caches[-1].position == caches[call.which].position


def pack(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    layers = [layer for layer in caches[call.which] if hasattr(layer, "to_quantized")]
    layers[0].to_quantized(call.a, call.b)


def many(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    running = Many(held(programme.model).model, call.b, **programme.options)
    for cache in (caches[call.which], None):
        ticket = running.add(call.a, 3, cache)
    for _ in range(4):
        for generated in running.step():
            assert generated.token is None or generated.token >= 0
    if len(running):
        running.cancel(ticket)


def generate(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    model = held(programme.model).model
    with attach(model, **programme.options):
        asked = {"max_kv_size": call.b} if isinstance(call.b, int) else {}
        if (
            isinstance(call.a, list)
            and call.a
            and all(isinstance(t, int) and 0 <= t < TOKENS for t in call.a)
        ):
            for token, _ in generate_step(mx.array(call.a), model, max_tokens=3, **asked):
                assert token >= 0


def sessions(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    model = held(programme.model).model
    with make_session_pool(model, call.b, **programme.options) as pool:
        for _ in range(2):
            with pool.open(call.a) as session:
                run(model, session.cache, len(session.rest))
                session.shift(1, 1)
                session.remove(0, 1, "other")


CALLS: tuple[Callable[[Programme, list[PromptCache], Call], None], ...] = (
    *(feed, feed, rewind, rewind_to, remove, fork, close, ask, trim),
    *(look, save, pack, many, generate, sessions),
)
BY_NAME = {own.__name__: own for own in CALLS}
NUMBERS = {
    "rewind": "a",
    "rewind_to": "a",
    "remove": "ab",
    "ask": "a",
    "trim": "a",
    "pack": "ab",
    "many": "b",
    "sessions": "b",
}
"""Which arguments are to be whole numbers."""
LISTS = {"many", "sessions", "save", "generate"}
"""Whose first argument is to be a list of whole numbers."""

programmes = st.builds(
    Programme,
    st.sampled_from(MODELS),
    options,
    st.lists(
        st.builds(
            Call,
            st.sampled_from([own.__name__ for own in CALLS if own.__name__ not in LISTS]),
            st.integers(0, 3),
            number,
            number,
        )
        | st.builds(Call, st.sampled_from(sorted(LISTS)), st.integers(0, 3), prompts, st.none() | number),
        max_size=8,
    ),
)


def check_programme(programme: Programme) -> None:
    """Typed errors only, after which everything is as it was."""
    model, bystander = held(programme.model)
    before = bookkeeping([bystander])
    try:
        first = make_prompt_cache(model, **programme.options)
    except (ValueError, CacheError):
        assert bookkeeping([bystander]) == before
        return
    except TypeError:
        assert not are_typed(programme.options), programme.options
        assert bookkeeping([bystander]) == before
        return
    caches = [first]
    run(model, first, 1)
    for call in programme.calls:
        _call(programme, caches, call._replace(which=call.which % len(caches)))
        assert bookkeeping([bystander]) == before
    for cache in caches:
        cache.close()
    for pool in {id(cache.pool): cache.pool for cache in caches}.values():
        assert pool.nbytes >= 0
        for own in pool.caches:
            own.check()


def _call(programme: Programme, caches: list[PromptCache], call: Call) -> None:
    before = bookkeeping(caches)
    try:
        BY_NAME[call.name](programme, caches, call)
    except (ValueError, CacheError):
        pass
    except TypeError:
        assert not _is_typed(programme, call), call
    else:
        return
    if call.name not in {"many", "generate", "sessions"}:
        # Those do several things, of which the first ones were done.
        assert bookkeeping(caches[: len(before)]) == before, call


def are_typed(options: dict[str, Any]) -> bool:
    """Whether all options are of the types that they should be, whatever their values."""
    may_be: dict[str, Any] = {
        "capacity": (int, type(None)),
        "overflow": str,
        "kv_bits": object,
        "kv_float": (list, tuple, str),
    }
    layers = options.get("kv_float", ())
    return all(isinstance(value, may_be.get(name, int)) for name, value in options.items()) and (
        isinstance(layers, str) or all(isinstance(layer, int) for layer in layers)
    )


def _is_typed(programme: Programme, call: Call) -> bool:
    """Whether all arguments are of the types that they should be."""
    given = [getattr(call, slot) for slot in NUMBERS.get(call.name, "")]
    if call.name in LISTS:
        given += call.a if isinstance(call.a, list) else [None]
    return all(isinstance(value, int) for value in given)


def bookkeeping(caches: Iterable[PromptCache]) -> list[Any]:
    """What is known of each conversation, but not how much room is allocated."""
    found: list[Any] = []
    for cache in caches:
        rows = cache._rows
        conversation = rows.conversation
        if not conversation._release.alive:
            found.append(None)
            continue
        streams = [_stream(own, conversation.sequence) for own in conversation.pool.caches]
        found.append((streams, conversation.head.lead, conversation.limits, cache.position))
    return found


def _stream(cache: Any, sequence: int) -> Any:
    table = getattr(cache, "_table", None)
    return table[sequence] if table is not None else cache._streams.get(sequence)


OPTION = drawn("option", "the plug-in's options and calls", programmes, check_programme)

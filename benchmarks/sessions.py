"""Measures conversations with a shared prefix."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from benchmarks.measure import check_equal, once, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import Setting
from benchmarks.shape import arrays, attention, contiguous, fill, shape_of
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.sessions import SessionPool
from tests.plugin.tiny import tiny_llama

OWN, BRANCHES = 64, 8


def run(setting: Setting) -> Iterator[Row]:
    """8 conversations on one prefix, hits against LRUPromptCache, and a pool after long use."""
    model, _ = setting.load(setting.of("smollm2", "tiny"))
    prefix, rounds = setting.of(2048, 1024), setting.of(12, 4)
    yield _first_tokens(model, prefix)
    yield _hit(model, prefix, rounds)
    yield from _shared(model, prefix, rounds)
    yield _long_life(setting.of(1000, 200))


def _first_tokens(model: Any, prefix: int) -> Row:
    sessions = SessionPool(lambda: make_prompt_cache(model))
    text = [(7 * i + i * i) % 400 + 100 for i in range(prefix)]

    def first_token(branch: int) -> None:
        with sessions.open([*text, 5 + branch]) as session:
            mx.eval(model(mx.array([session.rest]), cache=session.cache)[:, -1])

    prefill, *others = [timed(lambda: first_token(branch)) for branch in range(BRANCHES)]  # noqa: B023
    return once(
        "sessions.first",
        f"first token of the 2nd to 8th on a prefix of {prefix:,}, the slowest",
        "ms",
        max(others),
        "the 1st",
        prefill,
    )


def _hit(model: Any, length: int, rounds: int) -> Row:
    """Measure a request that continues from the middle of a stored conversation."""
    shape = shape_of(model)
    stored, theirs = SessionPool(lambda: make_prompt_cache(model)), LRUPromptCache()
    texts = [[(7 * i + i * i + seed) % 400 + 100 for i in range(length)] for seed in range(4)]
    for seed, text in enumerate(texts):
        stored.store(text, fill(make_prompt_cache(model), length, seed, shape=shape))
        theirs.insert_cache("model", text, contiguous(length, seed, shape))
    request = [*texts[1][: length - 100], 5]

    def ours() -> mx.array:
        session = stored.open(request)
        logits: mx.array = model(mx.array([session.rest]), cache=session.cache)
        mx.eval(logits)
        session.cache.close()
        return logits

    def peer() -> mx.array:
        cache, rest = theirs.fetch_nearest_cache("model", request)
        logits: mx.array = model(mx.array([rest]), cache=cache)
        mx.eval(logits)
        return logits

    check_equal(ours(), peer())
    return speed(
        "sessions.hit",
        f"a request that begins as one of 4 stored conversations of {length:,}, and its first token",
        "ms",
        lambda: timed(ours),
        "LRUPromptCache",
        lambda: timed(peer),
        rounds,
    )


def _shared(model: Any, prefix: int, rounds: int) -> Iterator[Row]:
    shape = shape_of(model)
    origin = fill(make_prompt_cache(model), prefix, shape=shape)
    forks = [fill(origin.fork(), OWN, shape=shape) for _ in range(BRANCHES)]
    origin.close()
    batch, pool = (
        [layer.merge([fork[i] for fork in forks]) for i, layer in enumerate(forks[0])],
        forks[0].pool,
    )
    unshared = [contiguous(prefix + OWN, shape=shape) for _ in range(BRANCHES)]
    yield held(
        "sessions.bytes",
        f"K and V of {BRANCHES} on a prefix of {prefix:,} with {OWN} of their own",
        pool.nbytes,
        f"{BRANCHES} KVCaches",
        sum(layer.nbytes for cache in unshared for layer in cache),
    )
    together, alone = arrays(1, 9, BRANCHES, shape), arrays(1, 9, shape=shape)
    yield speed(
        "sessions.step",
        "a step of their caches and attention",
        "ms",
        lambda: timed(lambda: attention(batch, *together)),
        f"{BRANCHES} KVCaches",
        lambda: timed(lambda: [attention(cache, *alone) for cache in unshared]),
        rounds,
    )


def _long_life(changes: int) -> Row:
    """Measure a step in a pool after many forks, trims and refills, and in a new pool."""
    model, rng = tiny_llama(num_hidden_layers=8), random.Random(0)
    old = make_prompt_cache(model)
    _feed(model, old, 600)
    branches = [old]
    for _ in range(changes):
        branch = rng.choice(branches).fork()
        branch.rewind(rng.randrange(min(100, branch.position)))
        _feed(model, branch, rng.randrange(1, 120))
        branches = [*branches[-5:], branch]
    old, branches = branches[-1], []
    other = tiny_llama(num_hidden_layers=8)
    new = make_prompt_cache(other)
    _feed(other, new, old.position)
    for own, cache in ((model, old), (other, new)):
        for _ in range(300):
            _feed(own, cache, 1)
    return speed(
        "sessions.age",
        f"a step after {changes:,} forks, trims and refills",
        "ms",
        lambda: timed(lambda: _feed(model, old, 1)),
        "a new pool",
        lambda: timed(lambda: _feed(other, new, 1)),
        60,
    )


def _feed(model: Any, cache: Any, n: int) -> None:
    mx.eval(model(mx.zeros((1, n), mx.int32), cache=cache))

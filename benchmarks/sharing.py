"""What conversations with a common beginning share, and what a long life leaves behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import mlx.core as mx

from benchmarks.batches import DIM, KV_HEADS, LAYERS, attention, contiguous, fill, merged
from benchmarks.measure import paired, timed
from examples import smollm2
from mlx_kvcache.plugin import make_prompt_cache
from mlx_kvcache.sessions import SessionPool
from tests.plugin.tiny import tiny_llama

PREFIX, OWN, BRANCHES = 2048, 64, 8
ROUNDS = 20


def run() -> Iterator[str]:
    """8 conversations on a prefix of 2,048 tokens, and a pool that was used a thousand times."""
    model, _ = smollm2.load(mx.float32)
    yield from _first_tokens(model)
    yield from _prefix(model)
    yield from _long_life()


def _first_tokens(model) -> Iterator[str]:
    sessions = SessionPool(lambda: make_prompt_cache(model))
    text = [(7 * i + i * i) % 40000 + 100 for i in range(PREFIX)]

    def first_token(branch: int) -> None:
        with sessions.open([*text, 5 + branch]) as session:
            mx.eval(model(mx.array([session.rest]), cache=session.cache)[:, -1])

    prefill, *others = [timed(lambda: first_token(branch)) for branch in range(BRANCHES)]  # noqa: B023
    yield (
        f"to the first token after {PREFIX}: {prefill:.1f} s; the 2nd to 8th conversation at most "
        f"{1e3 * max(others):.0f} ms, 1/{prefill / max(others):.0f}"
    )


def _prefix(model) -> Iterator[str]:
    origin = make_prompt_cache(model)
    fill(origin, PREFIX, 0)
    forks = [origin.fork() for _ in range(BRANCHES)]
    origin.close()
    for fork in forks:
        fill(fork, OWN, 0)
    batch, pool = merged(forks), forks[0].pool
    one = LAYERS * KV_HEADS * DIM * 4 * 2 * (PREFIX + OWN)
    yield (
        f"{BRANCHES} on a prefix of {PREFIX}, {OWN} own: K and V {pool.nbytes / 1e6:.1f} MB, "
        f"{pool.nbytes / one:.2f} of one conversation's"
    )
    unshared = [contiguous(PREFIX + OWN) for _ in range(BRANCHES)]
    result = paired(
        lambda: timed(lambda: attention(batch)),
        lambda: timed(lambda: [attention(cache) for cache in unshared]),
        ROUNDS,
        "prefix",
    )
    yield (
        f"  a step: {1e3 * result.ours:.1f} ms, with {BRANCHES} unshared KVCaches "
        f"{1e3 * result.theirs:.1f} ms, ratio {result}"
    )


def _long_life() -> Iterator[str]:
    """The same conversation in a pool that was forked, trimmed and refilled, and in a new one."""
    model, rng = tiny_llama(num_hidden_layers=8), random.Random(0)
    old = make_prompt_cache(model)
    _feed(model, old, 600)
    branches = [old]
    for _ in range(1000):
        branch = rng.choice(branches).fork()
        branch.rewind(rng.randrange(min(100, branch.position)))
        _feed(model, branch, rng.randrange(1, 120))
        branches = [*branches[-5:], branch]
    old, branches = branches[-1], []
    new = make_prompt_cache(tiny_llama(num_hidden_layers=8))
    _feed(new.pool.model, new, old.position)
    for cache in (old, new):
        for _ in range(300):
            _feed(cache.pool.model, cache, 1)
    result = paired(
        lambda: timed(lambda: _feed(model, old, 1)), lambda: timed(lambda: _feed(new.pool.model, new, 1)), 100
    )
    yield f"a step after 1,000 forks, trims and refills, beside a new pool's: ratio {result}"


def _feed(model, cache, n: int) -> None:
    mx.eval(model(mx.zeros((1, n), mx.int32), cache=cache))

"""Prompt caches of one pool in several threads, each with a stream of its own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import trim_prompt_cache

from mlx_kvcache import NotSupportedError
from mlx_kvcache.plugin import Many, PromptCache, make_prompt_cache
from mlx_kvcache.sessions import SessionPool
from tests.plugin.configurations import build
from tests.plugin.tiny import tiny_llama

TEXT = [(5 * i + 3 * i * i) % 90 for i in range(200)]
MODEL = tiny_llama()
KINDS = ["llama", "gemma3_text", "llama4", "qwen3_next", "deepseek_v3", "mamba2"]

Call = Callable[[nn.Module, PromptCache, Path], PromptCache]


def in_thread(act: Callable[[], Any]) -> Any:
    """What it returns, called in a thread that ends."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(act).result()


def feed(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    """The model's call, whose result nobody computes."""
    model(mx.array([TEXT[:9]]), cache=cache)
    return cache


def generate(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    assert (
        len([t for t, _ in generate_step(mx.array(TEXT[:3]), model, prompt_cache=cache, max_tokens=4)]) == 4
    )
    return cache


def remove(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    try:
        cache.remove(min(2, cache.position), min(5, cache.position))
    except NotSupportedError:
        cache.rewind_to(cache.resume_point(3))
    return cache


def rewind(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    cache.rewind_to(cache.resume_point(max(0, cache.position - 2)))
    return cache


def fork(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    return cache.fork()


def join(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    """Two rows of a batch, of which one is taken out again."""
    other = make_prompt_cache(model)
    model(mx.array([TEXT[:4]]), cache=other)
    batch = [own.merge([own, more]) for own, more in zip(cache, other, strict=True)]
    model(mx.array([[1], [2]]), cache=batch)
    return PromptCache(batch[0].extract(0).rows)


def save(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    cache.save(path / "cache.safetensors")
    return PromptCache.load(path / "cache.safetensors", model)


def load_lazily(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    cache.save(path / "cache.safetensors")
    return PromptCache.load(path / "cache.safetensors", model, verify=False)


def many(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    running = Many(model)
    running.add(TEXT[:3], cache=cache, max_tokens=3)
    while len(running):
        running.step()
    return cache


def state(model: nn.Module, cache: PromptCache, path: Path) -> PromptCache:
    mx.eval([entry.state for entry in cache])
    trim_prompt_cache(list(cache), 0)
    return cache


CALLS: list[Call] = [feed, generate, remove, rewind, fork, join, save, load_lazily, many, state]


def circuit(calls: list[Call]) -> list[Call]:
    """A walk in which each call comes right after every other one, once."""
    left = {call: [other for other in calls if other is not call] for call in calls}
    walk, found = [calls[0]], list[Call]()
    while walk:
        others = left[walk[-1]]
        if others:
            walk.append(others.pop())
        else:
            found.append(walk.pop())
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_call_after_every_other_in_another_thread(name: str, tmp_path: Path) -> None:
    """What one thread leaves to be computed, another can use: all pairs of calls on one kind, else half."""
    model = build(name)
    cache = feed(model, make_prompt_cache(model), tmp_path)
    calls = circuit(CALLS)
    pairs = len(CALLS) * (len(CALLS) - 1)
    assert len(set(pairwise(calls))) == pairs == len(calls) - 1
    if name != "llama":
        begin = random.Random(name).randrange(pairs // 2)
        calls = calls[begin : begin + pairs // 2]
    for call in [*calls, generate]:
        cache = in_thread(partial(call, model, cache, tmp_path))


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_sessions_in_other_threads(name: str) -> None:
    model = build(name)
    pool = SessionPool(lambda: make_prompt_cache(model, capacity=64), max_stored=2)

    def turn(tokens: list[int]) -> None:
        with pool.open(tokens) as session:
            model(mx.array([session.rest]), cache=session.cache)
            if name == "llama" and len(tokens) > 26:
                session.shift(keep=2, room=40)
                session.remove(1, 3, salt="shorter")

    for length in (20, 30, 25, 31, 8, 30):
        in_thread(partial(turn, TEXT[:length]))
    assert pool.counts.hits


def work(model: nn.Module, shared: PromptCache, seed: int, tokens: int, path: Path) -> list[int]:
    """Generates greedily, with forks, removals, saves and closes of other caches between."""
    rng = random.Random(seed)
    with mx.stream(mx.new_stream(mx.default_device())):
        own, found = shared.fork(), list[int]()
        token = seed + 1
        while len(found) < tokens:
            logits = model(mx.array([[token]]), cache=own)
            token = int(mx.argmax(logits[0, -1]))
            found.append(token)
            if rng.random() < 0.1:
                aside = own.fork()
                what = rng.randrange(4)
                if what == 0:
                    aside.remove(1, 4)
                elif what == 1:
                    aside.save(path / f"{seed}.safetensors")
                    aside = PromptCache.load(path / f"{seed}.safetensors", model)
                elif what == 2:
                    aside.rewind(3)
                # Not computed here, and closed or dropped with that.
                model(mx.array([[7, 8]]), cache=aside)
                if rng.random() < 0.5:
                    aside.close()
    return found


def run_threads(model: nn.Module, threads: int, tokens: int, path: Path) -> list[list[int]]:
    shared = make_prompt_cache(model, overflow="shift", capacity=512)
    mx.eval(model(mx.array([TEXT[:50]]), cache=shared))
    with ThreadPoolExecutor(threads) as pool:
        runs = [pool.submit(work, model, shared, seed, tokens, path) for seed in range(threads)]
        return [run.result() for run in runs]


@pytest.mark.parametrize("run", range(int(os.environ.get("THREADS_RUNS", "1"))))
def test_threads_generate_what_one_does(run: int, tmp_path: Path) -> None:
    threads, tokens = int(os.environ.get("THREADS", "4")), int(os.environ.get("THREADS_TOKENS", "60"))
    found = run_threads(MODEL, threads, tokens, tmp_path)
    assert found == [alone(seed, tokens) for seed in range(threads)]


@lru_cache
def alone(seed: int, tokens: int) -> list[int]:
    """What one thread generates with nothing beside it."""
    own = make_prompt_cache(MODEL, overflow="shift", capacity=512)
    mx.eval(MODEL(mx.array([TEXT[:50]]), cache=own))
    found, token = list[int](), seed + 1
    while len(found) < tokens:
        token = int(mx.argmax(MODEL(mx.array([[token]]), cache=own)[0, -1]))
        found.append(token)
    return found


def test_a_thread_that_ended_does_not_make_a_pool_shared() -> None:
    """Only threads at the same time need to wait for each other."""
    model = tiny_llama()
    cache = in_thread(lambda: feed(model, make_prompt_cache(model), Path()))
    feed(model, cache, Path())
    assert not cache.pool.is_shared
    other = Thread(target=feed, args=(model, cache.fork(), Path()))
    other.start()
    other.join()
    assert cache.pool.is_shared

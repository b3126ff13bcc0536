"""Threads that share a model: nobody waits in a circle, and nobody changes what another is at."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import mlx.core as mx
import mlx.nn as nn

from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_llama

TOKENS = [(7 * i) % 90 for i in range(12)]


def test_threads_that_make_caches_and_threads_that_call_do_not_wait_for_each_other_in_a_circle() -> None:
    """Batches find out how the model takes them while its pool is locked, and caches before they have one."""
    built = [tiny_llama() for _ in range(3)]
    ready = threading.Barrier(4)

    def work(start: int) -> list[int]:
        ready.wait()
        positions = []
        for i in range(6):
            model = built[(start + i) % len(built)]
            caches = [make_prompt_cache(model), make_prompt_cache(model)]
            shifting = make_prompt_cache(model, capacity=9 + i, overflow="shift")
            for cache in (*caches, shifting):
                logits_of(model, cache, TOKENS[:7])
            batch = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
            mx.eval(model(mx.array([[1], [2]]), cache=batch))
            positions.append(batch[0].size())
        return positions

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [[8] * 6] * 4


class Waiting(nn.Module):
    """A part of a model that waits for a signal once a call has come so far."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part, self.is_inside, self.may_go_on = part, threading.Event(), threading.Event()

    def __call__(self, x: mx.array) -> mx.array:
        self.is_inside.set()
        self.may_go_on.wait()
        output: mx.array = self.part(x)
        return output


def test_a_cache_that_moves_to_fewer_bits_waits_for_a_forward_there() -> None:
    """The pool in fewer bits is another one, with a lock of its own."""
    model = tiny_llama(hidden_size=128)
    there = make_prompt_cache(model, kv_bits=8, kv_group_size=32)
    moving = make_prompt_cache(model)
    for cache in (there, moving):
        logits_of(model, cache, TOKENS[:5])
    expected = logits_of(model, there.fork(), [7])
    layer = model.layers[1]
    layer.mlp = waiting = Waiting(layer.mlp)
    with ThreadPoolExecutor(2) as threads:
        found = threads.submit(logits_of, model, there, [7])
        waiting.is_inside.wait()
        moved = threads.submit(moving[0].to_quantized, 32, 8)
        # Long enough to get to where it waits; what follows holds wherever it is.
        wait([moved], timeout=1)
        waiting.may_go_on.set()
        assert mx.array_equal(found.result(), expected)
        moved.result()
    assert (there.position, moving.position) == (6, 5)
    assert moving.pool is there.pool

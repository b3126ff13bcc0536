"""Prompts that arrive over time, beside mlx-lm's BatchGenerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from examples import smollm2
from mlx_kvcache.plugin import Many

LENGTHS = (32, 64, 128, 256, 512, 48, 96, 192, 384, 40, 80, 160, 320, 56, 112, 224)
"""Tokens of the 16 prompts."""
EVERY, GENERATED = 4, 24
"""Steps between arrivals, and tokens for each."""
LONG, RUNNING = 512, 4
"""A prompt that joins, and how many sequences it must not hold up."""


def run() -> Iterator[str]:
    """16 prompts of 32 to 512 tokens that arrive over time, and the stall when one of 512 joins."""
    model, _ = smollm2.load(mx.float32)
    prompts = [[(7 * i + 13 * j) % 4000 + 100 for j in range(n)] for i, n in enumerate(LENGTHS)]
    for name, make in (("warm-up", _ours), ("here", _ours), ("BatchGenerator", _theirs)):
        seconds, tokens = _throughput(make(model), prompts if name != "warm-up" else prompts[:1])
        if name != "warm-up":
            rate = tokens / seconds
            yield f"{name}: {seconds:.1f} s, {rate:.1f} new tokens/s beside {sum(LENGTHS)} of prompts"
    for name, make in (("here", _ours), ("BatchGenerator", _theirs)):
        yield f"longest stall while {LONG} tokens join, {name}: {1e3 * _stall(make(model)):.0f} ms"


Loop = tuple[Callable[[list[int], int], object], Callable[[], int]]
"""Adding a prompt, and a step that returns how many tokens it gave."""


def _ours(model) -> Loop:
    many = Many(model)
    return (
        lambda prompt, n: many.add(prompt, n),
        lambda: sum(result.token is not None for result in many.step()),
    )


def _theirs(model) -> Loop:
    generator = BatchGenerator(model)
    return lambda prompt, n: generator.insert([prompt], [n]), lambda: len(generator.next()[1])


def _throughput(loop: Loop, prompts: list[list[int]]) -> tuple[float, int]:
    add, step = loop
    waiting, tokens, steps = list(prompts), 0, 0
    start = time.perf_counter()
    while waiting or tokens < GENERATED * len(prompts):
        if waiting and steps % EVERY == 0:
            add(waiting.pop(0), GENERATED)
        tokens += step()
        steps += 1
    return time.perf_counter() - start, tokens


def _stall(loop: Loop) -> float:
    """The longest time between two tokens of running sequences while a long prompt joins."""
    add, step = loop
    for row in range(RUNNING):
        add([100 + row] * 8, 200)
    while step() < RUNNING:
        pass
    for _ in range(3):
        step()
    add([7 + i % 90 for i in range(LONG)], 200)
    longest, last, given = 0.0, time.perf_counter(), RUNNING
    while given < RUNNING + 1:
        given = step()
        now = time.perf_counter()
        if given:
            longest, last = max(longest, now - last), now
    return longest

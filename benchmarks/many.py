"""Measures continuous batching of prompts that arrive over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.generate import BatchGenerator

from benchmarks.measure import once
from benchmarks.rows import Row
from benchmarks.setting import Setting
from mlx_kvcache.plugin import Many

LENGTHS = (32, 64, 128, 256, 512, 48, 96, 192, 384, 40, 80, 160, 320, 56, 112, 224)
"""Lengths of the 16 prompts, in tokens."""
EVERY = 4
"""Steps between arrivals."""
LONG, RUNNING = 512, 4
"""The length of the prompt that joins, in tokens, and the number of running sequences."""


def run(setting: Setting) -> Iterator[Row]:
    """16 prompts of 32 to 512 tokens that arrive over time, and the stall when one of 512 joins."""
    model, _ = setting.load(setting.of("smollm2", "tiny"))
    lengths, new = setting.of(LENGTHS, LENGTHS[:8]), setting.of(24, 12)
    prompts = [[(7 * i + 13 * j) % 400 + 100 for j in range(n)] for i, n in enumerate(lengths)]
    for make in (_ours, _theirs):
        _throughput(make(model), prompts[:1], new)
    yield once(
        "many.throughput",
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} that arrive in turn, {new} tokens each",
        "s",
        _throughput(_ours(model), prompts, new),
        "BatchGenerator",
        _throughput(_theirs(model), prompts, new),
    )
    yield once(
        "many.stall",
        f"longest stall of {RUNNING} sequences while {LONG} tokens join",
        "ms",
        _stall(_ours(model)),
        "BatchGenerator",
        _stall(_theirs(model)),
    )


Loop = tuple[Callable[[list[int], int], object], Callable[[], int]]
"""A function that adds a prompt, and a step that returns the number of generated tokens."""


def _ours(model: Any) -> Loop:
    many = Many(model)
    return (
        lambda prompt, n: many.add(prompt, n),
        lambda: sum(result.token is not None for result in many.step()),
    )


def _theirs(model: Any) -> Loop:
    generator = BatchGenerator(model)
    return lambda prompt, n: generator.insert([prompt], [n]), lambda: len(generator.next()[1])


def _throughput(loop: Loop, prompts: list[list[int]], new: int) -> float:
    add, step = loop
    waiting, tokens, steps = list(prompts), 0, 0
    start = time.perf_counter()
    while waiting or tokens < new * len(prompts):
        if waiting and steps % EVERY == 0:
            add(waiting.pop(0), new)
        tokens += step()
        steps += 1
    return time.perf_counter() - start


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

"""Measures continuous batching of prompts that arrive over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mlx_lm.generate import BatchGenerator

from benchmarks.measure import once, speed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from mlx_kvcache.plugin import Many

LENGTHS = (32, 64, 128, 256, 512, 48, 96, 192, 384, 40, 80, 160, 320, 56, 112, 224)
"""Lengths of the 16 prompts, in tokens."""
EVERY = 4
"""Steps between arrivals."""
TOGETHER = 8
"""Sequences that generate together."""
LONG, RUNNING = 512, 4
"""The length of the prompt that joins, in tokens, and the number of running sequences."""

LINE = "There are 64 squares on a chess board, and every second one is black.\n"
"""A line that is repeated, so that the model repeats it, too."""
DRAFTED = 8
"""The maximum number of tokens in a draft."""


def run(setting: Setting) -> Iterator[Row]:
    """Prompts that arrive over time, replies side by side, the stall when a long prompt joins, and drafts."""
    model, tokenizer = setting.load(setting.of("smollm2", "tiny"))
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
    new = setting.of(48, 12)
    yield speed(
        "many.decode",
        f"a step of {TOGETHER} sequences of {lengths[0]} to {lengths[0] + new} tokens",
        "ms",
        lambda: _decoding(_ours(model), prompts[0], new),
        "BatchGenerator",
        lambda: _decoding(_theirs(model), prompts[0], new),
        setting.of(7, 1),
        per=new - 1,
    )
    yield once(
        "many.stall",
        f"longest stall of {RUNNING} sequences while {LONG} tokens join",
        "ms",
        _stall(_ours(model)),
        "BatchGenerator",
        _stall(_theirs(model)),
    )
    prompt = tokenizer.encode(LINE * 4) if tokenizer else [*range(100, 118)] * 4
    new = setting.of(128, 32)
    yield speed(
        "many.drafts",
        f"greedy text that repeats itself, {new} tokens, draft_tokens={DRAFTED}",
        "ms",
        lambda: _throughput(_ours(model, DRAFTED), [prompt], new),
        "draft_tokens=0",
        lambda: _throughput(_ours(model), [prompt], new),
        setting.of(5, 1),
        per=new,
    )


Loop = tuple[Callable[[list[int], int], object], Callable[[], int]]
"""A function that adds a prompt, and a step that returns the number of generated tokens."""


def _ours(model: Any, draft_tokens: int = 0) -> Loop:
    many = Many(model, draft_tokens=draft_tokens)
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


def _decoding(loop: Loop, prompt: list[int], new: int) -> float:
    """The time of all tokens but the first of some sequences that generate together."""
    add, step = loop
    for _ in range(TOGETHER):
        add(prompt, new)
    tokens = 0
    while tokens < TOGETHER:
        tokens += step()
    start = time.perf_counter()
    while tokens < TOGETHER * new:
        tokens += step()
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

"""Measures forks of a conversation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import peak_of, speed, timed
from benchmarks.rows import Row, held
from benchmarks.setting import Setting
from benchmarks.shape import SMOLLM2, arrays, contiguous, evaluate, fill
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.tiny import tiny_llama

LAYERS = 8


def run(setting: Setting) -> Iterator[Row]:
    """1 to 64 forks of a 4,096-token prompt, and one token in each layer of each, against deepcopy."""
    prompt = setting.of(4096, 1024)
    ours = fill(make_prompt_cache(tiny_llama(num_hidden_layers=LAYERS)), prompt)
    theirs = contiguous(prompt, shape=SMOLLM2._replace(layers=LAYERS))
    for branches in setting.of((1, 4, 16, 64), (1, 16)):
        work = f"{branches} fork{'s' * (branches > 1)} of {prompt:,} tokens, and a token in each"
        yield speed(
            f"forks.{branches}",
            work,
            "ms",
            lambda: timed(lambda: _forked(ours, branches)),  # noqa: B023
            "deepcopy of KVCache",
            lambda: timed(lambda: _copied(theirs, branches)),  # noqa: B023
            setting.of(6, 3),
        )
        yield held(
            f"forks.{branches}.bytes",
            f"bytes that {branches} fork{'s' * (branches > 1)} add",
            peak_of(lambda: _forked(ours, branches)),  # noqa: B023
            "deepcopy of KVCache",
            peak_of(lambda: _copied(theirs, branches)),  # noqa: B023
        )


def _forked(cache: Any, branches: int) -> None:
    forks = [cache.fork() for _ in range(branches)]
    _write(forks)
    for fork in forks:
        fork.close()
    # Reading nbytes frees the cells of closed caches.
    assert cache.pool.nbytes


def _copied(cache: Any, branches: int) -> None:
    _write([copy.deepcopy(cache) for _ in range(branches)])


def _write(branches: list[Any]) -> None:
    _, keys, values = arrays(1)
    for branch in branches:
        branch[0].make_mask(1, return_array=False, window_size=None)
        for layer in branch:
            layer.update_and_fetch(keys, values)
    evaluate([layer for branch in branches for layer in branch])

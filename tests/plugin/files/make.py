"""Writes the prompt cache files of other versions of mlx-lm that tests read.

Run in an environment with that version: python -m tests.plugin.files.make VERSION
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

FOLDER = Path(__file__).parent
HEADS, DIM = 1, 32


def coded(begin: int, end: int) -> mx.array:
    """Tokens that are their position."""
    column = mx.arange(begin, end, dtype=mx.float16)[None, None, :, None]
    return mx.broadcast_to(column, (1, HEADS, end - begin, DIM))


def fed(cache: Any, blocks: list[int]) -> Any:
    """A cache of keys and values that are positions."""
    begin = 0
    for n in blocks:
        cache.update_and_fetch(coded(begin, begin + n), -coded(begin, begin + n))
        begin += n
    return cache


def caches() -> list[Any]:
    """One of each class, after 20 tokens; windows in a block, in order, and as a ring."""
    arrays = mlx_lm_cache.ArraysCache(2)
    arrays[0], arrays[1] = mx.full((1, 3), 7.0), mx.full((1, 4, 2), 9.0)
    single = [1] * 20
    return [
        fed(mlx_lm_cache.KVCache(), [20]),
        fed(mlx_lm_cache.RotatingKVCache(8), single),
        fed(mlx_lm_cache.RotatingKVCache(8, keep=2), single),
        fed(mlx_lm_cache.RotatingKVCache(8, keep=2), [13, 7]),
        fed(mlx_lm_cache.RotatingKVCache(64), [20]),
        fed(mlx_lm_cache.ChunkedKVCache(64), [20]),
        fed(mlx_lm_cache.QuantizedKVCache(group_size=32, bits=8), [20]),
        mlx_lm_cache.CacheList(fed(mlx_lm_cache.KVCache(), [20]), arrays),
        arrays,
    ]


def path_of(version: str, what: str) -> Path:
    return FOLDER / f"mlx_lm_{version.replace('.', '_')}_{what}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.plugin.files.make", description=__doc__)
    parser.add_argument("version", help="of the mlx-lm that is installed")
    version, every = parser.parse_args().version, caches()
    for what, some in (("every", every), ("three", [every[0], every[2], every[0]])):
        mlx_lm_cache.save_prompt_cache(str(path_of(version, what)), some, {"model": "none"})


if __name__ == "__main__":
    main()

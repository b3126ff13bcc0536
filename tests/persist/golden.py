"""A file of every release's format, which later releases must read.

`python -m tests.persist.golden` writes the one of the present version, once, when the version is new.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_kvcache import Batch, CausalCache, Quantization, RecurrentCache, SlidingWindowCache, WrapperCache
from mlx_kvcache.persist import save
from mlx_kvcache.persist.header import VERSION

FOLDER = Path(__file__).with_name("files")
TOKENS = range(7, 47)
MODEL = {"configuration": "1234"}


def place(version: str) -> Path:
    return FOLDER / f"version_{version}.safetensors"


def empty() -> WrapperCache:
    """A window with sinks, full attention of which the end is packed, and a recurrence."""
    cache = WrapperCache(SlidingWindowCache(8, sinks=2), CausalCache(), RecurrentCache(interval=16))
    cache.init(mx.float16, capacity=64, quantization=Quantization((8, None), group_size=32, after=32))
    return cache


def feed(cache: WrapperCache, n: int, sequence: int = 0) -> list[mx.array]:
    """The next n tokens, coded by their positions; what each layer that holds K and V returns of its last."""
    begin, found = cache.end(sequence), []
    column = mx.arange(begin, begin + n, dtype=mx.float16)[None, None, :, None] / 64
    keys, values = (mx.broadcast_to(part, (1, 2, n, 32)) for part in (column, -column))
    with cache.forward(Batch.run(sequence, begin, n)):
        for layer_type in (0, 1):
            cache.set_layer_type(layer_type)
            for layer in range(2):
                cache.layer(layer).put(keys, values)
                found += cache.layer(layer).get()[:2]
        cache.set_layer_type(2)
        cache.layer(0).put(mx.full((3,), begin + n, mx.float16), None)
    return found


def filled() -> WrapperCache:
    """40 tokens: the window has slid, 32 are in float and 8 packed, the recurrence has checkpoints."""
    cache = empty()
    for n in (16, 16, 8):
        feed(cache, n)
    return cache


def write(path: Path) -> None:
    save(path, filled(), 0, TOKENS, MODEL)


if __name__ == "__main__":
    description = f"Writes the file of version {VERSION}, unless there is one."
    argparse.ArgumentParser(prog="python -m tests.persist.golden", description=description).parse_args()
    assert not place(VERSION).exists(), "what has been written once stays as it is"
    write(place(VERSION))

"""Caches of every kind with something in them, and their files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_kvcache import Batch, EncoderCache, Quantization, RecurrentCache, WrapperCache
from mlx_kvcache.caches.base import PlanningCache
from mlx_kvcache.persist import save
from mlx_kvcache.persist.container import Stored, read_arrays, read_contents
from tests.kinds import KINDS, STORES, Kind, add_offsets

from .bounds import folder

DIMS = (32, 64)
LAYERS = 2


class Sample(NamedTuple):
    """A saved sequence of 9 tokens.

    Attributes:
        make: an empty cache that takes it.
        raw: its file.
        header, arrays: what is in that.
    """

    make: Callable[[], PlanningCache]
    raw: bytes
    header: dict[str, Any]
    arrays: dict[str, Stored]


def feed(cache: Any, n: int, sequence: int = 0) -> None:
    """The next n tokens, in all layers of all children."""
    with cache.forward(Batch.run(sequence, cache.end(sequence), n)):
        children = getattr(cache, "_children", [cache])
        for index, child in enumerate(children):
            if len(children) > 1:
                cache.set_layer_type(index)
            for layer in range(LAYERS):
                if isinstance(child, RecurrentCache):
                    cache.layer(layer).put(mx.full((1, 3), float(n)), None if layer else mx.ones((2,)))
                else:
                    k, v = (mx.full((1, 1, n, dim), float(n)) for dim in DIMS)
                    cache.layer(layer).put(k, v)
                    mx.eval(cache.layer(layer).get()[:2])


def _made(kind: Kind, quantization: Quantization | None) -> PlanningCache:
    cache = kind.make(add_offsets)
    cache.init(mx.float32, capacity=80, max_batch=32, quantization=quantization)
    return cache


def _streams() -> PlanningCache:
    cache = WrapperCache(EncoderCache(), RecurrentCache(interval=2, max_checkpoints=3))
    cache.init(mx.float32)
    return cache


@cache
def samples() -> dict[str, Sample]:
    """Of every kind in float, and of some in fewer bits."""
    packed = STORES["4 and 6 bits of all but 5 tokens"]
    makes: dict[str, Callable[[], PlanningCache]] = {str(kind): partial(_made, kind, None) for kind in KINDS}
    makes |= {f"{kind} packed": partial(_made, kind, packed) for kind in (KINDS[0], KINDS[3], KINDS[-1])}
    makes["encoder+recurrent"] = _streams
    return {name: _sample(make) for name, make in makes.items()}


def _sample(make: Callable[[], PlanningCache]) -> Sample:
    cache = make()
    for n in (4, 4, 1):
        feed(cache, n)
    path = folder() / "sample.safetensors"
    save(path, cache, 0, range(9), {"configuration": "0"})
    contents = read_contents(path)
    return Sample(make, path.read_bytes(), contents.header, dict(read_arrays(contents)))

"""Every kind of cache that holds K and V by position, as the oracle knows it. A new kind is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvcache import CausalCache
from mlx_kvcache.caches.chunked import ChunkedAttentionCache
from mlx_kvcache.caches.positional import PositionalCache, Shift
from mlx_kvcache.caches.sliding import SlidingWindowCache
from mlx_kvcache.cells.rules import Causal, Chunk, Rule, Window


@dataclass(frozen=True)
class Kind:
    name: str
    make: Callable[[Shift | None], PositionalCache]
    rule: Rule
    rewind: int = 0

    def __str__(self) -> str:
        return self.name


def add_offsets(layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
    """A shift hook for keys that are positions."""
    return keys + offsets[None, None, :, None].astype(keys.dtype)


def _window(size: int, rewind: int, sinks: int = 0) -> Kind:
    return Kind(
        f"window{size}r{rewind}s{sinks}",
        lambda shift: SlidingWindowCache(size, rewind, sinks, shift),
        Window(size, sinks),
        rewind,
    )


def _chunk(size: int, rewind: int) -> Kind:
    return Kind(
        f"chunk{size}r{rewind}", lambda shift: ChunkedAttentionCache(size, rewind, shift), Chunk(size), rewind
    )


KINDS = [
    Kind("causal", CausalCache, Causal()),
    _window(1, 0),
    _window(4, 1),
    _window(5, 3, sinks=2),
    _window(8, 0, sinks=1),
    _chunk(1, 1),
    _chunk(4, 0),
    _chunk(6, 3),
]

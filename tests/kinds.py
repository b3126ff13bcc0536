"""The kinds of cache and the quantizations that the tests run on.

`KINDS` lists the caches that hold keys and values by position, alone and wrapped. To test a new kind, add
an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_kvcache import CausalCache, ChunkedAttentionCache, Quantization, SlidingWindowCache, WrapperCache
from mlx_kvcache.caches.base import PlanningCache
from mlx_kvcache.caches.causal import Shift
from mlx_kvcache.cells.visibility import Causal, Chunk, Rule, Window

STORES: dict[str, Quantization | None] = {
    "float": None,
    "8 bits": Quantization(8, group_size=32),
    "4 and 6 bits of all but 5 tokens": Quantization((4, 6), group_size=32, after=5),
    "2 bits of the keys of one layer": Quantization(
        lambda layer: (2, None) if layer else None, group_size=32
    ),
}
"""The quantizations to test. Add an entry for a new one."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        name: its name in test ids.
        make: makes a cache, given its shift hook.
        children: the (rule, rewind) of each child of a wrapper, or of the cache itself.
    """

    name: str
    make: Callable[[Shift | None], PlanningCache]
    children: tuple[tuple[Rule, int], ...]

    @property
    def rule(self) -> Rule:
        return self.children[0][0]

    def __str__(self) -> str:
        return self.name


def add_offsets(layer: int, keys: mx.array, offsets: mx.array) -> mx.array:
    """A shift hook for tests whose keys are their positions."""
    return keys + offsets[None, None, :, None].astype(keys.dtype)


def _window(size: int, rewind: int, sinks: int = 0) -> Kind:
    return Kind(
        f"window{size}r{rewind}s{sinks}",
        lambda shift: SlidingWindowCache(size, rewind, sinks, shift),
        ((Window(size, sinks), rewind),),
    )


def _chunk(size: int, rewind: int) -> Kind:
    return Kind(
        f"chunk{size}r{rewind}",
        lambda shift: ChunkedAttentionCache(size, rewind, shift),
        ((Chunk(size), rewind),),
    )


def _wrapped(*kinds: Kind) -> Kind:
    return Kind(
        "+".join(map(str, kinds)),
        lambda shift: WrapperCache(*(kind.make(shift) for kind in kinds)),
        tuple(child for kind in kinds for child in kind.children),
    )


CAUSAL = Kind("causal", CausalCache, ((Causal(), 0),))

SINGLE_KINDS = [
    CAUSAL,
    _window(1, 0),
    _window(4, 1),
    _window(5, 3, sinks=2),
    _window(8, 0, sinks=1),
    _chunk(1, 1),
    _chunk(4, 0),
    _chunk(6, 3),
]

KINDS = [
    *SINGLE_KINDS,
    _wrapped(_window(4, 2), CAUSAL),
    _wrapped(_chunk(6, 3), _window(3, 3), CAUSAL, _window(6, 2, sinks=2)),
]

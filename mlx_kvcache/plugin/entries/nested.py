"""Makes the entries of a cache list, among them `CacheList` for entries of several layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.nn as nn

from ..forward.batch_rows import Rows
from ..hosts.layout import Entry, Leaf
from ..hosts.mixers import Place
from ..hosts.observe import Call, Observable
from .arrays import ArraysCache
from .base import check_ours
from .keyvalue import layer_of


class CacheList(Observable):
    """Several layers as one entry of a model's cache list. Methods are those of `Layer`, for all layers."""

    caches: tuple[Any, ...] = ()

    def __init__(self, *caches: Any) -> None:
        self.caches = caches
        self.rows: Rows = caches[0].rows

    def served_by(self, rows: Rows) -> CacheList:
        """The same entry for other rows."""
        return type(self)(*(cache.served_by(rows) for cache in self.caches))

    def recurrent_places(self) -> Sequence[Place]:
        size = len(self.caches)
        return [
            place._replace(child=index, size=size)
            for index, cache in enumerate(self.caches)
            for place in cache.recurrent_places()
        ]

    def called_by(
        self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        for cache in self.caches:
            if isinstance(cache, ArraysCache):
                call = functools.partial(_called_by, cache, module, call)
        return call(*args, **kwargs)

    def __getitem__(self, idx: int) -> Any:
        return self.caches[idx]

    @property
    def offset(self) -> Any:
        """The RoPE offset of the next token."""
        return self.caches[0].offset

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> CacheList:
        """Quantize the attention layers; see `KeyValueLayer.to_quantized`."""
        return type(self)(
            *(
                cache.to_quantized(group_size, bits) if hasattr(cache, "to_quantized") else cache
                for cache in self.caches
            )
        )

    def is_trimmable(self) -> bool:
        return all(cache.is_trimmable() for cache in self.caches)

    def trim(self, n: int) -> int:
        """See `Layer.trim`."""
        dropped: list[int] = [cache.trim(n) for cache in self.caches]
        return max(dropped)

    def size(self) -> int:
        sizes: list[int] = [cache.size() for cache in self.caches]
        return max(sizes)

    def empty(self) -> bool:
        return all(cache.empty() for cache in self.caches)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def saved_state(self) -> Any:
        """The state in the form of mlx-lm 0.32's class of this name."""
        return [(cache.saved_state, type(cache).__name__) for cache in self.caches]

    @property
    def state(self) -> Any:
        """The state in the form of the host's class of this name."""
        return self.rows.pool.host.state(type(self).__name__, self.saved_state)

    def filter(self, batch_indices: Any) -> None:
        """See `Layer.filter`."""
        for cache in self.caches:
            cache.filter(batch_indices)

    def extend(self, other: CacheList) -> None:
        """See `Layer.extend`."""
        check_ours(other, CacheList)
        for cache, more in zip(self.caches, other.caches, strict=True):
            cache.extend(more)

    def extract(self, idx: int) -> CacheList:
        """See `Layer.extract`."""
        return type(self)(*(cache.extract(idx) for cache in self.caches))

    def prepare(self, **padding: Any) -> None:
        """See `Layer.prepare`."""
        for cache in self.caches:
            cache.prepare(**padding)

    def finalize(self) -> None:
        """See `Layer.finalize`."""
        for cache in self.caches:
            cache.finalize()

    def merge(self, caches: Sequence[CacheList]) -> CacheList:
        """See `Layer.merge`."""
        for cache in caches:
            check_ours(cache, CacheList)
        return type(self)(
            *(own.merge([other.caches[i] for other in caches]) for i, own in enumerate(self.caches))
        )

    def __repr__(self) -> str:
        return f"CacheList({', '.join(map(repr, self.caches))})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheList:
        return type(self)(*(cache.__deepcopy__(memo) for cache in self.caches))


def _called_by(cache: ArraysCache, module: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
    return cache.called_by(module, call, args, kwargs)


def entries_of(rows: Rows) -> list[Any]:
    """Make all entries of the model's cache list."""
    return [_entry(rows, entry) for entry in rows.pool.layout.entries]


def _entry(rows: Rows, entry: Entry) -> Any:
    if isinstance(entry, Leaf):
        return layer_of(rows, entry) if entry.rule else rows.pool.host.entry(ArraysCache)(rows, entry)
    return rows.pool.host.entry(CacheList)(*(_entry(rows, child) for child in entry))

"""K/V buffers: for each layer and segment one pair of arrays (1, n_kv_heads, cells, head_dim)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx

Rebase = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(layer, keys, values) -> keys and values at their new positions, of the same shapes."""

Index = tuple[slice, slice, slice]

Cells = tuple[int, int, Index]
"""Neighbouring cells: their segment, the cell after the last one, and how to index them."""

_TOKENS = (2,)


def cells_of(segment: int, low: int, high: int) -> Cells:
    """The cells [low, high) of a segment."""
    return segment, high, (slice(None), slice(None), slice(low, high))


class Form(NamedTuple):
    """What a layer's arrays look like; the first `put` decides it."""

    heads: int
    key_dim: int
    value_dim: int
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype

    @property
    def cell_bytes(self) -> int:
        keys, values = self.key_dim * self.key_dtype.size, self.value_dim * self.value_dtype.size
        return self.heads * (keys + values)

    def zeros(self, cells: int) -> Pair:
        return Pair(
            mx.zeros((1, self.heads, cells, self.key_dim), self.key_dtype),
            mx.zeros((1, self.heads, cells, self.value_dim), self.value_dtype),
        )


class Pair:
    """Keys and values of one segment in one layer. Copying one copies no array."""

    __slots__ = ("capacity", "keys", "values")

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.capacity = keys.shape[2]

    def write(self, start: mx.array, keys: mx.array, values: mx.array) -> None:
        """Put tokens at the cells from `start` (1,) on. In place when evaluated, if nobody holds a view."""
        self.keys = mx.slice_update(self.keys, keys, start, _TOKENS)
        self.values = mx.slice_update(self.values, values, start, _TOKENS)


class Buffers:
    """One layer's pairs, by segment."""

    __slots__ = ("form", "pairs")

    def __init__(self, form: Form) -> None:
        self.form = form
        self.pairs: dict[int, Pair] = {}

    def pair(self, segment: int, capacity: int) -> Pair:
        """The pair of a segment, created or grown with zeros to `capacity` cells."""
        pair = self.pairs.get(segment)
        if pair is None or pair.capacity < capacity:
            pair = self.pairs[segment] = self.sized(segment, capacity)
        return pair

    def read(self, cells: Iterable[Cells]) -> list[tuple[mx.array, mx.array]]:
        """Views of ranges of cells. Those that the layer has not written are zeros."""
        views = []
        for segment, high, index in cells:
            pair = self.pairs.get(segment)
            if pair is None or pair.capacity < high:
                pair = self.sized(segment, high)
            views.append((pair.keys[index], pair.values[index]))
        return views

    def sized(self, segment: int, capacity: int) -> Pair:
        """A copy of the pair for a segment, with zeros up to `capacity` cells at least."""
        pair = self.pairs.get(segment)
        if pair is None:
            return self.form.zeros(capacity)
        if pair.capacity >= capacity:
            return Pair(pair.keys, pair.values)
        return self.joined([(pair.keys, pair.values)], capacity)

    def joined(self, parts: list[tuple[mx.array, mx.array]], capacity: int) -> Pair:
        """A new pair of these K and V one after the other, and zeros."""
        size = sum(keys.shape[2] for keys, _ in parts)
        if size < capacity:
            unused = self.form.zeros(capacity - size)
            parts = [*parts, (unused.keys, unused.values)]
        return Pair(*concatenated(parts))


Staged = dict[int, dict[int, Pair]]
"""New pairs by layer and segment, not yet adopted."""


class DenseStore:
    """Buffers in the dtype they are used in.

    Args:
        dtype: of what is stored; None keeps that of each layer's first K and V.
    """

    def __init__(self, dtype: mx.Dtype | None) -> None:
        self._dtype = dtype
        self.layers: dict[int, Buffers] = {}

    def form_for(self, keys: mx.array, values: mx.array) -> Form:
        """The form of a layer that begins with these. Raises ValueError unless they have four axes."""
        if keys.ndim != 4 or values.ndim != 4:
            raise ValueError(f"keys and values are {keys.shape} and {values.shape}, expected four axes")
        dtypes = self._dtype or keys.dtype, self._dtype or values.dtype
        return Form(keys.shape[1], keys.shape[-1], values.shape[-1], *dtypes)

    def open(self, layer: int, form: Form) -> Buffers:
        """Begin a layer. Layers of the same form share one object for it."""
        form = next((other.form for other in self.layers.values() if other.form == form), form)
        buffers = self.layers[layer] = Buffers(form)
        return buffers

    def stage_move(self, staged: Staged, segment: int, pieces: list[Cells], capacity: int) -> None:
        """Prepare a new segment that begins with copies of these cells."""
        for layer, buffers in self.layers.items():
            staged.setdefault(layer, {})[segment] = buffers.joined(buffers.read(pieces), capacity)

    def stage_rebase(
        self, staged: Staged, source: list[Cells], segment: int, cell: int, capacity: int, rebase: Rebase
    ) -> None:
        """Prepare `segment` with the source cells, re-based, from `cell` on."""
        start = mx.array([cell])
        for layer, buffers in self.layers.items():
            keys, values = rebase(layer, *concatenated(buffers.read(source)))
            pair = buffers.sized(segment, capacity)
            pair.write(start, keys, values)
            staged.setdefault(layer, {})[segment] = pair

    def adopt(self, staged: Staged) -> None:
        for layer, pairs in staged.items():
            self.layers[layer].pairs.update(pairs)

    def drop(self, segments: Iterable[int]) -> None:
        for segment in segments:
            for buffers in self.layers.values():
                buffers.pairs.pop(segment, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = (pair for buffers in self.layers.values() for pair in buffers.pairs.values())
        return sum(pair.keys.nbytes + pair.values.nbytes for pair in held)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell, all layers together."""
        return sum(buffers.form.cell_bytes for buffers in self.layers.values())


def concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Several K and V joined along the tokens; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)

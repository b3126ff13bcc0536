"""K/V buffers: for each layer and segment one pair of arrays (1, n_kv_heads, cells, head_dim)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx

Rebase = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(layer, keys, values) -> keys and values at their new positions, of the same shapes."""

Cells = tuple[int, int, int]
"""A segment and a half-open range of its cells."""

_TOKENS = (2,)


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

    def view(self, low: int, high: int) -> tuple[mx.array, mx.array]:
        if low == 0 and high == self.capacity:
            return self.keys, self.values
        index = (slice(None), slice(None), slice(low, high))
        return self.keys[index], self.values[index]


Staged = dict[int, dict[int, Pair]]
"""New pairs by layer and segment, not yet adopted."""


class DenseStore:
    """Buffers in the dtype they are used in.

    Args:
        dtype: of what is stored; None keeps that of each layer's first K and V.
    """

    def __init__(self, dtype: mx.Dtype | None) -> None:
        self._dtype = dtype
        self._forms: dict[int, Form] = {}
        self._pairs: dict[int, dict[int, Pair]] = {}

    def layers(self) -> tuple[int, ...]:
        return tuple(self._forms)

    def pairs(self, layer: int) -> Mapping[int, Pair]:
        return self._pairs.get(layer, {})

    def form(self, layer: int, keys: mx.array, values: mx.array) -> Form:
        """The layer's form, taken from these arrays if it has none yet."""
        form = self._forms.get(layer)
        if form is None:
            key_dtype, value_dtype = self._dtype or keys.dtype, self._dtype or values.dtype
            form = Form(keys.shape[1], keys.shape[3], values.shape[3], key_dtype, value_dtype)
        return form

    def open(self, layer: int, form: Form) -> None:
        """Make room for a layer of this form."""
        self._forms.setdefault(layer, form)
        self._pairs.setdefault(layer, {})

    def pair(self, layer: int, segment: int, capacity: int) -> Pair:
        """The pair of a segment, created or grown with zeros to `capacity` cells."""
        pair = self._pairs[layer].get(segment)
        if pair is None or pair.capacity < capacity:
            pair = self._pairs[layer][segment] = self._sized(layer, segment, capacity)
        return pair

    def read(self, layer: int, cells: Iterable[Cells]) -> Iterator[tuple[mx.array, mx.array]]:
        """Views of ranges of cells. Those that the layer has not written are zeros."""
        pairs = self._pairs[layer]
        for segment, low, high in cells:
            pair = pairs.get(segment)
            if pair is None or pair.capacity < high:
                pair = self._sized(layer, segment, high)
            yield pair.view(low, high)

    def stage_move(self, staged: Staged, segment: int, pieces: list[Cells], capacity: int) -> None:
        """Prepare a new segment that begins with copies of these cells."""
        for layer in self._forms:
            pair = self._joined(layer, list(self.read(layer, pieces)), capacity)
            staged.setdefault(layer, {})[segment] = pair

    def stage_rebase(
        self, staged: Staged, source: list[Cells], segment: int, cell: int, capacity: int, rebase: Rebase
    ) -> None:
        """Prepare `segment` with the source cells, re-based, from `cell` on."""
        start = mx.array([cell])
        for layer in self._forms:
            keys, values = rebase(layer, *concatenated(list(self.read(layer, source))))
            pair = self._sized(layer, segment, capacity)
            pair.write(start, keys, values)
            staged.setdefault(layer, {})[segment] = pair

    def adopt(self, staged: Staged) -> None:
        for layer, pairs in staged.items():
            self._pairs[layer].update(pairs)

    def drop(self, segments: Iterable[int]) -> None:
        for segment in segments:
            for pairs in self._pairs.values():
                pairs.pop(segment, None)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        held = (pair for pairs in self._pairs.values() for pair in pairs.values())
        return sum(pair.keys.nbytes + pair.values.nbytes for pair in held)

    def cell_bytes(self, layer: int | None = None) -> int:
        """Bytes of one cell in a layer, or in all of them."""
        if layer is not None:
            return self._forms[layer].cell_bytes if layer in self._forms else 0
        return sum(form.cell_bytes for form in self._forms.values())

    def _sized(self, layer: int, segment: int, capacity: int) -> Pair:
        """A copy of the layer's pair for a segment, with zeros up to `capacity` cells at least."""
        pair = self._pairs[layer].get(segment)
        if pair is None:
            return zeros(self._forms[layer], capacity)
        if pair.capacity >= capacity:
            return Pair(pair.keys, pair.values)
        return self._joined(layer, [(pair.keys, pair.values)], capacity)

    def _joined(self, layer: int, parts: list[tuple[mx.array, mx.array]], capacity: int) -> Pair:
        size = sum(keys.shape[2] for keys, _ in parts)
        if size < capacity:
            unused = zeros(self._forms[layer], capacity - size)
            parts = [*parts, (unused.keys, unused.values)]
        return Pair(*concatenated(parts))


def zeros(form: Form, cells: int) -> Pair:
    return Pair(
        mx.zeros((1, form.heads, cells, form.key_dim), form.key_dtype),
        mx.zeros((1, form.heads, cells, form.value_dim), form.value_dtype),
    )


def concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Several K and V joined along the tokens; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)

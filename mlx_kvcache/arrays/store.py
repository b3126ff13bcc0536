"""K/V buffers: for each layer and segment a pair of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import mlx.core as mx

from ..cells.spans import Spans
from ..quantisation import Codecs, Quantisation
from .lanes import Index, index_of
from .pairs import AnyPair, Form, Lanes

Rebase = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""(layer, keys, values) -> keys and values at their new positions, of the same shapes."""

Cells = tuple[int, int, Index]
"""Neighbouring cells: their segment, the cell after the last one, and how to index them."""


def cells_of(segment: int, low: int, high: int) -> Cells:
    """The cells [low, high) of a segment."""
    return segment, high, index_of(low, high)


def cells_in(spans: Spans) -> list[Cells]:
    """The cells of some spans."""
    return [cells_of(span.segment, span.start, span.stop) for span in spans]


class Buffers:
    """One layer's pairs, by segment."""

    __slots__ = ("form", "pairs", "written")

    def __init__(self, form: Form) -> None:
        self.form = form
        self.pairs: dict[int, AnyPair] = {}
        self.written = 0
        """Which step wrote last."""

    def pair(self, segment: int, capacity: int, is_packed: bool) -> AnyPair:
        """The pair of a segment, created or grown with zeros to `capacity` cells."""
        pair = self.pairs.get(segment)
        if pair is None or pair.capacity < capacity:
            pair = self.pairs[segment] = self.sized(segment, capacity, is_packed)
        return pair

    def read(self, cells: Iterable[Cells]) -> list[tuple[mx.array, mx.array]]:
        """Ranges of cells in float, views where they are stored so. Those never written are zeros."""
        return [self._holding(segment, high).read(index) for segment, high, index in cells]

    def lanes(self, cells: Iterable[Cells]) -> list[Lanes]:
        """Views of ranges of cells as they are stored. Those never written are zeros."""
        return [self._holding(segment, high).lanes(index) for segment, high, index in cells]

    def sized(self, segment: int, capacity: int, is_packed: bool) -> AnyPair:
        """A copy of the pair for a segment, with zeros up to `capacity` cells at least."""
        pair = self.pairs.get(segment)
        return self.form.pair([pair.whole] if pair else [], capacity, is_packed)

    def _holding(self, segment: int, high: int) -> AnyPair:
        """The pair of a segment with `high` cells at least."""
        pair = self.pairs.get(segment)
        if pair is None or pair.capacity < high:
            return self.sized(segment, high, pair is not None and pair.is_packed)
        return pair


Staged = dict[int, dict[int, AnyPair]]
"""New pairs by layer and segment, not yet adopted."""


def arrays_in(staged: Staged) -> list[mx.array]:
    """All arrays of new pairs."""
    return [array for pairs in staged.values() for pair in pairs.values() for array in pair.arrays]


class Store:
    """All buffers, in the dtype they are used in or in fewer bits.

    Args:
        dtype: in which K and V come and go; None keeps that of each layer's first ones.
        quantisation: how they lie in packed segments; None if there are no such.
    """

    def __init__(self, dtype: mx.Dtype | None, quantisation: Quantisation | None = None) -> None:
        self._dtype = dtype
        self._quantisation = quantisation
        self.layers: dict[int, Buffers] = {}

    def codecs(self, layer: int) -> Codecs:
        """How a layer's keys and values lie in packed segments."""
        return self.layers[layer].form[5:]

    def form_for(self, layer: int, keys: mx.array, values: mx.array) -> Form:
        """The form of a layer that begins with these.

        Raises:
            ValueError: they have not four axes, no heads, or heads of a size that is not to be divided
                into groups.
        """
        if keys.ndim != 4 or values.ndim != 4:
            raise ValueError(f"keys and values are {keys.shape} and {values.shape}, expected four axes")
        if not keys.shape[1] or not keys.shape[3]:
            raise ValueError(
                f"keys of layer {layer} are {keys.shape}: at least 1 head of 1 feature is needed"
            )
        return self._with_codecs(
            layer, Form(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, values.dtype)
        )

    def accepted(self, layer: int, form: Form) -> Form:
        """The form in which a layer takes what comes in another. Raises ValueError for other heads."""
        own = self.layers[layer].form if layer in self.layers else self._with_codecs(layer, form)
        if own[:3] != form[:3]:
            raise ValueError(
                f"layer {layer} has {form.heads} heads of {form.key_dim} and {form.value_dim} features, "
                f"this cache's has {own.heads} of {own.key_dim} and {own.value_dim}"
            )
        return own

    def _with_codecs(self, layer: int, form: Form) -> Form:
        """The form of a layer that begins with arrays of this one."""
        dtypes = self._dtype or form.key_dtype, self._dtype or form.value_dtype
        codecs = self._quantisation.of(layer) if self._quantisation else (None, None)
        return Form(*form[:3], *dtypes).packed_by(codecs, f"layer {layer}")

    def open(self, layer: int, form: Form) -> Buffers:
        """Begin a layer. Layers of the same form share one object for it."""
        form = next((other.form for other in self.layers.values() if other.form == form), form)
        buffers = self.layers[layer] = Buffers(form)
        return buffers

    def stage_move(
        self, staged: Staged, segment: int, pieces: list[Cells], capacity: int, is_packed: bool
    ) -> None:
        """Prepare a new segment that begins with copies of these cells."""
        for layer, buffers in self.layers.items():
            pair = buffers.form.pair(buffers.lanes(pieces), capacity, is_packed)
            staged.setdefault(layer, {})[segment] = pair

    def stage_rebase(
        self,
        staged: Staged,
        source: list[Cells],
        segment: int,
        cell: int,
        capacity: int,
        is_packed: bool,
        rebase: Rebase,
    ) -> None:
        """Prepare `segment` with the source cells, re-based, from `cell` on."""
        for layer, buffers in self.layers.items():
            keys, values = rebase(layer, *concatenated(buffers.read(source)))
            pair = buffers.sized(segment, capacity, is_packed)
            pair.write(index_of(cell, cell + keys.shape[2]), keys, values)
            staged.setdefault(layer, {})[segment] = pair

    def adopt(self, staged: Staged) -> None:
        for layer, pairs in staged.items():
            self.layers[layer].pairs.update(pairs)

    def grow(self, capacity: Mapping[int, int]) -> None:
        """Lengthen what there is of these segments, array by array, each computed at once.

        MLX would have many new arrays under way before it lets go of the old ones: with 30 layers a
        third of all, with fewer all.
        """
        for buffers in self.layers.values():
            for segment, cells in capacity.items():
                pair = buffers.pairs.get(segment)
                if pair and pair.capacity < cells:
                    pair.grow(cells)

    def drop(self, segments: Iterable[int]) -> None:
        for segment in segments:
            for buffers in self.layers.values():
                buffers.pairs.pop(segment, None)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is stored."""
        return [
            array
            for buffers in self.layers.values()
            for pair in buffers.pairs.values()
            for array in pair.arrays
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for array in self.arrays)


def concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Several K and V joined along the tokens; a single one as it is."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)

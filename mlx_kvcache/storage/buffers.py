"""Buffers of keys and values: one pair of arrays for each layer and segment.

A `Form` holds the shapes, dtypes and codecs of a layer. A `Pair` or `PackedPair` holds the keys and values
of one segment, `Buffers` all pairs of a layer, and `Store` all layers. Moves and re-basing are staged: they
prepare new pairs of lazy arrays, which `Store.adopt` then puts in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from ..cells.spans import Spans
from ..quantization import Codec, Codecs, Quantization, check_head_dim
from .codec import Index, Lane, Plain, alias, as_stored, cell_bytes, grown, index_of, joined, zeros

Lanes = tuple[Lane, Lane]
"""Keys and values of the same cells."""


class Form(NamedTuple):
    """The shapes, dtypes and codecs of a layer, which its first `put` sets.

    Keys and values are written and read in the dtypes. Packed segments store them with the codecs.
    """

    heads: int
    key_dim: int
    value_dim: int
    key_dtype: mx.Dtype
    value_dtype: mx.Dtype
    key_codec: Codec | None = None
    value_codec: Codec | None = None

    @property
    def is_packed(self) -> bool:
        """Whether packed segments of this layer are quantized."""
        return self.key_codec is not None or self.value_codec is not None

    def packed_by(self, codecs: Codecs, name: str) -> Form:
        """Returns the form with these codecs.

        Raises:
            ValueError: a head_dim is not a multiple of the group size; the message names the layer by `name`.
        """
        used = []
        for what, dim, codec in zip(("keys", "values"), (self.key_dim, self.value_dim), codecs, strict=True):
            if codec:
                check_head_dim(dim, codec.group_size, f"the {what} of {name}")
            # Layers with keys only have no values to quantize.
            used.append(codec if dim else None)
        return self._replace(key_codec=used[0], value_codec=used[1])

    def plain(self) -> Form:
        """Returns the form of segments that are not packed."""
        return self._replace(key_codec=None, value_codec=None)

    def checked(self, n: int, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Converts K and V of n tokens to this form's dtypes. Raises ValueError if they do not fit it."""
        key_shape, value_shape = (1, self.heads, n, self.key_dim), (1, self.heads, n, self.value_dim)
        if keys.shape != key_shape or values.shape != value_shape:
            raise ValueError(
                f"keys and values of layer {layer} are {keys.shape} and {values.shape}, "
                f"expected {key_shape} and {value_shape}"
            )
        as_stored = keys.dtype == self.key_dtype and values.dtype == self.value_dtype
        if not as_stored or not mx.issubdtype(self.key_dtype, mx.floating):
            for name, array in (("keys", keys), ("values", values)):
                if not mx.issubdtype(array.dtype, mx.floating):
                    raise ValueError(f"{name} of layer {layer} are {array.dtype}, expected floats")
            keys, values = keys.astype(self.key_dtype), values.astype(self.value_dtype)
        return keys, values

    def cell_bytes(self, is_packed: bool) -> int:
        form = self if is_packed else self.plain()
        keys = cell_bytes(form.key_dim, form.key_dtype, form.key_codec)
        values = cell_bytes(form.value_dim, form.value_dtype, form.value_codec)
        return self.heads * (keys + values)

    def zeros(self, cells: int, is_packed: bool = False) -> Lanes:
        form = self if is_packed else self.plain()
        return (
            zeros(form.heads, cells, form.key_dim, form.key_dtype, form.key_codec),
            zeros(form.heads, cells, form.value_dim, form.value_dtype, form.value_codec),
        )

    def stored(self, lanes: Lanes, is_packed: bool) -> Lanes:
        """Converts lanes to those of a packed segment, or of one that is not packed."""
        form = self if is_packed else self.plain()
        return (
            as_stored(lanes[0], form.key_codec, form.key_dtype),
            as_stored(lanes[1], form.value_codec, form.value_dtype),
        )

    def decoded(self, lanes: Lanes) -> tuple[mx.array, mx.array]:
        """Converts lanes to float arrays."""
        return lanes[0].decoded(self.key_dtype), lanes[1].decoded(self.value_dtype)

    def pair(self, parts: Sequence[Lanes], capacity: int, is_packed: bool) -> AnyPair:
        """Returns a new pair of these K and V, concatenated, and zeros up to at least `capacity` cells."""
        stored = [self.stored(lanes, is_packed) for lanes in parts]
        size = sum(keys.arrays[0].shape[2] for keys, _ in stored)
        if size < capacity:
            stored.append(self.zeros(capacity - size, is_packed))
        keys, values = (joined(lanes) for lanes in zip(*stored, strict=True))
        if is_packed and self.is_packed:
            return PackedPair(self, (keys, values))
        return Pair(*keys.arrays, *values.arrays)


class Pair:
    """Keys and values of one segment in one layer, in float.

    Writes assign to elements of the arrays, which builds and evaluates faster than `mx.slice_update`, but
    changes the array object. A pair therefore has array objects of its own.
    """

    __slots__ = ("capacity", "keys", "values")

    is_packed = False

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = alias(keys)
        self.values = alias(values)
        self.capacity = keys.shape[2]

    def copy(self) -> Pair:
        """Returns a pair of the same contents, which writes to this one do not change."""
        return Pair(self.keys, self.values)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.keys, self.values

    def write(self, index: Index, keys: mx.array, values: mx.array) -> None:
        """Writes tokens to some cells; evaluation does so in place, if there are no views of the arrays."""
        self.keys[index] = keys
        self.values[index] = values

    def grow(self, cells: int) -> None:
        """Extends the pair with zeros to this number of cells.

        Copies keys and then values, which needs less memory than both at once.
        """
        try:
            self.keys = grown(self.keys, cells)
            self.values = grown(self.values, cells)
            self.capacity = cells
        except BaseException:
            self.keys, self.values = self.read(index_of(0, self.capacity))
            raise

    def read(self, index: Index) -> tuple[mx.array, mx.array]:
        """Returns views of some cells."""
        return self.keys[index], self.values[index]

    @property
    def whole(self) -> Lanes:
        """The lanes of all cells."""
        return Plain(self.keys), Plain(self.values)

    def lanes(self, index: Index) -> Lanes:
        """Returns views of some cells as lanes."""
        return Plain(self.keys[index]), Plain(self.values[index])


class PackedPair:
    """Keys and values of one segment in one layer, of which keys, values or both are quantized."""

    __slots__ = ("_form", "_lanes", "capacity")

    is_packed = True

    def __init__(self, form: Form, lanes: Lanes) -> None:
        self._form = form
        self._lanes = lanes
        self.capacity = lanes[0].arrays[0].shape[2]

    def copy(self) -> PackedPair:
        """As `Pair.copy`."""
        return PackedPair(self._form, self._lanes)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        keys, values = self._lanes
        return *keys.arrays, *values.arrays

    @property
    def whole(self) -> Lanes:
        """The lanes of all cells."""
        return self._lanes

    @property
    def keys(self) -> mx.array:
        """The packed words of the keys, or the keys if they are in float."""
        return self._lanes[0].arrays[0]

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._lanes = self._lanes[0].renewed(array), self._lanes[1]

    @property
    def values(self) -> mx.array:
        """The packed words of the values, or the values if they are in float."""
        return self._lanes[1].arrays[0]

    @values.setter
    def values(self, array: mx.array) -> None:
        self._lanes = self._lanes[0], self._lanes[1].renewed(array)

    def write(self, index: Index, keys: mx.array, values: mx.array) -> None:
        """As `Pair.write`."""
        self._lanes = self._lanes[0].written(index, keys), self._lanes[1].written(index, values)

    def grow(self, cells: int) -> None:
        """As `Pair.grow`."""
        try:
            self._lanes = self._lanes[0].grown(cells), self._lanes[1]
            self._lanes = self._lanes[0], self._lanes[1].grown(cells)
            self.capacity = cells
        except BaseException:
            self._lanes = self.lanes(index_of(0, self.capacity))
            raise

    def read(self, index: Index) -> tuple[mx.array, mx.array]:
        """Returns some cells in float."""
        return self._form.decoded(self.lanes(index))

    def lanes(self, index: Index) -> Lanes:
        """As `Pair.lanes`."""
        return self._lanes[0].at(index), self._lanes[1].at(index)


AnyPair: TypeAlias = Pair | PackedPair


Rebase = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]
"""Re-bases (layer, keys, values). Returns keys and values of the same shapes."""

Cells = tuple[int, int, Index]
"""Consecutive cells: their segment, the cell after the last one, and their index."""


def cells_of(segment: int, low: int, high: int) -> Cells:
    """Returns the cells [low, high) of a segment."""
    return segment, high, index_of(low, high)


def cells_in(spans: Spans) -> list[Cells]:
    """Returns the cells of some spans."""
    return [cells_of(span.segment, span.start, span.stop) for span in spans]


class Buffers:
    """The pairs of one layer, by segment."""

    __slots__ = ("form", "pairs", "written")

    def __init__(self, form: Form) -> None:
        self.form = form
        self.pairs: dict[int, AnyPair] = {}
        self.written = 0
        """The name of the last step that wrote to this layer."""

    def pair(self, segment: int, capacity: int, is_packed: bool) -> AnyPair:
        """Returns the pair of a segment. Creates it, or extends it with zeros to `capacity` cells."""
        pair = self.pairs.get(segment)
        if pair is None or pair.capacity < capacity:
            pair = self.pairs[segment] = self.sized(segment, capacity, is_packed)
        return pair

    def read(self, cells: Iterable[Cells]) -> list[tuple[mx.array, mx.array]]:
        """Returns ranges of cells in float: views if they are stored so. Unwritten cells are zeros."""
        return [self._holding(segment, high).read(index) for segment, high, index in cells]

    def lanes(self, cells: Iterable[Cells]) -> list[Lanes]:
        """Returns views of ranges of cells as they are stored. Unwritten cells are zeros."""
        return [self._holding(segment, high).lanes(index) for segment, high, index in cells]

    def sized(self, segment: int, capacity: int, is_packed: bool) -> AnyPair:
        """Returns a copy of a segment's pair, extended with zeros to at least `capacity` cells."""
        pair = self.pairs.get(segment)
        return self.form.pair([pair.whole] if pair else [], capacity, is_packed)

    def _holding(self, segment: int, high: int) -> AnyPair:
        """The pair of a segment, or an extended copy if it has less than `high` cells."""
        pair = self.pairs.get(segment)
        if pair is None or pair.capacity < high:
            return self.sized(segment, high, pair is not None and pair.is_packed)
        return pair


Staged = dict[int, dict[int, AnyPair]]
"""New pairs by layer and segment, before `Store.adopt`."""


def arrays_in(staged: Staged) -> list[mx.array]:
    """Returns all arrays of new pairs."""
    return [array for pairs in staged.values() for pair in pairs.values() for array in pair.arrays]


class Store:
    """The buffers of all layers.

    Args:
        dtype: the dtype in which K and V are written and read; None keeps that of each layer's first ones.
        quantization: the quantization of packed segments; None for float.
    """

    def __init__(self, dtype: mx.Dtype | None, quantization: Quantization | None = None) -> None:
        self._dtype = dtype
        self._quantization = quantization
        self.layers: dict[int, Buffers] = {}

    def codecs(self, layer: int) -> Codecs:
        """The codecs of a layer's keys and values in packed segments."""
        return self.layers[layer].form[5:]

    def form_for(self, layer: int, keys: mx.array, values: mx.array) -> Form:
        """Returns the form of a layer whose first keys and values are these.

        Raises:
            ValueError: they do not have four dimensions or at least one head with one feature, or their
                head_dim is not a multiple of the group size.
        """
        if keys.ndim != 4 or values.ndim != 4:
            raise ValueError(f"keys and values are {keys.shape} and {values.shape}, expected 4 dimensions")
        if not keys.shape[1] or not keys.shape[3]:
            raise ValueError(f"keys of layer {layer} are {keys.shape}, expected at least 1 head of 1 feature")
        return self._with_codecs(
            layer, Form(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, values.dtype)
        )

    def accepted(self, layer: int, form: Form) -> Form:
        """Returns the form in which a layer stores tokens of `form`. Raises ValueError for other heads."""
        own = self.layers[layer].form if layer in self.layers else self._with_codecs(layer, form)
        if own[:3] != form[:3]:
            raise ValueError(
                f"layer {layer} has {form.heads} heads of {form.key_dim} and {form.value_dim} features for "
                f"keys and values, this cache has {own.heads} of {own.key_dim} and {own.value_dim}"
            )
        return own

    def _with_codecs(self, layer: int, form: Form) -> Form:
        """The form of a new layer for arrays of this form."""
        dtypes = self._dtype or form.key_dtype, self._dtype or form.value_dtype
        codecs = self._quantization.of(layer) if self._quantization else (None, None)
        return Form(*form[:3], *dtypes).packed_by(codecs, f"layer {layer}")

    def open(self, layer: int, form: Form) -> Buffers:
        """Creates the buffers of a layer. Layers of equal form share one `Form` object."""
        form = next((other.form for other in self.layers.values() if other.form == form), form)
        buffers = self.layers[layer] = Buffers(form)
        return buffers

    def stage_move(
        self, staged: Staged, segment: int, pieces: list[Cells], capacity: int, is_packed: bool
    ) -> None:
        """Stages a new segment that begins with copies of these cells, in all layers."""
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
        """Stages a copy of `segment` with the source cells, re-based, from `cell` on, in all layers."""
        for layer, buffers in self.layers.items():
            keys, values = rebase(layer, *concatenated(buffers.read(source)))
            pair = buffers.sized(segment, capacity, is_packed)
            pair.write(index_of(cell, cell + keys.shape[2]), keys, values)
            staged.setdefault(layer, {})[segment] = pair

    def adopt(self, staged: Staged) -> None:
        for layer, pairs in staged.items():
            self.layers[layer].pairs.update(pairs)

    def grow(self, capacity: Mapping[int, int]) -> None:
        """Extends these segments in all layers, and evaluates one array at a time.

        Evaluated together, MLX would allocate many new arrays before it frees old ones: a third of all with
        30 layers, and all of them with fewer.
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
        """The arrays of all buffers."""
        return [
            array
            for buffers in self.layers.values()
            for pair in buffers.pairs.values()
            for array in pair.arrays
        ]

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(array.nbytes for array in self.arrays)


def concatenated(parts: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """Concatenates pairs of K and V along the tokens. Returns a single pair as it is."""
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)

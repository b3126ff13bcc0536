"""Keys and values of one segment in one layer, and what a layer's arrays look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import mlx.core as mx

from ..quantisation import Codec, Codecs, check_width
from .lanes import Index, Lane, Plain, alias, as_stored, cell_bytes, grown, index_of, joined, zeros

Lanes = tuple[Lane, Lane]
"""Keys and values of neighbouring cells."""


class Form(NamedTuple):
    """What a layer's arrays look like; the first `put` decides it.

    The dtypes are those in which keys and values come and go; by the codecs they are stored in
    segments that are packed.
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
        """Whether packed segments differ from others."""
        return self.key_codec is not None or self.value_codec is not None

    def packed_by(self, codecs: Codecs, name: str) -> Form:
        """The form by these codecs. Raises ValueError where their groups do not divide a head."""
        used = []
        for what, dim, codec in zip(("keys", "values"), (self.key_dim, self.value_dim), codecs, strict=True):
            if codec:
                check_width(f"{what} of {name}", dim, codec.group_size)
            # Some layers have keys only; nothing can be packed in no bits.
            used.append(codec if dim else None)
        return self._replace(key_codec=used[0], value_codec=used[1])

    def plain(self) -> Form:
        """The form of segments that are not packed."""
        return self._replace(key_codec=None, value_codec=None)

    def checked(self, n: int, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """K and V of n tokens in this form's dtypes. Raises ValueError where they have not its shapes."""
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
        """The lanes as they lie in a segment that is packed, or is not."""
        form = self if is_packed else self.plain()
        return (
            as_stored(lanes[0], form.key_codec, form.key_dtype),
            as_stored(lanes[1], form.value_codec, form.value_dtype),
        )

    def decoded(self, lanes: Lanes) -> tuple[mx.array, mx.array]:
        """The lanes in float."""
        return lanes[0].decoded(self.key_dtype), lanes[1].decoded(self.value_dtype)

    def pair(self, parts: Sequence[Lanes], capacity: int, is_packed: bool) -> AnyPair:
        """A new pair of these K and V one after the other, and zeros up to `capacity` cells at least."""
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

    Its arrays are its own: to assign to their elements costs less than `mx.slice_update`, to build
    and to evaluate, but everybody who holds the same object would see it.
    """

    __slots__ = ("capacity", "keys", "values")

    is_packed = False

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys = alias(keys)
        self.values = alias(values)
        self.capacity = keys.shape[2]

    def copy(self) -> Pair:
        """Another with the same arrays, which stay as they are when this one is written."""
        return Pair(self.keys, self.values)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.keys, self.values

    def write(self, index: Index, keys: mx.array, values: mx.array) -> None:
        """Put tokens at some cells. In place when evaluated, if nobody holds a view."""
        self.keys[index] = keys
        self.values[index] = values

    def grow(self, cells: int) -> None:
        """Have zeros up to so many cells. Keys are there twice for a moment, and then values."""
        try:
            self.keys = grown(self.keys, cells)
            self.values = grown(self.values, cells)
            self.capacity = cells
        except BaseException:
            self.keys, self.values = self.read(index_of(0, self.capacity))
            raise

    def read(self, index: Index) -> tuple[mx.array, mx.array]:
        """Views of some cells."""
        return self.keys[index], self.values[index]

    @property
    def whole(self) -> Lanes:
        """All cells as lanes."""
        return Plain(self.keys), Plain(self.values)

    def lanes(self, index: Index) -> Lanes:
        """Views of some cells as lanes."""
        return Plain(self.keys[index]), Plain(self.values[index])


class PackedPair:
    """The same where keys, values or both are in fewer bits."""

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
        """All cells."""
        return self._lanes

    @property
    def keys(self) -> mx.array:
        """What the keys' features are packed in."""
        return self._lanes[0].arrays[0]

    @keys.setter
    def keys(self, array: mx.array) -> None:
        self._lanes = self._lanes[0].renewed(array), self._lanes[1]

    @property
    def values(self) -> mx.array:
        """What the values' features are packed in."""
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
        """Some cells in float."""
        return self._form.decoded(self.lanes(index))

    def lanes(self, index: Index) -> Lanes:
        """Views of some cells."""
        return self._lanes[0].at(index), self._lanes[1].at(index)


AnyPair: TypeAlias = Pair | PackedPair

"""Lanes: rows of cells that hold keys or values, in float (`Plain`) or quantized (`Packed`).

Both kinds have the same methods: write and read cells, decode them to float, and compute the two products
of attention, with quantized cells as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from ..quantization import Codec


def is_cpu() -> bool:
    """Returns whether the stream on which MLX computes now is a CPU's.

    MLX has no fused attention there: it repeats the keys for each query head, and multiplies keys that
    the mask hides. `mx.stream` sets the default device together with the stream, so this asks for both. Only
    this function asks for the device, so that tests can replace it.
    """
    return mx.default_device().type == mx.cpu


def is_cuda() -> bool:
    """Returns whether MLX computes on an NVIDIA GPU, where it multiplies packed cells of some shapes only."""
    return _HAS_CUDA and not is_cpu()


_HAS_CUDA: bool = hasattr(mx, "cuda") and mx.cuda.is_available()

Index = tuple[slice, slice, slice]
"""Indexes consecutive cells in an array (1, heads, cells, dim)."""

_LARGEST = 32752.0
"""Half of the largest float16, so that differences of two numbers also fit float16."""
_ALL = slice(None)
_FEW, _MANY = 4, 384
"""Up to this number of rows, and from this number of cells on, a CPU multiplies cells by rows faster."""


def index_of(low: int, high: int, height: int | None = None) -> Index:
    """Returns the index of the cells [low, high), on one level of a stack or on all."""
    return _ALL if height is None else slice(height, height + 1), _ALL, slice(low, high)


class Plain(NamedTuple):
    """A lane in float, (1, heads, cells, dim)."""

    array: mx.array

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The stored arrays."""
        return (self.array,)

    @property
    def dim(self) -> int:
        """The number of features per head."""
        return self.array.shape[3]

    def like(self, arrays: Iterable[mx.array]) -> Plain:
        """Returns a lane of the same kind with other arrays."""
        return Plain(*arrays)

    def write(self, index: Index, tokens: mx.array) -> None:
        """Assigns tokens to some cells of the arrays, which changes these objects."""
        self.array[index] = tokens

    def at(self, index: Index) -> Plain:
        """Returns a view of some cells."""
        return Plain(self.array[index])

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        """Returns the cells in float."""
        return self.array.astype(dtype)

    def scores(self, rows: mx.array, scale: float = 1.0) -> mx.array:
        """Returns the products, times scale, of rows (1, heads, m, dim) with cells, (1, heads, m, cells)."""
        if rows.shape[2] <= _FEW and self.array.shape[2] >= _MANY and is_cpu():
            rows = rows if scale == 1 else rows * scale
            # BLAS copies its right operand first, and a few rows copy faster than many cells.
            return (self.array @ rows.swapaxes(-1, -2)).swapaxes(-1, -2)
        cells = self.array.swapaxes(-1, -2)
        if scale == 1:
            return rows @ cells
        # The scale costs no primitive.
        return mx.addmm(mx.array(0, rows.dtype), rows, cells, alpha=scale, beta=0)

    def weighted(self, weights: mx.array) -> mx.array:
        """Returns the sums of the cells by weights (1, heads, m, cells), (1, heads, m, dim)."""
        return weights @ self.array


class Packed(NamedTuple):
    """A quantized lane: packed words, and a scale and a bias for each group of features.

    Its methods are those of `Plain`; `write` quantizes the tokens. With a transform, the words hold the
    transformed features. `scores` transforms the rows instead of the cells, and `weighted` undoes the
    transform of the sums, so that only `decoded` transforms as many rows as there are cells.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    codec: Codec

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.words, self.scales, self.biases

    @property
    def dim(self) -> int:
        return self.scales.shape[3] * self.codec.group_size

    @classmethod
    def of(cls, arrays: Iterable[mx.array], codec: Codec) -> Packed:
        """Returns a lane of these words, scales and biases."""
        words, scales, biases = arrays
        return cls(words, scales, biases, codec)

    def like(self, arrays: Iterable[mx.array]) -> Packed:
        return Packed.of(arrays, self.codec)

    def write(self, index: Index, tokens: mx.array) -> None:
        new = packed(tokens, self.codec)
        self.words[index], self.scales[index], self.biases[index] = new.words, new.scales, new.biases

    def at(self, index: Index) -> Packed:
        return Packed(self.words[index], self.scales[index], self.biases[index], self.codec)

    def decoded(self, dtype: mx.Dtype) -> mx.array:
        cells = self._dequantized(dtype)
        return cells if self.codec.transform == "none" else _times(cells, self.codec, "undo")

    def scores(self, rows: mx.array, scale: float = 1.0) -> mx.array:
        if self.codec.transform != "none":
            # The scale costs nothing as a part of the matrix.
            rows = _times(rows, self.codec, "meet", scale)
        elif scale != 1:
            rows = rows * scale
        return self._product(rows, transpose=True)

    def weighted(self, weights: mx.array) -> mx.array:
        sums = self._product(weights, transpose=False)
        return sums if self.codec.transform == "none" else _times(sums, self.codec, "undo")

    def _dequantized(self, dtype: mx.Dtype) -> mx.array:
        """The features as they are in the words, transformed or not."""
        words, scales, biases, (bits, group_size, *_) = self
        # MLX computes in the dtype of the scales, even if another one is asked for.
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        return mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)

    def _product(self, rows: mx.array, transpose: bool) -> mx.array:
        words, scales, biases, (bits, group_size, *_) = self
        if is_cuda():
            cells = self._dequantized(rows.dtype)
            return rows @ (cells.swapaxes(-1, -2) if transpose else cells)
        if is_cpu():
            # On a CPU, 16-bit rows multiply 20 to 50 times slower, and sums are rounded to 16 bits.
            rows = rows.astype(mx.float32)
        return mx.quantized_matmul(
            rows, words, scales, biases, transpose=transpose, group_size=group_size, bits=bits
        )


Lane: TypeAlias = Plain | Packed


def alias(array: mx.array) -> mx.array:
    """Returns a second object for an array. Assigning to elements of one leaves the other unchanged."""
    return array.astype(array.dtype)


def grown(array: mx.array, cells: int) -> mx.array:
    """Returns an array (levels, heads, n, dim) extended with zeros to this number of cells."""
    levels, heads, size, dim = array.shape
    if size >= cells:
        return array
    return mx.concatenate([array, mx.zeros((levels, heads, cells - size, dim), array.dtype)], axis=2)


def packed(tokens: mx.array, codec: Codec) -> Packed:
    """Quantizes tokens (1, heads, n, dim), with 16-bit scales and biases."""
    if codec.transform != "none":
        tokens = _times(tokens, codec, "apply")
    if tokens.dtype == mx.float32:
        tokens = mx.clip(tokens, -_LARGEST, _LARGEST).astype(mx.float16)
    words, scales, biases = mx.quantize(tokens, group_size=codec.group_size, bits=codec.bits)
    return Packed(words, scales, biases, codec)


def as_stored(lane: Lane, codec: Codec | None, dtype: mx.Dtype) -> Lane:
    """Converts a lane to a codec, or to float for None. `dtype` is the float dtype of its cells."""
    if codec is None:
        return Plain(lane.decoded(dtype))
    if isinstance(lane, Packed) and lane.codec == codec:
        kind = scale_dtype(dtype)
        return Packed(lane.words, lane.scales.astype(kind), lane.biases.astype(kind), codec)
    return packed(lane.decoded(dtype), codec)


def copied(lane: Lane) -> Lane:
    """Copies a lane, because a view keeps the whole array in memory."""
    return lane.like(array + 0 for array in lane.arrays)


def joined(lanes: Sequence[Lane]) -> Lane:
    """Concatenates lanes of the same dtypes and codec."""
    if len(lanes) == 1:
        return lanes[0]
    parts = zip(*(lane.arrays for lane in lanes), strict=True)
    return lanes[0].like(mx.concatenate(list(part), axis=2) for part in parts)


def zeros(heads: int, cells: int, dim: int, dtype: mx.Dtype, codec: Codec | None, levels: int = 1) -> Lane:
    """Returns a lane of zeros."""
    if codec is None:
        return Plain(mx.zeros((levels, heads, cells, dim), dtype))
    words = mx.zeros((levels, heads, cells, dim * codec.bits // 32), mx.uint32)
    groups = mx.zeros((levels, heads, cells, dim // codec.group_size), scale_dtype(dtype))
    return Packed(words, groups, groups, codec)


def cell_bytes(dim: int, dtype: mx.Dtype, codec: Codec | None) -> int:
    """Returns the bytes of a cell for one head."""
    if codec is None:
        return dim * dtype.size
    return dim * codec.bits // 8 + 2 * mx.float16.size * (dim // codec.group_size)


def scale_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Returns the 16-bit dtype of scales and biases for arrays of this dtype."""
    return mx.bfloat16 if dtype == mx.bfloat16 else mx.float16


Way = Literal["apply", "undo", "meet"]
"""Transforms features; undoes that; or changes rows, so that their products with features stay the same."""


def _times(features: mx.array, codec: Codec, way: Way, scale: float = 1.0) -> mx.array:
    """Multiplies features (..., heads, n, dim) by a matrix of the codec's transform, and by a scale.

    If dim is no power of two and there is no center, blocks of the largest power that divides it are
    multiplied one by one.
    """
    *rest, dim = shape = features.shape
    block, dtype = dim if codec.center else min(dim & -dim, _BLOCK), features.dtype
    if block < dim:
        features = features.reshape(*rest, dim // block, block)
    if dtype == mx.float32 or not is_cpu():
        found = features @ _matrix(block, dtype, way, scale, codec.center)
    else:
        # A CPU multiplies in 16 bits much slower, and rounds every sum.
        found = features.astype(mx.float32) @ _matrix(block, mx.float32, way, scale, codec.center)
        found = found.astype(dtype)
    return found.reshape(shape) if block < dim else found


_BLOCK = 512
"""The largest block of features that is transformed as one: a file could name any number."""


@lru_cache(1024)
def _matrix(size: int, dtype: mx.Dtype, way: Way, scale: float, center: bytes) -> mx.array:
    """A Hadamard matrix (size, size) or its inverse, times a scale; with a center, one for each head.

    With a center, features are first reflected, so that the center lies on the first axis. Hadamard's matrix
    makes equal features of this axis. It is symmetric, and 1 and -1 times powers of two, which are exact in
    16 bits. A product is one primitive, as is `mx.hadamard_transform`, whose sums overflow float16.
    """
    power = (size & -size).bit_length() - 1
    matrix: np.ndarray = np.ones((1, 1))
    while len(matrix) < size & -size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = np.kron(np.eye(size >> power), matrix)
    if center:
        directions = np.frombuffer(center, np.float16).astype(np.float64).reshape(-1, size)
        matrix = np.stack([_reflection(direction) for direction in directions]) @ matrix
    if way == "undo":
        matrix = matrix.swapaxes(-1, -2)
    made = mx.array(matrix * scale * 2.0 ** -(power - power // 2 if way == "apply" else power // 2), dtype)
    mx.eval(made)
    return made


def _reflection(direction: np.ndarray) -> np.ndarray:
    """The symmetric orthogonal matrix that turns a direction to the first axis (Householder 1958)."""
    length, identity = np.linalg.norm(direction), np.eye(len(direction))
    normal = direction / length - identity[0] if length else identity[0] * 0
    square = normal @ normal
    return identity - 2 / square * np.outer(normal, normal) if square > _TINY else identity


_TINY = 1e-12
"""Directions with a smaller square of the distance from the first axis are on it."""

"""Keys and values as a codec stores them, by MLX's own functions."""

from __future__ import annotations

import mlx.core as mx

from mlx_kvcache.quantization import Codec


def rounded(array: mx.array, codec: Codec) -> mx.array:
    """Features (..., dim) as they are read after a codec has stored them."""
    bits, group_size, transform, _ = codec
    is_plain = transform == "none"
    stored = (array if is_plain else transformed(array)).astype(mx.float16)
    words, *rest = mx.quantize(stored, group_size=group_size, bits=bits)
    scales, biases = (part.astype(array.dtype) for part in rest)
    read = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    return read if is_plain else restored(read)


def transformed(array: mx.array) -> mx.array:
    """Features, whose number is a power of two, as a codec with a Hadamard transform quantizes them."""
    return _hadamard(array, up=True)


def restored(array: mx.array) -> mx.array:
    """What `transformed` was given."""
    return _hadamard(array, up=False)


def _hadamard(array: mx.array, up: bool) -> mx.array:
    power = array.shape[-1].bit_length() - 1
    return mx.hadamard_transform(array, scale=2.0 ** -((power + up) // 2))

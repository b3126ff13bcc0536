"""MLX arrays as bytes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from ..errors import CacheFileError
from .container import Contents, Stored, read_arrays

_DTYPES: dict[str, tuple[mx.Dtype, type[np.generic]]] = {
    "BOOL": (mx.bool_, np.uint8),
    "U8": (mx.uint8, np.uint8),
    "U16": (mx.uint16, np.uint16),
    "U32": (mx.uint32, np.uint32),
    "U64": (mx.uint64, np.uint64),
    "I8": (mx.int8, np.int8),
    "I16": (mx.int16, np.int16),
    "I32": (mx.int32, np.int32),
    "I64": (mx.int64, np.int64),
    "F16": (mx.float16, np.float16),
    "BF16": (mx.bfloat16, np.uint16),
    "F32": (mx.float32, np.float32),
    "C64": (mx.complex64, np.complex64),
}
"""By safetensors' names MLX's dtypes, and those of NumPy's that hold their bytes."""
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}


def name_of(dtype: mx.Dtype) -> str:
    """Safetensors' name of a dtype."""
    return _NAMES[dtype]


def dtype_of(name: str) -> mx.Dtype:
    """The other way round. Raises ValueError for a dtype that MLX does not have."""
    if name not in _DTYPES:
        raise ValueError(f"MLX has no dtype {name!r}")
    return _DTYPES[name][0]


def as_stored(arrays: Mapping[str, mx.array]) -> dict[str, Stored]:
    """Copies of arrays as bytes, which hold none of MLX's memory. Evaluates them."""
    mx.eval(list(arrays.values()))
    return {name: _as_stored(array) for name, array in arrays.items()}


def _as_stored(array: mx.array) -> Stored:
    # NumPy has no bfloat16; the bytes are the same.
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    data = np.array(plain, order="C", copy=True).reshape(-1).view(np.uint8)
    return Stored(name_of(array.dtype), tuple(array.shape), data)


def read(contents: Contents, verify: bool, lazy: bool = False) -> dict[str, mx.array]:
    """The arrays of a file, in memory: MLX can evaluate a lazy one only in the thread that made it.

    Args:
        verify: compare their checksums. Otherwise damage goes unseen.
        lazy: read nothing now. Each array is read when it is evaluated, in this thread.

    Raises:
        CacheFileError: the file cannot be read, or an array is damaged.
    """
    if not lazy:
        return dict(_read(contents, verify))
    try:
        loaded = mx.load(str(contents.path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CacheFileError(contents.path, str(error)) from error
    assert isinstance(loaded, dict)
    return {name: loaded[name] for name in contents.entries}


def _read(contents: Contents, verify: bool) -> Iterator[tuple[str, mx.array]]:
    for name, (dtype, shape, data) in read_arrays(contents, verify=verify):
        if dtype not in _DTYPES:
            raise CacheFileError(
                contents.path, f"array {name!r} is of dtype {dtype}, which MLX does not have"
            )
        ours, theirs = _DTYPES[dtype]
        array = mx.array(data.view(theirs)).view(ours).reshape(shape)
        mx.eval(array)
        yield name, array

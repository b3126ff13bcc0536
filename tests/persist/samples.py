"""Arrays for files, and files as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_kvcache.persist.container import SIZES, Stored, read_arrays, read_contents

Change = Callable[[dict[str, Any], dict[str, Any]], object]
"""What is done to a header and the arrays of a file."""

HEADER = {"kind": "test", "numbers": [1, 2.5, None, True], "text": 'é "quoted" \ud800'}


def stored(dtype: str, *shape: int, seed: int = 0) -> Stored:
    """Random elements; 0 and 1 are the only bytes of a bool."""
    size = SIZES[dtype] * int(np.prod(shape))
    most = 2 if dtype == "BOOL" else 256
    return Stored(dtype, shape, np.random.default_rng(seed).integers(0, most, size, np.uint8))


def few() -> dict[str, Stored]:
    """Six small arrays, one of them empty."""
    shapes = {"F32": (2, 3), "F16": (3,), "U8": (5,), "I64": (2,), "BF16": (1, 2, 2), "BOOL": (0, 4)}
    return {f"array {i}": stored(dtype, *shape, seed=i) for i, (dtype, shape) in enumerate(shapes.items())}


def load(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The header and all arrays."""
    contents = read_contents(path)
    return contents.header, dict(read_arrays(contents))


def assert_same(found: Mapping[str, Stored], expected: Mapping[str, Stored]) -> None:
    assert found.keys() == expected.keys()
    for name, (dtype, shape, data) in expected.items():
        assert found[name][:2] == (dtype, shape)
        np.testing.assert_array_equal(found[name].data, data)

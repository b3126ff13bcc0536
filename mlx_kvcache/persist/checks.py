"""Reading what a file's header says, of which nothing is believed: every fault is a ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .head import short

LARGEST = 2**40
"""Of positions and counts."""


def integer(value: object, what: str, low: int = 0, high: int = LARGEST) -> int:
    """A whole number from `low` to `high`; a bool, which is an int to Python, is none."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {short(value)}, not a whole number from {low} to {high}")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """An object of JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {short(value)}, not an object")
    return value


def listing(value: object, what: str, length: int | None = None) -> list[Any]:
    """A list, of `length` items where that is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise ValueError(f"{what} is {short(value)}, not a list" + (f" of {length}" if length else ""))
    return value


def layer_index(name: object) -> int:
    """The key of an object by layers."""
    if not isinstance(name, str) or not name.isdecimal() or len(name) > 9:
        raise ValueError(f"{short(name)} is no layer")
    return int(name)


def array(arrays: Mapping[str, mx.array], name: object) -> mx.array:
    """An array of the file."""
    if not isinstance(name, str) or name not in arrays:
        raise ValueError(f"there is no array {short(name)}")
    return arrays[name]


def shaped(arrays: Mapping[str, mx.array], name: str, shape: tuple[int, ...], *dtypes: mx.Dtype) -> mx.array:
    """An array of the file that has a shape, and one of some dtypes."""
    found = array(arrays, name)
    if found.shape != shape or found.dtype not in dtypes:
        told = f"{shape} of {' or '.join(str(dtype) for dtype in dtypes)}"
        raise ValueError(f"array {short(name)} is {found.shape} of {found.dtype}, the header says {told}")
    return found

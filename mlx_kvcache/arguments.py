"""Numbers that callers give, as ints, and how large a dimension can be."""

from __future__ import annotations

import operator

EXTENT = 2**31 - 1  # of a dimension, as in MLX


def whole(least: int = 0, **numbers: int) -> tuple[int, ...]:
    """Plain ints of these numbers, so that one of eight bits or a bool cannot get into the bookkeeping.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is less than `least`.
    """
    found = []
    for name, number in numbers.items():
        try:
            value = int(operator.index(number))
        except TypeError:
            raise TypeError(f"{name} must be a whole number, got {number!r:.60}") from None
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
        found.append(value)
    return tuple(found)

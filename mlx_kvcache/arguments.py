"""Checks arguments, and formats values for error messages."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

EXTENT = 2**31 - 1  # MLX's limit for a dimension


def whole(least: int | None = 0, **numbers: int) -> tuple[int, ...]:
    """Converts integers of any type to `int` and checks them.

    Args:
        least: the least allowed value; None allows all.
        numbers: the values, by the names that errors give them.

    Returns:
        The values as `int`, in order: arithmetic on 8-bit NumPy integers would overflow.

    Raises:
        TypeError: a value is not an integer.
        ValueError: a value is less than `least`.
    """
    found = []
    for name, number in numbers.items():
        try:
            value = int(operator.index(number))
        except TypeError:
            raise TypeError(f"{name} must be a whole number, got {number!r:.60}") from None
        if least is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
        found.append(value)
    return tuple(found)


def share(**numbers: float) -> None:
    """Raises ValueError for a number, by the name that the error gives it, that is not from 0.0 to 1.0.

    Raises TypeError for what is no number.
    """
    for name, number in numbers.items():
        if not isinstance(number, Real):
            raise TypeError(f"{name} must be a number between 0.0 and 1.0, got {number!r:.60}")
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be between 0.0 and 1.0, got {number}")


def token_ids(tokens: Any, name: str = "tokens") -> list[int]:
    """Converts a sequence or a one-dimensional array of token ids to a list of `int`.

    Raises:
        TypeError: `tokens` is text, not a sequence, not one-dimensional, or holds other things than integers.
    """
    if isinstance(tokens, (str, bytes)):
        raise TypeError(
            f"{name} must be token ids, got the text {tokens!r:.60}; encode it with the tokenizer"
        )
    if getattr(tokens, "ndim", 1) != 1:
        raise TypeError(f"{name} must have one dimension, got shape {tokens.shape}")
    listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    try:
        listed = list(listed)
    except TypeError:
        raise TypeError(f"{name} must be a sequence of token ids, got {class_of(tokens)}") from None
    try:
        return list(map(operator.index, listed))
    except TypeError:
        wrong = next(token for token in listed if not hasattr(token, "__index__"))
        raise TypeError(f"{name} must be whole numbers, got {wrong!r:.60}") from None


def class_of(value: Any) -> str:
    """Returns the name of a value's class with its module: several packages use the same class names."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def size_of(nbytes: int) -> str:
    """Formats a number of bytes, as in "1.5 GB"."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**exponent:
            return f"{nbytes / 10**exponent:.1f} {unit}"
    return f"{nbytes} B"

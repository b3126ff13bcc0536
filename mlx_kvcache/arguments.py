"""Checks of what callers give, and how errors name it."""

from __future__ import annotations

import operator
from typing import Any

EXTENT = 2**31 - 1  # of a dimension, as in MLX


def whole(least: int | None = 0, **numbers: int) -> tuple[int, ...]:
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
        if least is not None and value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
        found.append(value)
    return tuple(found)


def token_ids(tokens: Any, name: str = "tokens") -> list[int]:
    """Plain ints of a sequence of tokens, or of an array of one dimension.

    Raises:
        TypeError: a text, something that is no sequence, or what is in it are no whole numbers.
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
    """The class of a value with its module, as several packages have classes of one name."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def size_of(nbytes: int) -> str:
    """A number of bytes as people read it."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**exponent:
            return f"{nbytes / 10**exponent:.1f} {unit}"
    return f"{nbytes} B"

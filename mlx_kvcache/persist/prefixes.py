"""Packed token sequences that are found by a prefix, as in a `PrefixTree`.

A folder may list millions of tokens. Here they stay the bytes that its index holds, in sorted order: the
sequences that share the longest prefix with given tokens are neighbors of the place where these would be.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import takewhile
from operator import index
from struct import pack, unpack
from typing import Generic, TypeVar

from ..radix_tree import shared_length

V = TypeVar("V")

SIZE = 8
"""The bytes of a packed token."""


def packed(tokens: Iterable[int]) -> bytes:
    """Return tokens as little-endian integers of 8 bytes. Raises ValueError if one is out of range."""
    numbers = [index(token) for token in tokens]
    if min(numbers, default=0) < 0 or max(numbers, default=0) >= 2**63:
        raise ValueError("tokens must be at least 0 and less than 2**63")
    return pack(f"<{len(numbers)}q", *numbers)


def packed_start(tokens: Iterable[int]) -> bytes:
    """Return the tokens before the first one that is out of range, packed."""
    return packed(takewhile(lambda token: 0 <= token < 2**63, tokens))


def unpacked(blob: bytes) -> tuple[int, ...]:
    """Return the tokens that `packed` packed."""
    return unpack(f"<{len(blob) // SIZE}q", blob)


class PackedPrefixes(Generic[V]):
    """A mapping from packed token sequences to values that also finds shared prefixes. None may be empty."""

    def __init__(self) -> None:
        self._sorted: list[bytes] = []
        self._values: list[V] = []

    def __bool__(self) -> bool:
        """Whether there is a value."""
        return bool(self._sorted)

    def put(self, tokens: bytes, value: V) -> None:
        """Store the value of tokens that have none."""
        at = bisect_left(self._sorted, tokens)
        self._sorted.insert(at, tokens)
        self._values.insert(at, value)

    def pop(self, tokens: bytes) -> None:
        """Remove the value of tokens that have one."""
        at = bisect_left(self._sorted, tokens)
        del self._sorted[at], self._values[at]

    def matches(self, tokens: bytes) -> Iterator[tuple[int, V]]:
        """As `PrefixTree.matches`: yield (length of the shared prefix, value), the longest prefix first."""
        at = bisect_left(self._sorted, tokens)
        prefix = max(self._shared(at - 1, tokens), self._shared(at, tokens), key=len)
        if not prefix:
            return
        at = bisect_left(self._sorted, prefix)
        end = bisect_right(self._sorted, prefix, at, key=lambda own: own[: len(prefix)])
        for value in self._values[at:end]:
            yield len(prefix) // SIZE, value
        # Sequences that are themselves a prefix come before all others that begin with it.
        while shorter := self._shared(at - 1, tokens):
            at = bisect_left(self._sorted, shorter)
            if self._sorted[at] == shorter:
                yield len(shorter) // SIZE, self._values[at]

    def _shared(self, at: int, tokens: bytes) -> bytes:
        """Return the prefix that tokens share with the sequence at a place; none if no sequence is there."""
        if not 0 <= at < len(self._sorted):
            return b""
        common = shared_length(self._sorted[at], tokens)
        return tokens[: common - common % SIZE]

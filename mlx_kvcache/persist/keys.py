"""What a file was computed for, written so that all processes write it alike."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from operator import index
from struct import pack, unpack
from typing import NamedTuple


class Key(NamedTuple):
    """What tells files apart: a namespace, a salt as text, and packed tokens."""

    namespace: str
    salt: str
    tokens: bytes

    @property
    def digest(self) -> str:
        label = ascii((self.namespace, self.salt)).encode()
        return hashlib.sha256(label + self.tokens).hexdigest()


def packed(tokens: Iterable[int]) -> bytes:
    """Tokens as little-endian numbers of 8 bytes. Raises ValueError for negative or larger ones."""
    numbers = [index(token) for token in tokens]
    if min(numbers, default=0) < 0 or max(numbers, default=0) >= 2**63:
        raise ValueError("tokens must be 0 or more and below 2**63")
    return pack(f"<{len(numbers)}q", *numbers)


def unpacked(tokens: bytes) -> tuple[int, ...]:
    """The tokens again."""
    return unpack(f"<{len(tokens) // 8}q", tokens)


def salt_text(salt: Hashable) -> str | None:
    """A salt as text, different for different ones, or None where there is none to rely on.

    None, bool, int, float, str, bytes and tuples of them have a text. Unlike in a dict, 1, 1.0
    and True are three. Subclasses have none, as they may look like anything.
    """
    return ascii(salt) if _is_plain(salt) else None


def _is_plain(salt: Hashable) -> bool:
    if type(salt) is tuple:
        return all(map(_is_plain, salt))
    return salt is None or type(salt) in {bool, int, float, str, bytes}

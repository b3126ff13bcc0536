"""Visibility rules: the earlier positions that a token attends to.

The rules use operators only, so the same functions work on ints and on NumPy and MLX arrays. The
bookkeeping, the masks and the reference in the tests share them. `lower(q)` is the lowest position that a
token at q sees, attention sinks aside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Causal:
    """Full attention: a token sees itself and all tokens before it."""

    sinks = 0

    def lower(self, q: Any) -> Any:
        return q * 0


@dataclass(frozen=True)
class Window:
    """A sliding window: a token sees itself, the `size` - 1 before it, and the first `sinks` tokens."""

    size: int
    sinks: int = 0

    def lower(self, q: Any) -> Any:
        return q - (self.size - 1)


@dataclass(frozen=True)
class Chunk:
    """Chunked attention: a token sees itself and the tokens before it in its chunk of `size` positions."""

    size: int
    sinks = 0

    def lower(self, q: Any) -> Any:
        return q - q % self.size


Rule = Causal | Window | Chunk


def visible(rule: Rule, q: Any, k: Any, later: Any = False) -> Any:
    """Returns whether a token at position q sees the token at position k of the same sequence.

    Where `later` is true, the token also sees later ones (k > q). Arguments broadcast, and the result has
    their type.
    """
    # Masks are large, so skip comparisons that are always true.
    below = k <= q if later is False else (k <= q) | later
    if isinstance(rule, Causal):
        return below
    recent = k >= rule.lower(q)
    return below & (recent | (k < rule.sinks) if rule.sinks else recent)

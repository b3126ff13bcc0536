"""Who sees whom, as predicates over positions.

They are written with operators only, so that the same function runs on ints, on NumPy and
on MLX arrays: the bookkeeping, the masks and the oracle of the tests share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Causal:
    """A token sees itself and all before it."""

    sinks = 0

    def lower(self, q: Any) -> Any:
        return q * 0


@dataclass(frozen=True)
class Window:
    """A token sees itself, the `size` - 1 before it, and the first `sinks` of its sequence."""

    size: int
    sinks: int = 0

    def lower(self, q: Any) -> Any:
        return q - (self.size - 1)


@dataclass(frozen=True)
class Chunk:
    """A token sees itself and those before it in its chunk of `size` positions."""

    size: int
    sinks = 0

    def lower(self, q: Any) -> Any:
        return q - q % self.size


Rule = Causal | Window | Chunk


def visible(rule: Rule, q: Any, k: Any, later: Any = False) -> Any:
    """Whether a token at position q sees the one at k of its own sequence.

    `later` lifts the upper bound (k <= q) where it is true. The lower bound may be
    negative. Arguments broadcast; the result has their kind.
    """
    # Masks are large: what is true of all positions is not compared.
    below = k <= q if later is False else (k <= q) | later
    if isinstance(rule, Causal):
        return below
    recent = k >= rule.lower(q)
    return below & (recent | (k < rule.sinks) if rule.sinks else recent)

"""Tells how full the context of a chat is, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .events import Seen

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.cells.visibility import Rule
    from mlx_kvcache.plugin import Holding

NEARLY = 4
"""The context is nearly full when at most this part of it is left."""


@dataclass(frozen=True)
class Fullness:
    """The tokens of a chat and the room for them.

    Attributes:
        tokens: how many there are.
        capacity: how many there may be; None for any number.
        seen_from, sinks: the next token sees the tokens from the first number on, and so many first ones.
        gap: the position at which messages are forgotten; None if none are.
    """

    tokens: int = 0
    capacity: int | None = None
    seen_from: int = 0
    sinks: int = 0
    gap: int | None = None

    @classmethod
    def of(cls, seen: Seen) -> Fullness:
        """That of the current chat, by a report on the caches."""
        rule = _narrowest(seen.holdings)
        lower, sinks = (max(0, rule.lower(seen.cached)), rule.sinks) if rule else (0, 0)
        return cls(seen.cached, seen.capacity, lower, sinks, seen.gap)

    @property
    def count(self) -> str:
        of = f" of {self.capacity:,}" if self.capacity else ""
        return f"{self.tokens:,}{of} tokens"

    @property
    def is_nearly_full(self) -> bool:
        return self.capacity is not None and self.capacity - self.tokens <= self.capacity // NEARLY

    @property
    def note(self) -> str:
        """What happens next, in words."""
        if self.capacity is not None and self.tokens > self.capacity:
            return "too much: the next message forgets the oldest"
        if self.is_nearly_full:
            return "nearly full: the oldest messages are forgotten soon"
        if self.seen_from > self.sinks:
            return f"the model looks at {self.tokens - self.seen_from + self.sinks:,} of them"
        return f"room for {self.capacity - self.tokens:,} more" if self.capacity else "no limit"


def _narrowest(holdings: Sequence[Holding]) -> Rule | None:
    """The visibility rule of the layers that see the fewest tokens."""
    rules = [holding.rule for holding in holdings if holding.rule is not None]
    return max(rules, key=lambda rule: rule.lower(1 << 20), default=None)

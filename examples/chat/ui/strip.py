"""Draws the context as a line: the roles in proportion, forgotten messages, and visible tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen
from ..tree import Message

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.cells.visibility import Rule
    from mlx_kvcache.plugin import Holding

ROLES = {"system": "#8b5cf6", "user": "#3b82f6", "assistant": "#10b981"}
SHORTEST = 256
"""The minimum number of tokens that the line represents, unless the capacity is smaller."""

GAP, PAST, EMPTY = "┆", "░", "·"


class Part(NamedTuple):
    """A run of tokens of one role."""

    role: str
    tokens: int


def parts_of(path: Sequence[Message], cached: int) -> list[Part]:
    """The parts of a branch: the remembered messages; all other cached tokens are the system prompt."""
    start = path[-1].start if path else 0
    parts = [Part(m.role, len(m.piece.tokens) if m.piece else 0) for m in path[start:]]
    before = max(0, cached - sum(part.tokens for part in parts))
    return [Part("system", before), *parts]


def drawn(
    parts: Sequence[Part], capacity: int | None, seen_from: int, sinks: int, is_cut: bool, width: int
) -> Text:
    """Draw the parts in proportion, in one line.

    Args:
        capacity: the number of tokens that the line represents; None for all there are.
        seen_from: the first position that the next token sees, besides the first `sinks`.
        is_cut: whether messages after the system prompt are forgotten.
    """
    roles = [part.role for part in parts for _ in range(part.tokens)]
    whole = max(capacity or 0, len(roles), 1)
    text = Text(no_wrap=True)
    gap = parts[0].tokens * width // whole if is_cut else -1
    for column in range(width):
        position = column * whole // width
        if column == gap:
            text.append(GAP, "bold")
        elif position >= len(roles):
            text.append(EMPTY, "dim")
        else:
            is_seen = position >= seen_from or position < sinks
            text.append("█" if is_seen else PAST, Style(color=ROLES[roles[position]]))
    return text


class ContextStrip(Widget):
    """The widget of the line, with the number of tokens below."""

    def __init__(self) -> None:
        super().__init__(id="strip")
        self._state: tuple[list[Part], int | None, int, int, bool] = ([Part("system", 0)], None, 0, 0, False)

    def show(self, path: Sequence[Message], seen: Seen | None, capacity: int | None) -> None:
        cached = seen.cached if seen else 0
        rule = _narrowest(seen.holdings if seen else ())
        lower, sinks = (max(0, rule.lower(cached)), rule.sinks) if rule else (0, 0)
        state = parts_of(path, cached), capacity, lower, sinks, bool(path and path[-1].start)
        if state != self._state:
            self._state = state
            self.refresh()

    def render(self) -> Text:
        parts, capacity, lower, sinks, is_cut = self._state
        tokens = sum(part.tokens for part in parts)
        visible = tokens - lower + min(sinks, lower)
        text = drawn(parts, _scale(tokens, capacity), lower, sinks, is_cut, self.size.width)
        text.append(f"\n{tokens:,} tokens" + (f" of {capacity:,}" if capacity else ""))
        text.append(f"\nthe next one sees {'all' if visible >= tokens else f'{visible:,}'}")
        return text


def _scale(tokens: int, capacity: int | None) -> int:
    """The number of tokens that the line represents: grows with the context, up to the capacity."""
    shown = max(SHORTEST, 1 << (2 * tokens - 1).bit_length())
    return min(shown, capacity) if capacity else max(tokens, 1)


def _narrowest(holdings: Sequence[Holding]) -> Rule | None:
    """The visibility rule of the layers that see the fewest tokens."""
    rules = [holding.rule for holding in holdings if holding.rule is not None]
    return max(rules, key=lambda rule: rule.lower(1 << 20), default=None)

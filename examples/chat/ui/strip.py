"""The context as a line: who said what of it, what is forgotten, and what the next token sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen
from ..tree import Message

if TYPE_CHECKING:
    # The screen comes before mlx-lm, which takes seconds to import.
    from mlx_kvcache.cells.visibility import Rule
    from mlx_kvcache.plugin import Holding

ROLES = {"system": "#8b5cf6", "user": "#3b82f6", "assistant": "#10b981"}
SHORTEST = 256
"""Tokens that the line stands for, at least, where there is room for as many."""

GAP, PAST, EMPTY = "┆", "░", "·"


class Part(NamedTuple):
    """So many tokens of one role."""

    role: str
    tokens: int


def parts_of(path: Sequence[Message], cached: int) -> list[Part]:
    """The remembered messages of a branch; what is cached beyond them is the system prompt."""
    start = path[-1].start if path else 0
    parts = [Part(m.role, len(m.piece.tokens) if m.piece else 0) for m in path[start:]]
    before = max(0, cached - sum(part.tokens for part in parts))
    return [Part("system", before), *parts]


def drawn(
    parts: Sequence[Part], capacity: int | None, seen_from: int, sinks: int, is_cut: bool, width: int
) -> Text:
    """The parts in proportion, in one line.

    Args:
        capacity: what the whole line stands for; None for as much as there is.
        seen_from: the first position that the next token sees, the first `sinks` excepted.
        is_cut: messages behind the system prompt are forgotten.
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
    """The strip, and a line that says it in numbers."""

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
    """What the line stands for: the capacity, once that lets one see something."""
    shown = max(SHORTEST, 1 << (2 * tokens - 1).bit_length())
    return min(shown, capacity) if capacity else max(tokens, 1)


def _narrowest(holdings: Sequence[Holding]) -> Rule | None:
    """The rule of the layers that see least."""
    rules = [holding.rule for holding in holdings if holding.rule is not None]
    return max(rules, key=lambda rule: rule.lower(1 << 20), default=None)

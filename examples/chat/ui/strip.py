"""Shows how full the context of the current chat is: a bar as long as the capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen
from .cellmap import FREE, HIDDEN, OWN, SIGNS

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.cells.visibility import Rule
    from mlx_kvcache.plugin import Holding

GAP = "┆"

NEARLY = 8
"""The context is nearly full when less than this part of it is left."""


@dataclass(frozen=True)
class Context:
    """The context of a chat.

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

    @property
    def is_nearly_full(self) -> bool:
        return self.capacity is not None and self.capacity - self.tokens < self.capacity // NEARLY

    @property
    def note(self) -> str:
        """What happens next, in words."""
        if self.capacity is not None and self.tokens > self.capacity:
            return "too much: the next message forgets the oldest"
        if self.is_nearly_full:
            return "nearly full: the oldest messages are forgotten next"
        if self.seen_from > self.sinks:
            return f"the model looks at {self.tokens - self.seen_from + self.sinks:,} of them"
        return f"room for {self.capacity - self.tokens:,} more" if self.capacity else "no limit"


def drawn(context: Context, width: int, color: str) -> Text:
    """Draw the tokens in proportion to the capacity, or to their number if there is none, in one line."""
    whole = max(context.capacity or 0, context.tokens, 1)
    text = Text(no_wrap=True)
    for column in range(width):
        position = column * whole // width
        if context.gap is not None and column == context.gap * width // whole:
            text.append(GAP, "bold")
        elif position >= context.tokens:
            text.append(SIGNS[FREE], "dim")
        else:
            is_seen = position >= context.seen_from or position < context.sinks
            text.append(SIGNS[OWN if is_seen else HIDDEN], Style(color=color))
    return text


class ContextStrip(Widget):
    """The widget of the bar, with words above and below."""

    def __init__(self) -> None:
        super().__init__(id="strip")
        self._state: tuple[Context, str] = Context(), ""

    def show(self, seen: Seen | None, capacity: int | None, color: str) -> None:
        """Show a report on the caches; the capacity before there is one."""
        context = Context(capacity=capacity)
        if seen:
            rule = _narrowest(seen.holdings)
            lower, sinks = (max(0, rule.lower(seen.cached)), rule.sinks) if rule else (0, 0)
            context = Context(seen.cached, seen.capacity, lower, sinks, seen.gap)
        if (context, color) != self._state:
            self._state = context, color
            self.refresh()

    def render(self) -> Text:
        context, color = self._state
        of = f" of {context.capacity:,}" if context.capacity else ""
        text = Text(f"Chat: {context.tokens:,}{of} tokens\n")
        text.append_text(drawn(context, self.size.width, color))
        text.append(f"\n{context.note}", "bold yellow" if context.is_nearly_full else "")
        return text


def _narrowest(holdings: Sequence[Holding]) -> Rule | None:
    """The visibility rule of the layers that see the fewest tokens."""
    rules = [holding.rule for holding in holdings if holding.rule is not None]
    return max(rules, key=lambda rule: rule.lower(1 << 20), default=None)

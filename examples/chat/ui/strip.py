"""Shows how full the context of the current chat is: a bar as long as the capacity."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.widget import Widget

from ..events import Seen
from ..fullness import Fullness
from .cellmap import FREE, HIDDEN, OWN, SIGNS

GAP = "┆"


def drawn(context: Fullness, width: int, color: str) -> Text:
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
        self._state: tuple[Fullness, str] = Fullness(), ""

    def show(self, seen: Seen | None, capacity: int | None, color: str) -> None:
        """Show a report on the caches; the capacity before there is one."""
        context = Fullness.of(seen) if seen else Fullness(capacity=capacity)
        if (context, color) != self._state:
            self._state = context, color
            self.refresh()

    def render(self) -> Text:
        context, color = self._state
        text = Text(f"Chat: {context.count}\n")
        text.append_text(drawn(context, self.size.width, color))
        text.append(f"\n{context.note}", "bold yellow" if context.is_nearly_full else "")
        return text

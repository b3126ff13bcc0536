"""The text field for messages, with a history and short forms of long pastes."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from ..tree import cleaned

PASTE = 100_000
"""The maximum length of a paste shown in full, in characters; a longer one is abbreviated."""


class Composer(TextArea):
    """A field of several lines. Enter sends; up in the first line and down in the last browse the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("shift+enter,alt+enter,ctrl+j", "newline", "New line", show=False),
    ]

    class Sent(Message):
        """The user sends this text."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Asked(Message):
        """The user asks for the list of keys."""

    def __init__(self) -> None:
        super().__init__(
            id="composer",
            compact=True,
            highlight_cursor_line=False,
            placeholder="Say something. Enter sends, ? shows the keys.",
        )
        self._past: list[str] = []
        self._at = 0
        self._draft = ""
        self._pasted: dict[str, str] = {}

    @property
    def content(self) -> str:
        """The text, with long pastes in full."""
        text = self.text
        for shown, pasted in self._pasted.items():
            text = text.replace(shown, pasted)
        return text

    def remember(self, past: list[str]) -> None:
        """Set the history, the newest message last."""
        self._past = past
        self._at = len(past)

    def put(self, text: str) -> None:
        """Replace the text."""
        self._pasted.clear()
        self.text = self._short(text)
        self.move_cursor(self.document.end)

    def attach(self, name: str, text: str) -> None:
        """Add a file; its name and its length stand for its text."""
        shown = f"[{name}, {len(text):,} characters]"
        self._pasted[shown] = f"{name}:\n\n{text}\n"
        self.insert(f"{shown} ")

    def action_newline(self) -> None:
        self.insert("\n")

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            self._take(event)
            if self.text.strip():
                self.post_message(self.Sent(self.content))
        elif event.character == "?" and not self.text:
            self._take(event)
            self.post_message(self.Asked())
        elif event.key == "up" and self.cursor_at_first_line and self._past:
            self._take(event)
            self._go(-1)
        elif event.key == "down" and self.cursor_at_last_line and self._at < len(self._past):
            self._take(event)
            self._go(1)
        elif event.key in self._bindings.key_to_bindings:
            # If the key bubbled, its action would run after the letters typed next.
            self._take(event)
            await self.run_action(self._bindings.get_bindings_for_key(event.key)[0].action)

    async def _on_paste(self, event: events.Paste) -> None:
        event.prevent_default()
        event.stop()
        self.insert(self._short(cleaned(event.text)))

    def _short(self, text: str) -> str:
        """Abbreviate a long text, which is kept in `_pasted`, so that editing stays fast."""
        if len(text) <= PASTE:
            return text
        shown = f"[{len(text):,} characters, {text[:30].strip()!r} …]"
        self._pasted[shown] = text
        return shown

    def _take(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()

    def _go(self, by: int) -> None:
        if self._at == len(self._past):
            self._draft = self.text
        self._at = max(0, min(len(self._past), self._at + by))
        self.text = self._draft if self._at == len(self._past) else self._short(self._past[self._at])
        self.move_cursor(self.document.end)

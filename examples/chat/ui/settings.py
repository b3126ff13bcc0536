"""The settings dialog."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Button, Input, Label

from ..settings import FRACTIONS, Settings
from .dialogs import Dialog

FIELDS = {
    "capacity": "Capacity: most tokens kept of a chat; empty: no limit",
    "max_tokens": "Longest reply, in tokens",
    "temperature": "Temperature; 0 always takes the likeliest token",
    "top_p": "Top-p: choose from the likeliest, up to this share",
    "min_p": "Min-p: never choose what is less likely than this",
    "repetition_penalty": "Repetition penalty, from 1 (none) to 2",
    "seed": "Seed: repeats a chosen reply; empty: another each time",
    "window": "Window: how far back a token sees; empty: to the start",
    "sinks": "Sinks: first tokens that a window never hides",
    "bits": "Bits of what is kept: 8 6 5 4 3 2; empty: the model's",
    "memory": "Memory for all chats, in MB; what is over goes to disk",
}

ABSURD = 1_000_000
"""A capacity above which one is questioned, where the bytes of a token are not known."""


class SettingsScreen(Dialog[Settings]):
    """Edits the settings. A value out of bounds is reported, and the dialog stays open.

    Args:
        most: the most tokens for which this machine has memory.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "save", "Save", priority=True)]

    def __init__(self, settings: Settings, most: int = ABSURD) -> None:
        super().__init__()
        self._values = asdict(settings)
        self._most = most
        self._questioned: Settings | None = None

    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=False, classes="box wide settings"):
            yield Label("[b]Settings[/b]")
            for name, what in FIELDS.items():
                value = self._values[name]
                with Horizontal():
                    yield Input("" if value is None else f"{value:g}", id=name, compact=True)
                    yield Label(what)
            yield Label("", id="wrong")
            with Horizontal(classes="buttons"):
                yield Button("Save (ctrl+s)", variant="primary", id="save")
                yield Button("Cancel (esc)", id="cancel")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "save":
            self.action_save()
        else:
            self.dismiss(None)

    def on_input_submitted(self) -> None:
        self.action_save()

    def action_save(self) -> None:
        try:
            settings = Settings.of({name: self._read(name) for name in FIELDS})
        except ValueError as error:
            self.query_one("#wrong", Label).update(str(error))
            return
        if settings.capacity and settings.capacity > self._most and settings != self._questioned:
            self._questioned = settings
            self.query_one("#wrong", Label).update(
                f"A chat of {settings.capacity:,} tokens does not fit this machine's memory, "
                f"which has room for about {self._most:,}. Save again to keep it."
            )
            return
        self.dismiss(settings)

    def _read(self, name: str) -> Any:
        text = self.query_one(f"#{name}", Input).value.strip()
        if not text:
            return None
        try:
            return float(text) if name in FRACTIONS else int(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {text!r}") from None

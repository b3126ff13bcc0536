"""The settings dialog."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Button, Input, Label

from ..settings import Settings
from .dialogs import Dialog

FIELDS = {
    "capacity": "Capacity: most tokens in a cache; the oldest turns make room. Empty: no bound",
    "window": "Window: how many tokens a token sees. Empty: all",
    "sinks": "Sinks: first tokens that a window never hides",
    "bits": "Bits of stored keys and values: 8, 6, 5, 4, 3, 2. Empty: the model's own",
    "temperature": "Temperature of sampling; 0: always the likeliest token",
    "top_p": "Top-p: sample from the likeliest tokens that have this probability together",
    "max_tokens": "Longest reply, in tokens",
    "memory": "Memory for all caches, in MB; what has to leave goes to files",
}


class SettingsScreen(Dialog[Settings]):
    """Edits the settings. A value out of bounds is reported, and the dialog stays open."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "save", "Save", priority=True)]

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._values = asdict(settings)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box wide settings"):
            yield Label("[b]Settings[/b]")
            for name, what in FIELDS.items():
                value = self._values[name]
                with Horizontal():
                    yield Input("" if value is None else f"{value:g}", id=name, compact=True)
                    yield Label(what)
            yield Label("", id="wrong")
            with Horizontal(classes="buttons"):
                yield Button("Save (ctrl+s)", variant="primary", id="save")
                yield Button("Leave (esc)", id="leave")

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
        else:
            self.dismiss(settings)

    def _read(self, name: str) -> Any:
        text = self.query_one(f"#{name}", Input).value.strip()
        if not text:
            return None
        try:
            return float(text) if name in ("temperature", "top_p") else int(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {text!r}") from None

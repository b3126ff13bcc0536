"""Modal dialogs: the list of keys, text input and confirmation."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Static, TextArea

T = TypeVar("T")

KEYS = """\
[b]Writing[/b]
enter            send
ctrl+j           new line (shift+enter too, where the terminal tells)
up, down         what was said before
esc              stop the reply; leave editing

[b]This conversation[/b]
ctrl+e           edit your last message
ctrl+r           make the last reply again
ctrl+b           branches as a tree
alt+left, right  the branch before, after
ctrl+y           copy the last reply
shift+tab        go to the messages: up, down, e edit, r again, c copy, left and right branch
ctrl+home        show all earlier messages
f3               system prompt
f9               export as markdown

[b]Conversations[/b]
ctrl+n           new
ctrl+o           list and search: enter opens, f2 renames, f8 deletes

[b]All[/b]
f4               settings: capacity, window, bits, temperature …
f5               models
f6               light or dark
f7               show or hide the cache
? or f1          this
ctrl+q           leave; everything is kept (ctrl+c stops a reply, or leaves)

[b]The map[/b]
Each sign stands for some cells of the caches, a cell for a token in all layers of a kind. Colours are
conversations, the one you look at brightest; shades are kinds of layers.
█ its own   ▓ shared with another branch or conversation   ◆ sink, always seen
░ kept, but out of the next token's sight   ▚ re-based: moved when messages were forgotten   · free"""


class Dialog(ModalScreen[T]):
    """A box over the screen; escape closes it without a result."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Leave")]

    def action_leave(self) -> None:
        self.dismiss(None)


class Keys(Dialog[None]):
    """Shows the list of keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,f1,q", "leave", show=False)]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="box wide"):
            yield Static(KEYS)


class Ask(Dialog[str]):
    """Asks for a line of text."""

    def __init__(self, question: str, text: str = "") -> None:
        super().__init__()
        self._question = question
        self._text = text

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._question, markup=False)
            yield Input(self._text)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)


class AskLong(Ask):
    """Asks for a text of several lines."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+s", "save", "Save", priority=True)]

    def compose(self) -> ComposeResult:
        with Vertical(classes="box wide"):
            yield Label(self._question, markup=False)
            yield TextArea(self._text)
            with Horizontal(classes="buttons"):
                yield Button("Save (ctrl+s)", variant="primary", id="save")
                yield Button("Leave (esc)", id="leave")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(self.query_one(TextArea).text if event.button.id == "save" else None)

    def action_save(self) -> None:
        self.dismiss(self.query_one(TextArea).text)


class Confirm(Dialog[bool]):
    """Asks a yes-or-no question."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", show=False),
        Binding("n", "answer(False)", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._question, markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Yes (y)", variant="warning", id="yes")
                yield Button("No (n)", id="no")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)

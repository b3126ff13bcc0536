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
ctrl+g           continue a reply that was cut
ctrl+t           attach a text file
ctrl+b           versions as a tree
alt+left, right  the version before, after
ctrl+y           copy the last reply
shift+tab        go to the messages: up, down, e edit, r again, g continue, c copy,
                 t show thinking, left and right version
ctrl+home        show all earlier messages
f3               system prompt
f9               export as markdown

[b]Conversations[/b]
ctrl+n           new
ctrl+o           list and search: enter opens, f2 renames, f8 deletes

[b]All[/b]
f4               settings: capacity, length of replies, temperature, seed …
f5               models
f6               light or dark
f7               show or hide what the model remembers
? or f1          this
ctrl+q           quit; everything is kept (ctrl+c stops a reply, or quits)

[b]In dialogs[/b]
tab, up, down    the next field; enter takes it, esc cancels

[b]The right side[/b]
Text that the model has read stays in its memory, so that it need not read it again. A color is a chat, in
the list on the left as well. The bar at the top is as long as the chat may become."""


class Dialog(ModalScreen[T]):
    """A box over the screen; escape closes it without a result. The first field has the focus."""

    AUTO_FOCUS = "Input, TextArea, Tree, OptionList, Button"

    # Fields that use the arrows themselves handle them first.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Cancel"),
        Binding("down,right", "app.focus_next", show=False),
        Binding("up,left", "app.focus_previous", show=False),
    ]

    def action_leave(self) -> None:
        self.dismiss(None)


class Keys(Dialog[None]):
    """Shows the list of keys."""

    AUTO_FOCUS = "*"
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
                yield Button("Cancel (esc)", id="cancel")

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

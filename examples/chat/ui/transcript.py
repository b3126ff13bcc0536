"""Shows the current branch: a widget for each message, with Markdown and its actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.events import Click
from textual.markup import escape
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from ..thinking import MARKS, Marks, may_begin, parted
from ..tree import Message, cleaned

SHOWN = 30
"""The number of newest messages shown at first; earlier ones are shown on demand."""

ENDINGS = {
    "stopped": "stopped",
    "length": "cut at the longest reply",
    "capacity": "cut: the chat is full; continuing forgets its oldest messages",
}


class MessageView(Vertical, can_focus=True):
    """A message, with keys and links for its actions."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e,enter", "act('edit')", "Edit"),
        Binding("r", "act('again')", "Again"),
        Binding("g", "act('go_on')", "Continue"),
        Binding("c", "act('copy')", "Copy"),
        Binding("t", "think", "Thinking", show=False),
        Binding("left", "act('before')", "Version ‹", show=False),
        Binding("right", "act('after')", "Version ›", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    def __init__(
        self, message: Message, place: int, places: int, names: dict[str, str], marks: tuple[Marks, ...]
    ) -> None:
        super().__init__(classes=message.role)
        self.message = message
        self.place = place
        self.places = places
        self._names = names
        self._thought, self._text = (
            parted(message.text, marks) if message.role == "assistant" else ("", message.text)
        )

    def compose(self) -> ComposeResult:
        yield Static(self._header(), classes="header")
        if self.message.role == "user":
            yield Static(Content(self._text), classes="body")
        else:
            if self._thought:
                yield Static(f"{thinking(self._thought)} (t shows them)", classes="thought", markup=False)
                yield Static(Content(self._thought), classes="thinking")
            yield Markdown(cleaned(self._text), classes="body", open_links=False)
        if note := self._note():
            yield Static(Text(note), classes="note")

    async def action_act(self, what: str) -> None:
        await self.run_action(f"app.{what}_message({self.message.id!r})")

    def action_think(self) -> None:
        """Show or hide the thinking."""
        self.toggle_class("shown")

    def on_click(self, event: Click) -> None:
        if event.widget and event.widget.has_class("thought"):
            self.action_think()

    def _header(self) -> Content:
        name, id_ = self._names[self.message.role], self.message.id
        words = [f"[b]{escape(name)}[/b]"]
        if self.message.role == "user":
            words.append(f"[@click=app.edit_message('{id_}')]✎ edit[/]")
        else:
            words.append(f"[@click=app.again_message('{id_}')]↻ again[/]")
            words.append(f"[@click=app.copy_message('{id_}')]copy[/]")
            if self.message.ended:
                words.append(f"[@click=app.go_on_message('{id_}')]▸ continue[/]")
        if self.places > 1:
            words.append(
                f"[@click=app.before_message('{id_}')]‹[/]version {self.place} of {self.places}"
                f"[@click=app.after_message('{id_}')]›[/]"
            )
        return Content.from_markup("  ".join(words))

    def _note(self) -> str:
        parts = [ENDINGS[self.message.ended]] if self.message.ended else []
        if self.message.cost:
            parts.append(str(self.message.cost))
        return "; ".join(parts)


def thinking(thought: str, is_over: bool = True) -> str:
    """The line that stands for the thinking of a reply."""
    words = f"{len(thought.split()):,} words"
    return f"▸ thought for {words}" if is_over else f"▸ thinking, {words} so far"


class Forgotten(Static):
    """Marks the end of the messages that are forgotten."""

    def __init__(self, count: int) -> None:
        super().__init__(f"┄┄ {count} message{'s' if count > 1 else ''} above are forgotten ┄┄")


class Earlier(Static):
    """A link to earlier messages that are not on the screen yet."""

    def __init__(self, count: int) -> None:
        super().__init__(f"[@click=app.earlier]▲ {count} earlier messages (ctrl+home)[/]")


class Writing(Vertical):
    """A reply in progress."""

    def __init__(self, name: str, marks: tuple[Marks, ...] = MARKS) -> None:
        super().__init__(classes="assistant writing")
        self._author = name
        self._marks = marks
        self._stream: MarkdownStream | None = None
        self._text = ""
        self._written = 0

    def compose(self) -> ComposeResult:
        yield Static(
            Content.from_markup(f"[b]{escape(self._author)}[/b]  [@click=app.stop]■ stop (esc)[/]"),
            classes="header",
        )
        yield Static(classes="thought", markup=False)
        yield Markdown(classes="body", open_links=False)
        yield Static("…", classes="note", markup=False)

    async def write(self, text: str) -> None:
        """Add text. Of thinking only the number of words is shown."""
        self._text += text
        if may_begin(self._text, self._marks):
            return
        thought, rest = parted(self._text, self._marks)
        if thought:
            self.query_one(".thought", Static).update(thinking(thought, is_over=bool(rest)))
            self.add_class("thinks")
        if len(rest) > self._written:
            if self._stream is None:
                self._stream = Markdown.get_stream(self.query_one(Markdown))
            await self._stream.write(cleaned(rest[self._written :]))
            self._written = len(rest)

    def note(self, text: str) -> None:
        self.query_one(".note", Static).update(text)

    async def finish(self) -> None:
        if self._stream is not None:
            await self._stream.stop()


class Transcript(VerticalScroll, can_focus=False):
    """The messages of the current branch, the newest at the bottom.

    Attributes:
        marks: the marks of thinking to look for.
    """

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._path: tuple[Any, ...] = ()
        self._all = False
        self.start = 0
        self.marks: tuple[Marks, ...] = MARKS
        self.writing: Writing | None = None

    async def show(
        self,
        conversation: str,
        path: Sequence[tuple[Message, int, int]],
        names: dict[str, str],
        writing: str | None,
        start: int = 0,
    ) -> None:
        """Show a branch, keeping the widgets that stay the same.

        Args:
            conversation: the id of the conversation.
            path: the messages, each with its place among its siblings (from 1) and their number.
            names: the names of the roles.
            writing: the reply in progress so far; None if there is none.
            start: the number of messages that are forgotten.
        """
        if self._path and self._path[0] != conversation:
            self._all = False
        if writing is None and self.writing is not None:
            await self.writing.finish()
            await self.writing.remove()
            self.writing = None
        self.start = start
        wanted = self._wanted(conversation, path, names, start)
        if wanted != self._path:
            await self._update(wanted, path, names)
        if writing is not None and self.writing is None:
            self.writing = Writing(names["assistant"], self.marks)
            await self.mount(self.writing)
            if writing:
                await self.writing.write(writing)
        self.anchor()

    def show_all(self) -> None:
        """Make the next `show` include the earlier messages."""
        self._all = True

    def view_of(self, id: str) -> MessageView | None:  # noqa: A002
        return next((view for view in self.query(MessageView) if view.message.id == id), None)

    def _first(self, path: Sequence[Any]) -> int:
        return 0 if self._all else max(0, len(path) - SHOWN)

    def _wanted(
        self, conversation: str, path: Sequence[tuple[Message, int, int]], names: dict[str, str], start: int
    ) -> tuple[Any, ...]:
        """The values that the widgets depend on: the conversation, then an entry for each widget."""
        first = self._first(path)
        entries: list[Any] = [("earlier", first)] if first else []
        for index in range(first, len(path)):
            message, place, places = path[index]
            if start and index == start:
                entries.append(("forgotten", start))
            entries.append((message.id, place, places, names[message.role], message.cost, message.ended))
        return conversation, *entries

    async def _update(
        self, wanted: tuple[Any, ...], path: Sequence[tuple[Message, int, int]], names: dict[str, str]
    ) -> None:
        same = 0
        while same < min(len(wanted), len(self._path)) and wanted[same] == self._path[same]:
            same += 1
        with self.app.batch_update():
            old = [child for child in self.children if child is not self.writing]
            await self.remove_children(old[max(0, same - 1) :])
            by_name = {message.id: (message, place, places) for message, place, places in path}
            fresh = [self._widget(entry, by_name, names) for entry in wanted[max(1, same) :]]
            await self.mount_all(fresh, before=self.writing)
        self._path = wanted

    def _widget(self, entry: Any, by_name: dict[str, Any], names: dict[str, str]) -> Static | MessageView:
        if entry[0] == "earlier":
            return Earlier(entry[1])
        if entry[0] == "forgotten":
            return Forgotten(entry[1])
        message, place, places = by_name[entry[0]]
        return MessageView(message, place, places, names, self.marks)

"""Defines the key bindings and the actions of the application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.widgets import Label

from ..attachment import CannotRead, read_text
from ..desk import Desk, Refused
from ..export import as_markdown, file_name
from ..models import memory
from ..thinking import parted
from ..tree import Message
from ..worker import Worker
from .composer import Composer
from .dialogs import Ask, AskLong, Confirm, Keys
from .pickers import Branches, Conversations, Models
from .settings import ABSURD, SettingsScreen
from .transcript import Transcript


class Actions(App[None]):
    """The base class of the application, with its actions.

    Attributes:
        desk: the state of the chat.
        editing: the message that the text in the composer will replace, or None.
        home: the event loop and context for calls from other threads; None before the application
            runs.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+e", "edit", "Edit", priority=True),
        Binding("ctrl+r", "again", "Again", priority=True),
        Binding("ctrl+b", "branches", "Versions", priority=True),
        Binding("ctrl+n", "new", "New", priority=True),
        Binding("ctrl+o", "list", "Chats", priority=True),
        Binding("f4", "settings", "Settings", priority=True),
        Binding("f1", "keys", "Keys", priority=True),
        Binding("question_mark", "keys", show=False),
        Binding("escape", "escape", show=False),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+q", "leave", show=False, priority=True),
        Binding("ctrl+y", "copy", show=False, priority=True),
        Binding("ctrl+g", "go_on", show=False, priority=True),
        Binding("ctrl+t", "attach", show=False, priority=True),
        Binding("alt+left", "before", show=False, priority=True),
        Binding("alt+right", "after", show=False, priority=True),
        Binding("ctrl+home", "earlier", show=False, priority=True),
        Binding("pageup", "scroll(-1)", show=False, priority=True),
        Binding("pagedown", "scroll(1)", show=False, priority=True),
        Binding("f3", "system", show=False, priority=True),
        Binding("f5", "models", show=False, priority=True),
        Binding("f6", "light", show=False, priority=True),
        Binding("f7", "cache", show=False, priority=True),
        Binding("f9", "export", show=False, priority=True),
    ]

    desk: Desk
    worker: Worker
    composer: Composer
    editing: Message | None = None
    home: tuple[asyncio.AbstractEventLoop, Context] | None = None
    _is_closing = False
    _is_resumed = False
    _must_leave = False

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While a dialog is open, of the keys of this class allow only those that quit."""
        own = {binding.action.partition("(")[0] for binding in self.BINDINGS if isinstance(binding, Binding)}
        return len(self.screen_stack) == 1 or action not in own - {"interrupt", "leave"}

    async def show(self) -> None:
        """Update the screen."""
        raise NotImplementedError

    def busy(self, what: str | None, share: float | None = None) -> None:
        """Show a progress line; None hides it."""
        raise NotImplementedError

    def action_keys(self) -> None:
        self.push_screen(Keys())

    async def action_new(self) -> None:
        await self.attempt(self.desk.new)
        self.action_write()

    def action_list(self) -> None:
        """Show and focus the list; if it has the focus, go back to the composer."""
        if self.focused and self.query_one(Conversations) in self.focused.ancestors:
            self.action_write()
            return
        self.add_class("list")
        self.query_one("#conversations Input").focus()

    def action_write(self) -> None:
        self.remove_class("list")
        self.query_one(Composer).focus()

    @work
    async def action_rename(self) -> None:
        conversation = self._chosen()
        title = await self.push_screen_wait(Ask("A title for this conversation", conversation.title))
        if title is not None:
            await self.attempt(lambda: self.desk.rename(conversation, title))

    @work
    async def action_delete(self) -> None:
        conversation = self._chosen()
        if await self.push_screen_wait(Confirm(f"Delete “{conversation.title}”?")):
            await self.attempt(lambda: self.desk.delete(conversation))

    async def action_edit(self) -> None:
        asked = [message for message in self.desk.current.path if message.role == "user"]
        if asked:
            await self.action_edit_message(asked[-1].id)

    async def action_edit_message(self, id: str) -> None:  # noqa: A002
        message = self.desk.current.messages[id]
        if message.role != "user":
            await self.action_again_message(id)
            return
        self.editing = message
        number = sum(each.role == "user" for each in self.desk.current.path_to(id))
        self.query_one("#editing", Label).update(
            f"Editing message {number}: enter sends, esc leaves it as it was"
        )
        self.query_one(Composer).put(message.text)
        self.query_one(Composer).focus()
        await self.show()

    async def action_again(self) -> None:
        await self.attempt(self.desk.regenerate)

    async def action_again_message(self, id: str) -> None:  # noqa: A002
        await self.attempt(lambda: self.desk.regenerate(self.desk.current.messages[id]))

    async def action_go_on(self) -> None:
        """Continue the last reply."""
        await self.attempt(self.desk.go_on)

    async def action_go_on_message(self, id: str) -> None:  # noqa: A002
        await self.attempt(lambda: self.desk.go_on(self.desk.current.messages[id]))

    @work
    async def action_attach(self) -> None:
        """Add a text file to the message."""
        name = await self.push_screen_wait(Ask("A text file to add to your message: its path"))
        if name:
            try:
                self.query_one(Composer).attach(Path(name).name, read_text(name))
            except CannotRead as error:
                self.notify(str(error), title="Could not attach", severity="error", markup=False)

    def action_copy(self) -> None:
        replies = [message for message in self.desk.current.path if message.role == "assistant"]
        if replies:
            self.action_copy_message(replies[-1].id)

    def action_copy_message(self, id: str) -> None:  # noqa: A002
        text = self.desk.current.messages[id].text
        self.copy_to_clipboard(parted(text, self.query_one(Transcript).marks)[1] or text)
        self.notify("Copied.")

    async def action_before(self) -> None:
        """Switch to the previous branch at the last fork."""
        await self._at_last_fork(-1)

    async def action_after(self) -> None:
        await self._at_last_fork(1)

    async def action_before_message(self, id: str) -> None:  # noqa: A002
        await self._beside(self.desk.current.messages[id], -1)

    async def action_after_message(self, id: str) -> None:  # noqa: A002
        await self._beside(self.desk.current.messages[id], 1)

    @work
    async def action_branches(self) -> None:
        picked = await self.push_screen_wait(Branches(self.desk.current, self.query_one(Transcript).marks))
        if picked is not None:
            await self.attempt(lambda: self.desk.look_at(self.desk.current.messages[picked]))

    @work
    async def action_system(self) -> None:
        text = await self.push_screen_wait(AskLong("What the model is told first", self.desk.current.system))
        if text is not None:
            await self.attempt(lambda: self.desk.set_system(text))

    @work
    async def action_settings(self) -> None:
        settings = await self.push_screen_wait(SettingsScreen(self.desk.settings, self._most()))
        if settings is not None:
            await self.attempt(lambda: self.desk.set(settings))

    @work
    async def action_models(self) -> None:
        name = await self.push_screen_wait(Models())
        if name is not None:
            await self.attempt(lambda: self.desk.load(name or None))

    def action_light(self) -> None:
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"
        self.desk.other["theme"] = self.theme

    def action_cache(self) -> None:
        self.toggle_class("nocache")

    def action_export(self) -> None:
        path = (self.desk.library.folder or Path()) / "exports" / file_name(self.desk.current)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(as_markdown(self.desk.current), "utf-8")
        except OSError as error:
            self.notify(f"{error}", title="Could not export", severity="error", markup=False)
        else:
            self.notify(f"Written to {path}", markup=False)

    async def action_earlier(self) -> None:
        self.query_one(Transcript).show_all()
        await self.show()

    def action_scroll(self, by: int) -> None:
        transcript = self.query_one(Transcript)
        transcript.scroll_page_up() if by < 0 else transcript.scroll_page_down()

    def action_stop(self) -> None:
        self.desk.stop()

    async def action_escape(self) -> None:
        if self.editing is not None:
            self.editing = None
            self.query_one(Composer).put("")
            await self.show()
        elif not self.desk.stop():
            self.action_write()

    def action_interrupt(self) -> None:
        """Copy the selection; without one, stop the reply; without a reply, quit."""
        if text := self.screen.get_selected_text():
            self.copy_to_clipboard(text)
        elif not self.desk.stop():
            self.action_leave()

    def action_leave(self) -> None:
        """Save everything and quit; skips saving caches if there are none, or at a second call."""
        is_second, self._is_closing = self._is_closing, True
        if not is_second:
            self._note_draft()
        if is_second or not self.worker.is_loaded:
            self.desk.secure()
            self.exit()
            return
        self.busy("saving what the model remembers; ctrl+q again quits at once")
        self.desk.close()

    def leave(self) -> None:
        """Save and quit as soon as the screen is ready, unless that has begun. Thread-safe."""
        self._must_leave = True
        if self.home:
            loop, context = self.home
            loop.call_soon_threadsafe(self._leave_if_told, context=context)

    def secure(self) -> None:
        """Save everything at once. Thread-safe."""
        if not self._is_closing:
            self._note_draft()
        self.desk.secure()

    async def begin(self) -> None:
        """Restore the unsent message of the last run, and accept calls from other threads."""
        draft, edited = (self.desk.other.pop(name, "") for name in ("draft", "edited"))
        if edited in self.desk.current.messages:
            await self.action_edit_message(edited)
        if draft:
            self.query_one(Composer).put(draft)
        self._is_resumed = True
        self.home = asyncio.get_running_loop(), copy_context()
        self._leave_if_told()

    def _leave_if_told(self) -> None:
        if self._must_leave and not self._is_closing:
            self.action_leave()

    def _note_draft(self) -> None:
        if self._is_resumed:
            edited = self.editing.id if self.editing else ""
            self.desk.other |= {"draft": self.composer.content, "edited": edited}

    def _chosen(self) -> Any:
        """The conversation under the list's cursor if the list has the focus; else the current one."""
        panel = self.query_one(Conversations)
        name = panel.highlighted if self.focused and panel in self.focused.ancestors else None
        return next((each for each in self.desk.conversations if each.id == name), self.desk.current)

    def _most(self) -> int:
        """The most tokens for which this machine has memory, as far as that is known."""
        seen = self.desk.seen
        cells = max((sum(own.segments.values()) for own in seen.holdings), default=0) if seen else 0
        return int(memory() * 1e9 * cells / seen.nbytes) if seen and seen.nbytes and cells else ABSURD

    async def _at_last_fork(self, by: int) -> None:
        forks = [message for message, _, places in self.desk.current.placed() if places > 1]
        if forks:
            await self._beside(forks[-1], by)

    async def _beside(self, message: Message, by: int) -> None:
        """Switch to the branch `by` places from a message's."""
        beside = self.desk.current.beside(message)
        other = beside[(beside.index(message) + by) % len(beside)]
        if other is not message:
            await self.attempt(lambda: self.desk.look_at(other))

    async def attempt(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except Refused as error:
            self.notify(str(error), severity="warning", markup=False)
        await self.show()

"""The application: composes the screen and handles events from the worker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message as Notice
from textual.widgets import Footer, Input, Label, OptionList, ProgressBar, Static

from ..desk import Desk
from ..events import Changed, Ended, Event, Failed, Loading, Progress, Reading, Ready, Said, Seen, Stored
from ..fullness import Fullness
from ..library import Library, default_folder
from ..models import DEFAULT
from ..settings import Settings
from ..tree import Replied
from ..watchdog import Watchdog
from ..worker import Worker
from .actions import Actions
from .cellmap import CellMap, Chats, color_of
from .composer import Composer
from .figures import Figures, Headline
from .pickers import Conversations
from .strip import ContextStrip
from .terminal import SteadyDriver
from .transcript import Transcript

REFRESH = 1.0
"""Seconds after which the folder is looked at for what other chats have written."""

HELLO = """\
[b]Say something below.[/b] Then edit it (ctrl+e), make the reply again (ctrl+r), walk between the versions
(ctrl+b). On the right is the text that the model remembers, so that it reads nothing twice."""


class Chat(Actions):
    """The application. Conversations are on the left, the cache is on the right."""

    TITLE = "mlx_kvcache"
    CSS_PATH = Path(__file__).with_name("chat.tcss")
    ENABLE_COMMAND_PALETTE = False

    class Happened(Notice):
        """The worker has sent an event."""

    def __init__(
        self,
        folder: Path | None,
        model: str | None,
        system: str,
        adjust: Callable[[Settings], Settings] = lambda usual: usual,
        **options: Any,
    ) -> None:
        super().__init__()
        self.HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (60, "-narrow"), (110, "-wide")]
        self.library = Library(folder, self._complain)
        settings, other = self.library.load_state()
        if model is not None:
            other["model"] = model
        self.worker = Worker(self._tell, self.library.caches, **options)
        self.desk = Desk(self.library, self.worker, system, adjust(settings), other)
        self.model_name = self.desk.model or DEFAULT
        self._warned: set[str] = set()

    def get_driver_class(self) -> type[Driver]:
        usual = super().get_driver_class()
        return SteadyDriver if usual is LinuxDriver else usual

    def compose(self) -> ComposeResult:
        yield Static(id="title", markup=False)
        with Horizontal(id="main"):
            yield Conversations(self.desk.find)
            with Vertical(id="talk"):
                yield Transcript()
                with Horizontal(id="busy"):
                    yield Label("", markup=False)
                    yield ProgressBar(total=1, show_eta=False)
                yield Label("", id="editing", markup=False)
                self.composer = Composer()
                yield self.composer
            with Vertical(id="cache"):
                yield Label("What the model remembers", id="remembers")
                yield Headline()
                yield ContextStrip()
                yield CellMap()
                yield Figures()
        yield Footer(compact=True)

    async def on_mount(self) -> None:
        if (theme := self.desk.other.get("theme")) in self.available_themes:
            self.theme = theme
        for problem in self.library.problems:
            self.notify(problem, severity="warning", timeout=10, markup=False)
        # The model is the worker's first request, but the worker starts only after the first
        # refresh: its imports hold the interpreter for a while.
        self.desk.begin()
        self.query_one(Composer).focus()
        await self.show()
        self.call_after_refresh(self.worker.start)
        self.set_interval(REFRESH, lambda: self.library.refresh(self._tell))
        await self.begin()

    async def show(self) -> None:
        """Update the screen."""
        desk, path = self.desk, self.desk.current.path
        if self.editing and self.editing.id not in desk.current.messages:
            self.editing = None
        self.query_one("#title", Static).update(
            f"{desk.current.title or 'New conversation'} · {Path(self.model_name).name}"
        )
        names = {"user": "You", "assistant": Path(self.model_name).name}
        writing = desk.pending.text if desk.pending and desk.is_shown else None
        transcript = self.query_one(Transcript)
        start = path[-1].start if path else 0
        if writing is not None and desk.pending and desk.pending.progress:
            start = desk.pending.progress.start
        await transcript.show(desk.current.id, desk.current.placed(), names, writing, start)
        hello = transcript.query("#hello")
        if path:
            await hello.remove()
        elif not hello:
            await transcript.mount(Static(HELLO, id="hello"))
        self.query_one(Composer).remember([message.text for message in path if message.role == "user"])
        self.query_one("#editing", Label).set_class(self.editing is not None, "shown")
        self.show_list()
        self.show_cache()

    def show_list(self) -> None:
        self.query_one(Conversations).show(self.desk.current, lambda name: color_of(name, self.desk.order))

    def show_cache(self) -> None:
        desk, path = self.desk, self.desk.current.path
        titles = {conversation.id: conversation.title for conversation in desk.conversations}
        chats = Chats(desk.order, titles, desk.on_disk, desk.current.id)
        self.query_one(CellMap).show(desk.seen, chats)
        color = color_of(desk.current.id, desk.order)
        self.query_one(ContextStrip).show(desk.seen, desk.settings.capacity, color)
        reply = next((message.cost for message in reversed(path) if message.cost), None)
        if desk.pending and desk.is_shown:
            # Until the reply has begun there is nothing to tell of it, and nothing of another one is told.
            reply = desk.pending.progress.cost if desk.pending.progress else None
        self.query_one(Headline).show(reply)
        self.query_one(Figures).show(desk.seen, reply)

    @on(Happened)
    async def _happened(self) -> None:
        event = self.desk.heed_next()
        if self._is_closing and not isinstance(event, Failed | Ended):
            # The application is closing; no update is needed.
            return
        transcript = self.query_one(Transcript)
        match event:
            case Loading():
                self.busy(event.what, event.share)
            case Ready():
                self.model_name = event.model
                transcript.marks = event.marks
                self.busy(None)
                if event.notice:
                    self.notify(event.notice, severity="warning", timeout=10, markup=False)
                await self.show()
            case Reading() if event.total > 1:
                share = event.done / event.total
                what = f"reading your text: {event.done:,} of {event.total:,} tokens"
                self.busy(what if share < 1 else None, share)
            case Progress() if transcript.writing is not None and self.desk.is_shown:
                if event.cost.generated:
                    transcript.writing.note(str(event.cost))
                if event.start != transcript.start:
                    await self.show()
            case Stored():
                self.show_cache()
            case Changed():
                await self.show()
            case Said() if transcript.writing is not None and self.desk.is_shown:
                await transcript.writing.write(event.text)
            case Seen():
                self.show_cache()
            case Replied():
                self.busy(None)
                await self.show()
                self._warn()
            case Failed():
                self.busy(None)
                self.notify(
                    event.why, title=f"Could not {event.what}", severity="error", timeout=12, markup=False
                )
                if returned := self.desk.returned:
                    self.desk.returned = ""
                    self.query_one(Composer).put(returned)
                await self.show()
            case Ended():
                await asyncio.to_thread(self.library.close)
                self.exit()

    @on(Composer.Sent)
    async def _sent(self, message: Composer.Sent) -> None:
        def send() -> None:
            if self.editing is not None:
                self.desk.edit(self.editing, message.text)
            else:
                self.desk.ask(message.text)
            self.editing = None
            self.query_one(Composer).put("")

        await self.attempt(send)

    @on(Composer.Asked)
    def _asked(self) -> None:
        self.action_keys()

    @on(Input.Changed, "#conversations Input")
    def _searched(self) -> None:
        self.show_list()

    @on(Input.Submitted, "#conversations Input")
    def _search_ended(self) -> None:
        self.query_one("#conversations OptionList").focus()

    @on(OptionList.OptionSelected, "#conversations OptionList")
    async def _opened(self, event: OptionList.OptionSelected) -> None:
        await self.attempt(lambda: self.desk.open(str(event.option.id)))
        self.action_write()

    def _warn(self) -> None:
        """Say once of a chat that it is nearly full."""
        seen, name = self.desk.seen, self.desk.current.id
        if seen and name not in self._warned and (fullness := Fullness.of(seen)).is_nearly_full:
            self._warned.add(name)
            self.notify(f"This chat is {fullness.note}. f4 can raise the capacity.", severity="warning")

    def busy(self, what: str | None, share: float | None = None) -> None:
        """Show a progress line; None hides it."""
        line = self.query_one("#busy")
        line.set_class(what is not None, "shown")
        if what is not None:
            line.query_one(Label).update(what)
            line.query_one(ProgressBar).update(total=None if share is None else 1, progress=share or 0)

    def _tell(self, event: Event) -> None:
        self.desk.tell(event)
        self.post_message(self.Happened())

    def _complain(self, text: str) -> None:
        self.notify(text, severity="error", timeout=10, markup=False)


def run(folder: Path | None, model: str | None, system: str, adjust: Callable[[Settings], Settings]) -> int:
    """Run the application until the user quits. Returns the exit status."""
    app = Chat(folder or default_folder(), model, system, adjust)
    watchdog = Watchdog(app.leave, app.secure, app.exit)
    try:
        app.run()
    finally:
        # The application may have ended without the user quitting.
        app.secure()
        watchdog.finish()
    if app.worker.is_alive():
        # Everything is saved; a normal exit would wait for the worker.
        os._exit(app.return_code or 0)
    return app.return_code or 0

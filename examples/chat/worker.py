"""The thread that owns the model and makes all calls of MLX."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .events import Ended, Event, Failed, Ready
from .settings import Settings
from .tree import Conversation, Message

LOAD, CONFIGURE, REPLY = "load the model", "change the settings", "reply"
"""Values of `Failed.what` for actions that the desk must undo."""


class Worker(threading.Thread):
    """Processes requests one after another in a thread.

    Args:
        emit: receives events, in this thread.
        folder: the folder for caches, as in `Engine`.
        options: further options of `Engine`.
    """

    def __init__(self, emit: Callable[[Event], None], folder: Path | None, **options: Any) -> None:
        super().__init__(name="model", daemon=True)
        self._emit = emit
        self._folder = folder
        self._options = options
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._halt = threading.Event()
        self._engine: Any = None

    @property
    def is_loaded(self) -> bool:
        """Whether a model is loaded, so that `close` may have caches to save."""
        return self._engine is not None

    def load(self, name: str | None, settings: Settings) -> None:
        """Load another model. If that fails, the present one stays."""
        self._ask(LOAD, lambda: self._load(name, settings))

    def configure(self, settings: Settings) -> None:
        """Change the settings for later replies."""
        self._ask(CONFIGURE, lambda: self._configure(settings))

    def reply(self, conversation: Conversation, last: Message, name: str) -> None:
        """Answer a message of the user, or continue a reply. `name` is the id of the reply's message."""
        # A separate event for each reply, so that stopping one reply does not affect another.
        stop = self._halt = threading.Event()
        self._ask(REPLY, lambda: self._reply(conversation, last, name, stop))

    def warm(self, conversation: Conversation) -> None:
        """Load the current branch's cache into memory and report on the caches."""
        self._ask("look at the caches", lambda: self._engine and self._engine.warm(conversation, self._emit))

    def survey(self, conversations: Sequence[Conversation]) -> None:
        """Report how much of each conversation is on disk."""
        listed = list(conversations)
        self._ask("look at the disk", lambda: self._engine and self._engine.survey(listed, self._emit))

    def stop(self) -> None:
        """Stop the reply in progress after its current token."""
        self._halt.set()

    def close(self) -> None:
        """Stop the reply, save all caches, and end the thread."""
        self.stop()
        self._ask("keep the caches", self._close)
        self._jobs.put(None)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        self._emit(Ended())

    def _ask(self, what: str, do: Callable[[], Any]) -> None:
        def job() -> None:
            try:
                do()
            # After any error the thread must continue, and the user is told.
            except Exception as error:  # noqa: BLE001
                self._emit(Failed(what, str(error) or type(error).__name__))

        self._jobs.put(job)

    def _load(self, name: str | None, settings: Settings) -> None:
        from . import models

        model, tokenizer = models.load(name, self._emit)
        from .engine import Engine

        engine = Engine(model, tokenizer, settings, self._folder, **self._options)
        self._close()
        self._engine = engine
        self._emit(Ready(name or models.DEFAULT, engine.notice, engine.marks))

    def _configure(self, settings: Settings) -> None:
        from .engine import Engine

        before = self._engine
        if before is None:
            return
        if before.settings.caches == settings.caches:
            before.settings = settings
            return
        before.close()
        try:
            self._engine = Engine(before.model, before.tokenizer, settings, self._folder, **self._options)
        except Exception:
            self._engine = Engine(
                before.model, before.tokenizer, before.settings, self._folder, **self._options
            )
            raise

    def _reply(self, conversation: Conversation, last: Message, name: str, stop: threading.Event) -> None:
        if self._engine is None:
            raise RuntimeError("there is no model yet")
        self._emit(self._engine.reply(conversation, last, name, self._emit, stop.is_set))

    def _close(self) -> None:
        if self._engine:
            self._engine.close()
            self._engine = None

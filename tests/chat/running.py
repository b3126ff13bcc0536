"""The application under a pilot, with a model that is really there."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from textual.events import Key, Paste

from examples.chat.events import Event, Said
from examples.chat.settings import Settings
from examples.chat.ui.app import Chat
from examples.chat.ui.composer import Composer
from examples.chat.ui.transcript import MessageView

SETTINGS = Settings(capacity=512, temperature=0.0, max_tokens=8, memory=64)


LONG = 300
"""Seconds after which something does not happen, on the most loaded machine."""


class Observed(Chat):
    """Remembers what it has notified of, and can have replies written step by step.

    Attributes:
        pace: what the model's thread acquires after each part of a reply that it has told; None for at once.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.notices: list[str] = []
        self.pace: threading.Semaphore | None = None
        super().__init__(*arguments, **options)

    def notify(self, message: str, **options: Any) -> None:
        self.notices.append(message)
        super().notify(message, **options)

    def flow(self) -> None:
        """Let the reply go on to its end."""
        if self.pace is not None:
            pace, self.pace = self.pace, None
            pace.release()

    def _tell(self, event: Event) -> None:
        super()._tell(event)
        if isinstance(event, Said) and (pace := self.pace) is not None:
            pace.acquire()


def chat(folder: Path | None, model: Path, **options: Any) -> Observed:
    """An application whose clock counts, so that its figures are the same each time."""
    ticks = itertools.count()
    settings = replace(SETTINGS, **options)
    return Observed(folder, str(model), "Be brief.", lambda usual: settings, clock=lambda: next(ticks) / 64)


@asynccontextmanager
async def running(
    folder: Path | None, model: Path, size: tuple[int, int] = (110, 30), **options: Any
) -> AsyncIterator[Any]:
    app = chat(folder, model, **options)
    async with app.run_test(size=size) as pilot:
        try:
            await ready(pilot)
            yield pilot
        finally:
            # A thread that went on would compute beside the tests that follow.
            app.flow()
            app.worker.close()
            await asyncio.to_thread(app.worker.join)


@asynccontextmanager
async def endless(folder: Path | None, model: Path, **options: Any) -> AsyncIterator[Any]:
    """The application while a reply is being written that ends only when it is stopped.

    A part of it is there. `more` adds the next, so that the screen is never behind.
    """
    async with running(folder, model, max_tokens=1 << 30, capacity=None, **options) as pilot:
        pilot.app.pace = threading.Semaphore(0)
        await write(pilot, "Hello")
        await until(pilot, lambda: pilot.app.desk.pending and pilot.app.desk.pending.text)
        yield pilot


async def more(pilot: Any) -> None:
    """Wait until the next part of the reply is there."""
    written = len(pilot.app.desk.pending.text)
    pilot.app.pace.release()
    await until(pilot, lambda: len(pilot.app.desk.pending.text) > written)


async def ready(pilot: Any) -> None:
    """Wait until the model is loaded."""
    await until(pilot, lambda: pilot.app.worker.ident is not None)
    await idle(pilot)


async def idle(pilot: Any) -> None:
    """Wait until the model has done what it was asked for, and the screen shows it."""
    done = threading.Event()
    pilot.app.worker._jobs.put(done.set)
    pilot.app.flow()
    assert await asyncio.to_thread(done.wait, LONG)
    await until(pilot, lambda: pilot.app.desk.pending is None)
    await pilot.pause()


async def until(pilot: Any, condition: Callable[[], Any]) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < LONG, "it did not happen"
        await pilot.pause()


async def say(pilot: Any, text: str) -> None:
    """Type and send, and wait for the reply."""
    await write(pilot, text)
    await idle(pilot)


async def write(pilot: Any, text: str) -> None:
    """Paste and send. A pilot takes a twentieth of a second for each key."""
    composer = pilot.app.query_one(Composer)
    composer.focus()
    composer.post_message(Paste(text))
    await pilot.press("enter")


async def press(pilot: Any, *keys: str) -> None:
    """Press keys, one right after another. A pilot waits for a twentieth of a second after each."""
    for key in keys:
        pilot.app._driver.send_message(Key(key, None))
    await pilot.pause()


async def typed(pilot: Any, text: str) -> None:
    """Replace what is in the field that has the focus, by keys. The text is pasted, as in `write`."""
    await press(pilot, "ctrl+a", "ctrl+k", "ctrl+u")
    pilot.app.post_message(Paste(text))
    await pilot.pause()


async def dialog(pilot: Any, *keys: str) -> None:
    """Open a dialog by keys, and wait until a field of it has the focus."""
    await pilot.press(*keys)
    await until(pilot, lambda: len(pilot.app.screen_stack) == 2 and pilot.app.focused)


async def closed(pilot: Any) -> None:
    """Wait until no dialog is open, and what it asked for is done."""
    await until(pilot, lambda: len(pilot.app.screen_stack) == 1)
    await idle(pilot)


def texts(pilot: Any) -> list[str]:
    return [message.text for message in pilot.app.desk.current.path if message.role == "user"]


def shown(pilot: Any) -> list[str]:
    return [view.message.text for view in pilot.app.query(MessageView)]


def notices(pilot: Any) -> str:
    return "\n".join(pilot.app.notices)

"""The application under a pilot, with a model that is really there."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.chat.settings import Settings
from examples.chat.ui.app import Chat
from examples.chat.ui.transcript import MessageView

SETTINGS = Settings(capacity=512, temperature=0.0, max_tokens=8, memory=64)


class Observed(Chat):
    """Remembers what it has notified of."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.notices: list[str] = []
        super().__init__(*arguments, **options)

    def notify(self, message: str, **options: Any) -> None:
        self.notices.append(message)
        super().notify(message, **options)


def chat(folder: Path | None, model: Path, **options: Any) -> Observed:
    """An application whose clock counts, so that its figures are the same each time."""
    ticks = itertools.count()
    settings = replace(SETTINGS, **options)
    return Observed(folder, str(model), "Be brief.", lambda usual: settings, clock=lambda: next(ticks) / 64)


@asynccontextmanager
async def running(
    folder: Path | None, model: Path, size: tuple[int, int] = (120, 40), **options: Any
) -> AsyncIterator[Any]:
    app = chat(folder, model, **options)
    async with app.run_test(size=size) as pilot:
        await ready(pilot)
        yield pilot
        app.worker.stop()


async def ready(pilot: Any) -> None:
    """Wait until the model is loaded."""
    await until(pilot, lambda: pilot.app.worker.ident is not None)
    await idle(pilot)


async def idle(pilot: Any) -> None:
    """Wait until the model has done what it was asked for, and the screen shows it."""
    done = threading.Event()
    pilot.app.worker._jobs.put(done.set)
    assert await asyncio.to_thread(done.wait, 60)
    await until(pilot, lambda: pilot.app.desk.pending is None)
    await pilot.pause()


async def until(pilot: Any, condition: Callable[[], Any]) -> None:
    for _ in range(5000):
        if condition():
            return
        await pilot.pause()
    raise AssertionError("it did not happen")


async def say(pilot: Any, text: str) -> None:
    """Type and send, and wait for the reply."""
    await write(pilot, text)
    await idle(pilot)


async def write(pilot: Any, text: str) -> None:
    pilot.app.query_one("#composer").focus()
    await pilot.press(*("space" if c == " " else c for c in text), "enter")


def texts(pilot: Any) -> list[str]:
    return [message.text for message in pilot.app.desk.current.path if message.role == "user"]


def shown(pilot: Any) -> list[str]:
    return [view.message.text for view in pilot.app.query(MessageView)]


def notices(pilot: Any) -> str:
    return "\n".join(pilot.app.notices)

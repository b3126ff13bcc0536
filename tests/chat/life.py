"""Somebody who chats for hours: all actions at random, from a seed, on the desk and its worker."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.chat.desk import Desk, Refused
from examples.chat.events import Ended, Event, Failed, Ready, Said
from examples.chat.library import Library
from examples.chat.settings import Settings
from examples.chat.worker import Worker

from .fresh import difference_to_fresh

TEXT = "the of and cache token window a key value 日本 שלום 👩‍👩‍👧 \x1b[2J <|im_end|> **bold** ``` # |"


class Life:
    """A user.

    Attributes:
        failures: what could not be done, by what was said about it.
        differences: of checked branches to fresh computations.
    """

    def __init__(self, folder: Path, model: Path, seed: int, settings: Settings) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.model = str(model)
        self.settings = settings
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.failures: list[str] = []
        self.differences: list[float] = []
        self.most_bytes = 0
        self.start()

    def start(self) -> None:
        self.library = Library(self.folder, self.failures.append)
        self.worker = Worker(self.events.put, self.library.caches)
        self.worker.start()
        settings, other = self.library.load_state()
        self.failures += self.library.problems
        self.desk = Desk(self.library, self.worker, "Be brief.", (other and settings) or self.settings, other)
        self.desk.other["model"] = self.model
        self.desk.begin()
        assert any(isinstance(event, Ready) for event in self.settle())

    def settle(self) -> list[Event]:
        """Let the worker finish, and heed what it tells."""
        done = threading.Event()
        self.worker._jobs.put(done.set)
        assert done.wait(60)
        return self.heed()

    def heed(self) -> list[Event]:
        seen = []
        while not self.events.empty():
            seen.append(self.events.get())
            self.desk.heed(seen[-1])
            if isinstance(seen[-1], Failed):
                self.failures.append(seen[-1].why)
        if self.desk.seen:
            self.most_bytes = max(self.most_bytes, self.desk.seen.nbytes)
        return seen

    def text(self) -> str:
        length = self.random.choice([1, 3, 8, 20])
        return "x" + " ".join(self.random.choices(TEXT.split(), k=length))

    def turn(self) -> None:
        """Do something, mostly with a reply."""
        actions = {
            self.ask: 40,
            self.edit: 12,
            self.again: 10,
            self.stopped: 6,
            self.go_on: 6,
            self.branch: 12,
            self.new: 4,
            self.other: 8,
            self.rename: 2,
            self.delete: 2,
            self.system: 1,
            self.set: 2,
            self.book: 1,
            self.restart: 1,
        }
        [action] = self.random.choices(list(actions), list(actions.values()))
        try:
            action()
        except Refused as error:
            self.failures.append(str(error))
        self.settle()

    def check(self) -> bool:
        """Compare the branch that is looked at with a fresh computation. Whether there is one."""
        if not self.desk.current.path:
            return False
        result: list[tuple[int, float]] = []
        engine, current = self.worker._engine, self.desk.current
        self.worker._ask("check", lambda: result.append(difference_to_fresh(engine, current)))
        self.settle()
        assert result, self.failures[-1]
        self.differences.append(result[0][1])
        return result[0][0] > 0

    def ask(self) -> None:
        self.desk.ask(self.text())

    def edit(self) -> None:
        asked = [message for message in self.desk.current.path if message.role == "user"]
        if asked:
            self.desk.edit(self.random.choice(asked), self.text())

    def again(self) -> None:
        if self.desk.current.path:
            self.desk.regenerate(self.random.choice(self.desk.current.path))

    def stopped(self) -> None:
        self.ask()
        while (event := self.events.get()) and not isinstance(event, Said | Failed):
            self.desk.heed(event)
        self.desk.heed(event)
        self.desk.stop()

    def go_on(self) -> None:
        self.desk.go_on()

    def branch(self) -> None:
        if self.desk.current.messages:
            self.desk.look_at(self.random.choice(list(self.desk.current.messages.values())))

    def new(self) -> None:
        self.desk.new()

    def other(self) -> None:
        if self.desk.conversations:
            self.desk.open(self.random.choice(self.desk.conversations).id)

    def rename(self) -> None:
        self.desk.rename(self.desk.current, self.text())

    def delete(self) -> None:
        self.desk.delete(self.desk.current)

    def system(self) -> None:
        self.desk.set_system(self.text())

    def set(self) -> None:
        chosen: Any = self.random.choice(
            [{"temperature": 0.0}, {"temperature": 1.0}, {"capacity": 96}, {"capacity": 200}]
        )
        self.desk.set(replace(self.desk.settings, **chosen))

    def book(self) -> None:
        self.desk.ask("word " * 1000)

    def restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        self.desk.close()
        self.worker.join(60)
        assert any(isinstance(event, Ended) for event in self.heed())
        self.library.close()

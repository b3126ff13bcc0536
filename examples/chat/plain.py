"""Runs the chat on lines of text, without a screen."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_kvcache import CacheError

from .attachment import CannotRead, read_text
from .engine import Engine
from .events import Event, Said
from .fullness import Fullness
from .prompt import TooLong
from .tree import Conversation, Message, amount, new_id

HELP = """\
/undo             take the last message and its answer back
/edit TEXT        say TEXT instead of the last message
/edit N TEXT      say TEXT instead of message N, and go on from there
/regenerate       answer the last message again
/continue         go on with a reply that was cut
/attach FILE TEXT say TEXT with the text of a file
/fork             go on in a new version; the old one stays as it is
/switch N         go to version N
/stats            what the model remembers, and what that has saved
/help             this list
/quit             the end"""


class Plain:
    """A conversation with branches, and the commands on it."""

    def __init__(self, engine: Engine, system: str) -> None:
        self.engine = engine
        self.conversation = Conversation(system=system)
        self.branches: list[str | None] = [None]
        self.current = 0

    @property
    def questions(self) -> list[Message]:
        """The user's messages of this branch."""
        return [message for message in self.conversation.path if message.role == "user"]

    def handle(self, line: str) -> bool:
        """Process one line. Returns False when the user quits."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._say(line, self.conversation.leaf)
            return True
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], object]] = {
            "undo": self._undo,
            "edit": self._edit,
            "regenerate": self._regenerate,
            "continue": self._continue,
            "attach": self._attach,
            "fork": self._fork,
            "switch": self._switch,
            "stats": self._stats,
            "help": lambda _: print(HELP),
        }
        if name == "quit":
            return False
        if name not in commands:
            print(f"There is no /{name}; /help lists the commands.")
            return True
        try:
            commands[name](rest.strip())
        except (IndexError, CannotRead) as error:
            print(f"[{error}]")
        return True

    def _say(self, text: str, parent: str | None) -> None:
        before = self.conversation.leaf
        message = self.conversation.say(text, parent)
        if not self._answer(message):
            self.conversation.take_back(message, before)
        self.branches[self.current] = self.conversation.leaf

    def _answer(self, message: Message) -> bool:
        """Answer a message, or continue a reply. Returns False if that failed."""
        name = new_id()
        try:
            with _interruptible() as is_stopped:
                replied = self.engine.reply(self.conversation, message, name, self._print, is_stopped)
        except (TooLong, CacheError) as error:
            print(f"[{error}]")
            return False
        asked = message if message.role == "user" else self.conversation.messages[str(message.parent)]
        self.conversation.take(asked, name, replied)
        print(f"{' [stopped]' if replied.ended == 'stopped' else ''}\n  [{replied.cost}]")
        fullness = Fullness.of(self.engine.watch.seen())
        if fullness.is_nearly_full:
            print(f"  [{fullness.count}, {fullness.note}]")
        return True

    def _print(self, event: Event) -> None:
        if isinstance(event, Said):
            print(event.text, end="", flush=True)

    def _question(self, number: int) -> Message:
        if not 1 <= number <= len(self.questions):
            raise IndexError(f"there is no message {number}; there are {len(self.questions)}")
        return self.questions[number - 1]

    def _undo(self, _: str) -> None:
        message = self._question(len(self.questions))
        self.branches[self.current] = self.conversation.leaf = message.parent
        print(f"Taken back: {message.text}")

    def _edit(self, rest: str) -> None:
        first, _, text = rest.partition(" ")
        number = len(self.questions)
        if first.isdigit() and text:
            number, rest = int(first), text
        if not rest:
            print("/edit needs the new text.")
            return
        self._say(rest, self._question(number).parent)

    def _regenerate(self, _: str) -> None:
        self._answer(self._question(len(self.questions)))
        self.branches[self.current] = self.conversation.leaf

    def _continue(self, _: str) -> None:
        leaf = self.conversation.path[-1:]
        if not leaf or not leaf[0].ended:
            raise IndexError("the last reply is complete; only a reply that was cut can be continued")
        print(leaf[0].text, end="", flush=True)
        self._answer(leaf[0])
        self.branches[self.current] = self.conversation.leaf

    def _attach(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        self._say(f"{text}\n\n{Path(name).name}:\n\n{read_text(name)}".strip(), self.conversation.leaf)

    def _fork(self, _: str) -> None:
        self.branches.append(self.conversation.leaf)
        self.current = len(self.branches) - 1
        print(f"Version {self.current + 1} of {len(self.branches)}; what was said is shared, not copied.")

    def _switch(self, rest: str) -> None:
        if not rest.isdigit() or not 1 <= int(rest) <= len(self.branches):
            raise IndexError(f"there is no version {rest or '?'}; there are 1 to {len(self.branches)}")
        self.current = int(rest) - 1
        self.conversation.leaf = self.branches[self.current]
        print(f"Version {rest} of {len(self.branches)}.")

    def _stats(self, _: str) -> None:
        seen = self.engine.watch.seen()
        fullness = Fullness.of(seen)
        print(f"{fullness.count} in this version, {fullness.note}")
        print(f"{len(self.branches)} versions, {amount(seen.nbytes / 1e6)} MB for them all")
        totals = seen.totals
        print(f"so far {totals.headline}; wrote {totals.generated:,}, forgot {totals.forgotten:,}")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C stop the answer instead of the program."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)

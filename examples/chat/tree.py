"""A conversation: a tree of messages, of which one branch is looked at."""

from __future__ import annotations

import time
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from .reading import Piece, Turn

TITLE = 40
"""Characters of a title that is taken from the first message."""


@dataclass(frozen=True)
class Cost:
    """What a reply cost: tokens reused, read, written and forgotten, and seconds.

    Attributes:
        first_token: seconds until the first token, `seconds` from there to the last.
        saved: seconds that reading the reused tokens would have taken, by the speed of reading seen.
    """

    reused: int = 0
    prefilled: int = 0
    generated: int = 0
    forgotten: int = 0
    first_token: float = 0.0
    seconds: float = 0.0
    saved: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second, from the first to the last; 0 where there were fewer than two."""
        return (self.generated - 1) / self.seconds if self.seconds > 0 and self.generated > 1 else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        forgotten = f"{self.forgotten} forgotten, " if self.forgotten else ""
        return (
            f"{self.reused} tokens reused, {self.prefilled} prefilled, {forgotten}{self.generated} generated "
            f"at {self.rate:.1f} tokens/s"
        )


@dataclass(frozen=True)
class Replied:
    """A reply that is over.

    Attributes:
        text: all of it.
        piece: the reply as it was written; None if it was not begun, or if only its text is known.
        read: how the message before it was read; None where that cannot be told from others.
        start: how many messages are forgotten at its beginning and at its end.
        ended: as of `Message`.
    """

    text: str
    piece: Piece | None
    read: Piece | None
    start: tuple[int, int]
    cost: Cost | None
    ended: str = ""


@dataclass
class Message:
    """One message. Its text never changes, so that branches can share it.

    Attributes:
        parent: the message before it; None for the first.
        piece: as the model read or wrote it; None where it has not been read alone.
        start: how many messages from the first are forgotten where this one is the last.
        ended: why a reply is shorter than the model's own: "stopped", "length" or "capacity".
    """

    id: str
    parent: str | None
    role: str
    text: str
    piece: Piece | None = None
    start: int = 0
    cost: Cost | None = None
    ended: str = ""

    @property
    def turn(self) -> Turn:
        return Turn(self.role, self.text, self.piece)


@dataclass
class Conversation:
    """Messages by their names, and the last one of the branch that is looked at.

    Attributes:
        reader: the tokenizer that the messages' pieces are of.
        gone: names of messages that were taken back, which must not come back from a file.
    """

    id: str = field(default_factory=lambda: new_id())
    title: str = ""
    system: str = ""
    leaf: str | None = None
    created: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)
    messages: dict[str, Message] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    reader: str = ""

    @property
    def path(self) -> list[Message]:
        """The messages of the branch, the first one first."""
        return self.path_to(self.leaf)

    def path_to(self, id: str | None) -> list[Message]:  # noqa: A002
        path = []
        while id is not None:
            path.append(self.messages[id])
            id = path[-1].parent  # noqa: A001
        return path[::-1]

    def children(self, id: str | None) -> list[Message]:  # noqa: A002
        """What was said after a message, the oldest first."""
        return [message for message in self.messages.values() if message.parent == id]

    def placed(self) -> list[tuple[Message, int, int]]:
        """The messages of the branch, each with its place among those beside it, from 1, and their number."""
        beside: dict[str | None, list[str]] = {}
        for message in self.messages.values():
            beside.setdefault(message.parent, []).append(message.id)
        return [(m, beside[m.parent].index(m.id) + 1, len(beside[m.parent])) for m in self.path]

    def beside(self, message: Message) -> list[Message]:
        """A message and those in its place on other branches."""
        return self.children(message.parent)

    def leaves(self) -> Iterator[Message]:
        """The last message of each branch."""
        parents = {message.parent for message in self.messages.values()}
        yield from (message for message in self.messages.values() if message.id not in parents)

    def say(self, text: str, parent: str | None) -> Message:
        """Add a message of the user behind `parent`, and look at it."""
        start = self.messages[parent].start if parent else 0
        message = Message(new_id(), parent, "user", text, start=start)
        if not self.title:
            self.title = titled(text)
        self.add(message)
        return message

    def add(self, message: Message) -> None:
        self.messages[message.id] = message
        self.leaf = message.id
        self.changed = time.time()

    def read_by(self, reader: str) -> None:
        """Have the messages read anew, where another tokenizer than this one has read them."""
        if self.reader != reader:
            self.reader = reader
            for message in self.messages.values():
                message.piece = None

    def take(self, last: Message, name: str, replied: Replied) -> None:
        """Note a reply to `last`, and look at it unless another branch is looked at by now."""
        last.piece, last.start = replied.read or last.piece, replied.start[0]
        if replied.piece is None and not replied.text:
            return
        looked_at = self.leaf
        start, cost, ended = replied.start[1], replied.cost, replied.ended
        self.add(Message(name, last.id, "assistant", replied.text, replied.piece, start, cost, ended))
        if looked_at not in {last.id, *(message.id for message in self.children(last.id))}:
            self.leaf = looked_at

    def take_back(self, message: Message, leaf: str | None) -> None:
        """Remove a message that nothing has followed yet, and look at what ends with `leaf` again."""
        del self.messages[message.id]
        self.gone.append(message.id)
        if self.leaf == message.id:
            self.leaf = leaf

    def look_at(self, id: str | None) -> None:  # noqa: A002
        """Look at the branch of a message, down to the newest end."""
        while children := self.children(id):
            id = children[-1].id  # noqa: A001
        self.leaf = id

    def salt(self, path: list[Message]) -> tuple[str, int] | None:
        """What tells a cache that has forgotten from a fresh one of the same tokens."""
        for before, message in zip([None, *path[:-1]][::-1], path[::-1], strict=True):
            if message.start > (before.start if before else 0):
                return message.id, message.start
        return None

    def as_json(self) -> dict[str, Any]:
        return {"version": 1} | asdict(self) | {"messages": [asdict(m) for m in self.messages.values()]}

    @classmethod
    def of(cls, saved: Any) -> Conversation:
        """From JSON. Raises ValueError where it is not what `as_json` gave."""
        try:
            if saved["version"] != 1:
                raise ValueError(f"version {saved['version']} is not known here")
            messages = [_message(each) for each in saved["messages"]]
            names = ("id", "title", "system", "leaf", "created", "changed", "gone", "reader")
            conversation = cls(**{name: saved[name] for name in names}, messages={m.id: m for m in messages})
            conversation._check()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a conversation: {error!r}") from None
        return conversation

    def _check(self) -> None:
        """Parents come before their children, so that every path ends."""
        seen: set[str | None] = {None}
        for message in self.messages.values():
            if message.parent not in seen or not isinstance(message.text, str):
                raise ValueError(f"message {message.id} follows {message.parent}, which is not before it")
            seen.add(message.id)
        if self.leaf not in seen:
            raise ValueError(f"the branch ends with {self.leaf}, which is not there")


def _message(saved: dict[str, Any]) -> Message:
    piece, cost = saved["piece"], saved["cost"]
    kept = {
        "piece": Piece(str(piece[0]), tuple(map(int, piece[1])), (int(piece[2][0]), int(piece[2][1])))
        if piece
        else None,
        "cost": Cost(**cost) if cost else None,
    }
    return Message(**(saved | kept))


def titled(text: str) -> str:
    """A title for a conversation that begins with this."""
    first = " ".join(cleaned(text).split())
    return first if len(first) <= TITLE else first[: TITLE - 1].rstrip() + "…"


def cleaned(text: str) -> str:
    """Text without what a terminal would obey: control characters but line ends and tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def new_id() -> str:
    return uuid.uuid4().hex[:12]

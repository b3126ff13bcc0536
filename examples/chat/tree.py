"""A conversation as a tree of messages; one branch is current."""

from __future__ import annotations

import time
import unicodedata
import uuid
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from .reading import Piece, Turn

TITLE = 40
"""The maximum length of a title made from the first message, in characters."""


@dataclass(frozen=True)
class Cost:
    """The statistics of a reply: tokens reused, prefilled, generated and forgotten, and times.

    Attributes:
        first_token: seconds until the first token.
        seconds: seconds from the first token to the last.
        saved: seconds saved by reuse, estimated with the prefill speed measured so far.
    """

    reused: int = 0
    prefilled: int = 0
    generated: int = 0
    forgotten: int = 0
    first_token: float = 0.0
    seconds: float = 0.0
    saved: float = 0.0

    @property
    def read(self) -> int:
        """The number of tokens that the model had before it answered, read now or reused."""
        return self.reused + self.prefilled

    @property
    def headline(self) -> str:
        saved = f", saved {amount(self.saved)} s" if self.saved else ""
        return f"reused {self.reused:,} of {self.read:,} tokens{saved}"

    @property
    def details(self) -> str:
        forgot = f"; forgot the oldest {self.forgotten:,}" if self.forgotten else ""
        wrote = f"wrote {self.generated:,} at {amount(self.rate)} tokens/s"
        return f"{wrote}, the first after {amount(self.first_token)} s{forgot}"

    @property
    def rate(self) -> float:
        """Tokens per second after the first token; 0 for fewer than two tokens."""
        return (self.generated - 1) / self.seconds if self.seconds > 0 and self.generated > 1 else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return f"{self.headline}; {self.details}"


@dataclass(frozen=True)
class Replied:
    """A finished reply.

    Attributes:
        text: its text.
        piece: the reply with its tokens; None if it has none, or if only its text is known.
        read: the message before it, as the model read it; None if it cannot be separated from
            earlier messages.
        start: the numbers of forgotten messages when the reply began and when it ended.
        ended: as in `Message`.
    """

    text: str
    piece: Piece | None
    read: Piece | None
    start: tuple[int, int]
    cost: Cost | None
    ended: str = ""


@dataclass
class Message:
    """A message. Its text never changes, so that branches can share it.

    Attributes:
        parent: the id of the message before it; None for the first.
        piece: the message as the model read or wrote it; None if it has not been read separately.
        start: the number of messages, from the first on, that are forgotten on a branch that ends
            with this message.
        ended: why a reply is incomplete: "stopped", "length" or "capacity"; "" if it is complete.
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
    """A tree of messages by id; `leaf` is the last message of the current branch.

    Attributes:
        reader: a fingerprint of the tokenizer that made the messages' pieces.
        gone: ids of messages that were taken back; a merge with the file must not restore them.
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
        """The messages of the current branch, from the first to the last."""
        return self.path_to(self.leaf)

    def path_to(self, id: str | None) -> list[Message]:  # noqa: A002
        path = []
        while id is not None:
            path.append(self.messages[id])
            id = path[-1].parent  # noqa: A001
        return path[::-1]

    def children(self, id: str | None) -> list[Message]:  # noqa: A002
        """The messages that follow a message directly, the oldest first."""
        return [message for message in self.messages.values() if message.parent == id]

    def placed(self) -> list[tuple[Message, int, int]]:
        """The messages of the current branch, each with its place among its siblings, and their number."""
        beside: dict[str | None, list[str]] = {}
        for message in self.messages.values():
            beside.setdefault(message.parent, []).append(message.id)
        return [(m, beside[m.parent].index(m.id) + 1, len(beside[m.parent])) for m in self.path]

    def beside(self, message: Message) -> list[Message]:
        """A message and its siblings on other branches."""
        return self.children(message.parent)

    def leaves(self) -> Iterator[Message]:
        """The last message of each branch."""
        parents = {message.parent for message in self.messages.values()}
        yield from (message for message in self.messages.values() if message.id not in parents)

    def say(self, text: str, parent: str | None) -> Message:
        """Add a message of the user after `parent`, and make its branch current."""
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
        """Drop all pieces if another tokenizer made them."""
        if self.reader != reader:
            self.reader = reader
            for message in self.messages.values():
                message.piece = None

    def take(self, last: Message, name: str, replied: Replied) -> None:
        """Add a reply to `last`, and make its branch current unless the user has switched to another."""
        last.piece, last.start = replied.read or last.piece, replied.start[0]
        if replied.piece is None and not replied.text:
            return
        looked_at = self.leaf
        start, cost, ended = replied.start[1], replied.cost, replied.ended
        self.add(Message(name, last.id, "assistant", replied.text, replied.piece, start, cost, ended))
        if looked_at not in {last.id, *(message.id for message in self.children(last.id))}:
            self.leaf = looked_at

    def merge(self, other: Conversation) -> None:
        """Add what another chat has added to this conversation; if it goes on from the leaf, follow it."""
        for message in other.messages.values():
            is_known = message.parent is None or message.parent in self.messages
            if is_known and message.id not in self.gone:
                self.messages.setdefault(message.id, message)
        if other.changed > self.changed:
            self.title, self.changed = other.title, other.changed

    def take_back(self, message: Message, leaf: str | None) -> None:
        """Remove a message without replies; the branch that ends with `leaf` becomes current again."""
        del self.messages[message.id]
        self.gone.append(message.id)
        if self.leaf == message.id:
            self.leaf = leaf

    def look_at(self, id: str | None) -> None:  # noqa: A002
        """Switch to the branch of a message, following the newest message at each fork."""
        while children := self.children(id):
            id = children[-1].id  # noqa: A001
        self.leaf = id

    def salt(self, path: list[Message]) -> tuple[str, int] | None:
        """The salt that separates a cache with forgotten messages from a fresh one; None if none are."""
        for before, message in zip([None, *path[:-1]][::-1], path[::-1], strict=True):
            if message.start > (before.start if before else 0):
                return message.id, message.start
        return None

    def as_json(self) -> dict[str, Any]:
        return {"version": 1} | asdict(self) | {"messages": [asdict(m) for m in self.messages.values()]}

    @classmethod
    def of(cls, saved: Any) -> Conversation:
        """Read a conversation from JSON. Raises ValueError if `as_json` did not write it."""
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
        """Check that parents come before their children, so that every path ends."""
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


def amount(number: float) -> str:
    """Write a measured number: with a decimal below 10, otherwise whole and in groups of three digits."""
    return f"{number:.1f}" if number < 9.95 else f"{number:,.0f}"


def titled(text: str) -> str:
    """Make a title from a conversation's first message."""
    first = " ".join(cleaned(text).split())
    return first if len(first) <= TITLE else first[: TITLE - 1].rstrip() + "…"


def cleaned(text: str) -> str:
    """Remove control characters that a terminal would execute; keeps line ends and tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def new_id() -> str:
    return uuid.uuid4().hex[:12]

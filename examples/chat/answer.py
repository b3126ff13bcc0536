"""Collects a reply while the model generates it, and reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .events import Event, Reading, Said
from .prompt import Prompt
from .reading import Piece
from .tree import Message

PAUSE = 1 / 30
"""The minimum time between two reported parts of a reply, in seconds: a screen shows no more."""


class Stopped(Exception):
    """The user stopped the reply."""


@dataclass
class Answer:
    """A reply in progress.

    Attributes:
        text, written: the reply without and with its stop token.
        begun: the number of its tokens that were there before, of a reply that is continued.
        reused, read: the numbers of prompt tokens that were cached and computed.
        begin, first, last: times of the start, the first new token and the newest token, in seconds.
        ended: why the reply is incomplete; "" if it is not.
    """

    prompt: Prompt
    emit: Callable[[Event], None]
    is_stopped: Callable[[], bool]
    clock: Callable[[], float]
    begin: float
    text: str = ""
    written: str = ""
    tokens: list[int] = field(default_factory=list)
    reused: int = 0
    read: int = 0
    begun: int = 0
    first: float = 0.0
    last: float = 0.0
    ended: str = ""
    _untold: str = ""
    _told: float = 0.0

    def __post_init__(self) -> None:
        self.first = self.last = self.clock()
        self.reused = self.prompt.session.reused

    def go_on(self, reply: Message) -> None:
        """Begin with a reply that was cut."""
        self.text = reply.text
        self.written = reply.piece.text if reply.piece else reply.text.removeprefix(self.prompt.opening)
        self.tokens = list(self.prompt.written)
        self.begun = len(self.tokens)

    @property
    def piece(self) -> Piece | None:
        """The reply with its tokens; None before its first token."""
        return Piece(self.written, tuple(self.tokens)) if self.tokens else None

    @property
    def generated(self) -> int:
        """The number of new tokens."""
        return len(self.tokens) - self.begun

    def progress(self, done: int, total: int) -> None:
        """Report the progress of the prefill. Raises Stopped if the user stopped it."""
        self.read = done
        self.emit(Reading(done, total))
        if self.is_stopped() and done < total:
            raise Stopped

    def tell(self) -> None:
        """Report the text that has not been reported yet."""
        if self._untold:
            self.emit(Said(self._untold))
            self._untold, self._told = "", self.last

    def add(self, part: Any, tokenizer: Any) -> None:
        """Add a token from mlx-lm's `stream_generate`. Raises Stopped if the user stopped the reply."""
        self.last = self.clock()
        if not self.generated:
            self.first = self.last
        # Of a reply whose thinking the prompt begins, the text shows that it is thinking.
        text = part.text if self.tokens else self.prompt.opening + part.text
        self.tokens.append(part.token)
        self.text += text
        self.written += part.text
        self._untold += text
        if part.finish_reason is not None or self.last - self._told >= PAUSE:
            self.tell()
        if part.finish_reason == "stop":
            self.written += tokenizer.decode([part.token], skip_special_tokens=False)
        elif part.finish_reason == "length":
            self.ended = "length"
        elif self.is_stopped():
            raise Stopped

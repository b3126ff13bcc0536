"""A reply under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .events import Event, Reading, Said
from .prompt import Prompt
from .reading import Piece

PAUSE = 1 / 30
"""Seconds between two parts of a reply that are told, at least: a screen shows no more."""


class Stopped(Exception):
    """The user wants no more."""


@dataclass
class Answer:
    """What has been read and written so far.

    Attributes:
        text, written: the reply, without and with what ends it.
        read: how many tokens of the prompt have been computed.
        first, last: when its first and its newest token came.
        ended: why it is shorter than the model's own.
    """

    prompt: Prompt
    emit: Callable[[Event], None]
    is_stopped: Callable[[], bool]
    clock: Callable[[], float]
    text: str = ""
    written: str = ""
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    begin: float = 0.0
    first: float = 0.0
    last: float = 0.0
    ended: str = ""
    _untold: str = ""
    _told: float = 0.0

    def __post_init__(self) -> None:
        self.begin = self.first = self.last = self.clock()

    @property
    def piece(self) -> Piece | None:
        """The reply as it was written; None where it was not begun."""
        return Piece(self.written, tuple(self.tokens)) if self.tokens else None

    def progress(self, done: int, total: int) -> None:
        """Note how far reading is. Raises Stopped."""
        self.read = done
        self.emit(Reading(done, total))
        if self.is_stopped() and done < total:
            raise Stopped

    def tell(self) -> None:
        """Tell what has not been told of the reply."""
        if self._untold:
            self.emit(Said(self._untold))
            self._untold, self._told = "", self.last

    def add(self, part: Any, tokenizer: Any) -> None:
        """Note a token, as mlx-lm's `stream_generate` gives it. Raises Stopped."""
        self.last = self.clock()
        if not self.tokens:
            self.first = self.last
        self.tokens.append(part.token)
        self.text += part.text
        self.written += part.text
        self._untold += part.text
        if part.finish_reason is not None or self.last - self._told >= PAUSE:
            self.tell()
        if part.finish_reason == "stop":
            self.written += tokenizer.decode([part.token], skip_special_tokens=False)
        elif part.finish_reason == "length":
            self.ended = "length"
        elif self.is_stopped():
            raise Stopped

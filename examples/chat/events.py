"""Defines the events that the worker and the library send to the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .thinking import MARKS, Marks
from .tree import Conversation, Cost, Replied

if TYPE_CHECKING:
    # Importing mlx-lm takes seconds; the screen must not wait for it.
    from mlx_kvcache.plugin import Holding


@dataclass(frozen=True)
class Loading:
    """A model is being downloaded or loaded. `share` is the fraction done, or None if unknown."""

    what: str
    share: float | None = None


@dataclass(frozen=True)
class Ready:
    """A model is loaded.

    Attributes:
        notice: a warning for the user, or "".
        marks: the marks of thinking to look for in its replies.
    """

    model: str
    notice: str = ""
    marks: tuple[Marks, ...] = MARKS


@dataclass(frozen=True)
class Failed:
    """An action failed; nothing has changed."""

    what: str
    why: str


@dataclass(frozen=True)
class Reading:
    """Progress of the prefill, in tokens that the cache did not hold."""

    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """The statistics of the reply in progress so far.

    Attributes:
        start: the number of forgotten messages.
    """

    cost: Cost
    start: int


@dataclass(frozen=True)
class Said:
    """A part of the reply's text."""

    text: str


@dataclass(frozen=True)
class Seen:
    """A report on the contents of the caches.

    Attributes:
        holdings: the cells of each kind of layer.
        owners: ids of conversations by sequence, as far as known.
        current: the sequence of the current branch; None if it has no cache.
        cached: the number of tokens in it.
        capacity: the maximum number of tokens in it; None for no bound.
        nbytes, most: allocated bytes, now and at the peak.
        gap: the position at which messages are forgotten; None if none are.
        moved: the range [begin, end) of its tokens whose keys were re-based.
        totals: the sum of all replies since the start.
    """

    holdings: tuple[Holding, ...]
    owners: dict[int, str]
    current: int | None
    cached: int
    capacity: int | None
    nbytes: int
    most: int
    gap: int | None
    moved: tuple[int, int]
    totals: Cost


@dataclass(frozen=True)
class Stored:
    """The numbers of tokens that files hold, by the ids of conversations."""

    tokens: dict[str, int]


@dataclass(frozen=True)
class Changed:
    """Another chat has written conversations, and deleted those with the ids `gone`."""

    conversations: list[Conversation]
    gone: list[str]


@dataclass(frozen=True)
class Ended:
    """The worker has ended; this is its last event."""


Event = Ended | Loading | Ready | Failed | Reading | Progress | Said | Replied | Seen | Stored | Changed

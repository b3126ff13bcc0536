"""What the model's side tells the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tree import Cost, Replied

if TYPE_CHECKING:
    # The screen comes before mlx-lm, which takes seconds to import.
    from mlx_kvcache.plugin import Holding


@dataclass(frozen=True)
class Loading:
    """A model is being fetched or read; `share` is how much of that is done, None where unknown."""

    what: str
    share: float | None = None


@dataclass(frozen=True)
class Ready:
    """A model can be talked with. `notice` says what is not as asked for."""

    model: str
    notice: str = ""


@dataclass(frozen=True)
class Failed:
    """Something could not be done; everything is as it was before."""

    what: str
    why: str


@dataclass(frozen=True)
class Reading:
    """So many of the tokens that the cache did not have are read."""

    done: int
    total: int


@dataclass(frozen=True)
class Said:
    """A part of the reply."""

    text: str


@dataclass(frozen=True)
class Seen:
    """What the caches hold now.

    Attributes:
        holdings: cells, one for each kind of layer.
        owners: conversations by sequence, of those that are known.
        current: the sequence of the branch that is looked at.
        cached: its tokens.
        nbytes, most: bytes that are allocated, now and at most so far.
        moved: its tokens that stand elsewhere than they were computed, [first, after).
        totals: of all replies since the start.
    """

    holdings: tuple[Holding, ...]
    owners: dict[int, str]
    current: int | None
    cached: int
    nbytes: int
    most: int
    moved: tuple[int, int]
    totals: Cost


@dataclass(frozen=True)
class Ended:
    """There will be no more."""


Event = Ended | Loading | Ready | Failed | Reading | Said | Replied | Seen

"""Defines the chat's settings and their bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)
FRACTIONS = ("temperature", "top_p", "min_p", "repetition_penalty")
"""The settings that need not be whole numbers."""
OPTIONAL = ("capacity", "window", "bits", "seed")
"""The settings that may be left out."""


@dataclass(frozen=True)
class Settings:
    """Settings of sampling and caches.

    Attributes:
        capacity: the maximum number of tokens in a conversation's cache; None for no bound.
        window: the number of tokens that a token sees; None for all.
        sinks: the number of first tokens that stay visible in a window.
        bits: the bit width of stored keys and values; None for the model's own precision.
        temperature: the sampling temperature; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability.
        min_p: sample only tokens with this share of the likeliest token's probability; 0 for all.
        repetition_penalty: divides the odds of tokens that the end of the text has; 1 for none.
        seed: makes sampling repeatable; None for another reply each time.
        max_tokens: the maximum length of a reply, in tokens.
        memory: the maximum size of all caches in memory, in MB; evicted caches go to files.

    Raises:
        ValueError: a value is out of bounds.
    """

    capacity: int | None = 4096
    window: int | None = None
    sinks: int = 4
    bits: int | None = None
    temperature: float = 0.0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    memory: int = 1024

    def __post_init__(self) -> None:
        _check(self.capacity is None or self.capacity >= 64, "capacity", self.capacity, "64 or more")
        _check(self.window is None or self.window >= 16, "window", self.window, "16 or more")
        _check(0 <= self.sinks <= 64, "sinks", self.sinks, "0 to 64")
        _check(self.bits in (None, *BITS), "bits", self.bits, f"one of {', '.join(map(str, BITS))}")
        _check(0 <= self.temperature <= 2, "temperature", self.temperature, "0 to 2")
        _check(0 < self.top_p <= 1, "top-p", self.top_p, "above 0, to 1")
        _check(0 <= self.min_p < 1, "min-p", self.min_p, "0 or more, below 1")
        _check(1 <= self.repetition_penalty <= 2, "repetition penalty", self.repetition_penalty, "1 to 2")
        _check(self.seed is None or 0 <= self.seed < 2**32, "seed", self.seed, "0 to 4,294,967,295")
        _check(self.max_tokens >= 1, "the longest reply", self.max_tokens, "1 or more")
        _check(self.memory >= 16, "memory", self.memory, "16 or more")

    @property
    def caches(self) -> tuple[Any, ...]:
        """The settings that the caches depend on; when they change, caches must be made again."""
        return self.capacity, self.window, self.window and self.sinks, self.bits, self.memory

    @classmethod
    def of(cls, saved: Any) -> Settings:
        """Read settings from JSON, ignoring unknown names. Raises ValueError for bad values."""
        if not isinstance(saved, dict):
            raise ValueError(f"settings must be an object, got {type(saved).__name__}")
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        for name, value in known.items():
            wrong = isinstance(value, bool) or not isinstance(value, int | float | None)
            if wrong or (isinstance(value, float) and name not in FRACTIONS):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if value is None and name not in OPTIONAL:
                raise ValueError(f"{name} must be a number, got none")
        return cls(**known)


def _check(holds: bool, name: str, value: Any, bounds: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {bounds}, got {value}")

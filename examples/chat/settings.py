"""Defines the chat's settings and their bounds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)


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
    max_tokens: int = 512
    memory: int = 1024

    def __post_init__(self) -> None:
        _check(self.capacity is None or self.capacity >= 64, "capacity", self.capacity, "64 or more")
        _check(self.window is None or self.window >= 16, "window", self.window, "16 or more")
        _check(0 <= self.sinks <= 64, "sinks", self.sinks, "0 to 64")
        _check(self.bits in (None, *BITS), "bits", self.bits, f"one of {', '.join(map(str, BITS))}")
        _check(0 <= self.temperature <= 2, "temperature", self.temperature, "0 to 2")
        _check(0 < self.top_p <= 1, "top-p", self.top_p, "above 0, to 1")
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
            if wrong or (isinstance(value, float) and name not in ("temperature", "top_p")):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if value is None and name not in ("capacity", "window", "bits"):
                raise ValueError(f"{name} must be a number, got none")
        return cls(**known)


def _check(holds: bool, name: str, value: Any, bounds: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {bounds}, got {value}")

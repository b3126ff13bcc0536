"""What can be fuzzed: a check of any bytes, and bytes to begin with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Check = Callable[[bytes], None]
"""Raises what is a finding; nothing else comes out of it."""


class Target(NamedTuple):
    """One kind of input.

    Attributes:
        name: for the command line.
        told: what is tried, in a line.
        check: tries an input.
        seeds: valid inputs to begin with, made when they are asked for.
        words: what mutated inputs should contain more often than chance would have it.
        length: bytes of the longest input.
    """

    name: str
    told: str
    check: Check
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[bytes, ...] = ()
    length: int = 4096


def drawn(name: str, told: str, strategy: st.SearchStrategy[Any], test: Callable[[Any], None]) -> Target:
    """A target whose input is drawn by Hypothesis; the bytes are its choices.

    Coverage then leads what is drawn, and the same bytes draw the same again.
    """

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(strategy)
    def once(value: Any) -> None:
        test(value)

    fuzz_one_input = once.hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def check(data: bytes) -> None:
        fuzz_one_input(data)

    def seeds() -> Iterator[bytes]:
        # Any bytes are choices, so there is nothing to be valid.
        rng = random.Random(name)
        for size in (16, 64, 256, 1024, 4096):
            for _ in range(8):
                yield rng.randbytes(size)

    return Target(name, told, check, seeds)

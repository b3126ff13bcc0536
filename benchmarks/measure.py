"""Times and bytes of two ways to do the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from tqdm import tqdm

from benchmarks.rows import Row
from tests.plugin.running import difference

Work = Callable[[], float]
"""Does something once and returns the seconds that count."""

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def speed(
    key: str, work: str, unit: str, ours: Work, peer: str, theirs: Work, rounds: int, per: int = 1
) -> Row:
    """Do both in turn, `rounds` times after one warm-up, under a watch for memory.

    Args:
        unit: "s", "ms" or "us" for each of `per` parts of the work.
    """
    peak = peak_of(ours), peak_of(theirs)
    first: list[float] = []
    second: list[float] = []
    for index in tqdm(range(rounds), desc=work, leave=False):
        # Whoever goes first may be slowed by what the other left behind, so they take turns.
        for do, seconds in ((ours, first), (theirs, second))[:: 1 if index % 2 else -1]:
            seconds.append(do())
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    spread = None
    if rounds > 1:
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = low, high
    scale = UNITS[unit] / per
    return Row(
        key,
        work,
        unit,
        statistics.median(first) * scale,
        peer,
        statistics.median(second) * scale,
        "speed",
        statistics.median(ratios),
        spread,
        rounds,
        peak,
    )


def once(key: str, work: str, unit: str, ours: float, peer: str, theirs: float) -> Row:
    """A row of work that takes too long, or too little beside the other, to be repeated in turn."""
    scale = UNITS[unit]
    return Row(key, work, unit, ours * scale, peer, theirs * scale, "speed", theirs / ours)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of arrays above those there before, at most while something is done."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return max(0, mx.get_peak_memory() - before)


def check_equal(a: mx.array, b: mx.array, within: float = 1e-3) -> None:
    """Raise RuntimeError where two ways to compute the same differ: then their times say nothing.

    Args:
        within: how much of the largest number.
    """
    found, largest = difference(a, b), difference(b, mx.zeros(()))
    # What is not a number is not below anything either.
    if not found <= within * largest:
        raise RuntimeError(
            f"results of up to {largest:.1e} differ by {found:.1e}, more than {within:.0e} of it"
        )

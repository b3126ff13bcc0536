"""Measures the time and memory of two implementations of the same work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from tqdm import tqdm

from benchmarks.rows import Row
from tests.plugin.running import difference

Work = Callable[[], float]
"""Does the work once and returns the measured seconds."""

EQUAL = {mx.float32: 1e-3, mx.float16: 0.02, mx.bfloat16: 0.1}
"""How far results may differ by the rounding of their type, relative to the largest number."""
MOST_SECONDS = 60.0
"""The time that a pair of implementations may take for all rounds but one."""

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def speed(
    key: str, work: str, unit: str, ours: Work, peer: str, theirs: Work, rounds: int, per: int = 1
) -> Row:
    """Measure two implementations in turn, `rounds` times after one warm-up, which measures peak memory.

    Args:
        unit: "s", "ms" or "us".
        per: the number of parts of the work; times are reported for one part.
    """
    start = time.perf_counter()
    peak = peak_of(ours), peak_of(theirs)
    taken = time.perf_counter() - start
    # A slow machine repeats less.
    rounds = max(1, min(rounds, int(MOST_SECONDS / taken)))
    first: list[float] = []
    second: list[float] = []
    for index in tqdm(range(rounds), desc=work, leave=False, disable=None):
        # The order alternates, because the work before may slow down the first of a pair.
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
    """Make a speed row from single times in seconds, for work that cannot be measured in turn."""
    scale = UNITS[unit]
    return Row(key, work, unit, ours * scale, peer, theirs * scale, "speed", theirs / ours)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_of(work: Callable[[], object]) -> int:
    """The peak size in bytes of the arrays that the work adds to those that exist before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return max(0, mx.get_peak_memory() - before)


def check_equal(a: mx.array, b: mx.array, within: float | None = None) -> None:
    """Check that two implementations give the same result, without which their times mean nothing.

    Args:
        within: the tolerance, relative to the largest number in `b`; None for that of its type.

    Raises:
        RuntimeError: the results differ by more.
    """
    within = EQUAL[b.dtype] if within is None else within
    found, largest = difference(a, b), difference(b, mx.zeros(()))
    # Negated so that NaN is an error, too.
    if not found <= within * largest:
        raise RuntimeError(
            f"results differ by {found:.1e}, more than {within:.0e} of the largest number, {largest:.1e}"
        )
